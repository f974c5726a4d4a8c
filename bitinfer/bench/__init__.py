"""Measurements of the kernels: each op against its peers in the same run, on weights that are not in cache."""

from bitinfer.bench.kernels import bench_kernels
from bitinfer.bench.report import SHAPES, BenchReport, Measurement, parse_shapes, parse_tokens

__all__ = ["SHAPES", "BenchReport", "Measurement", "bench_kernels", "parse_shapes", "parse_tokens"]
