"""Measurements of the kernels: each op against its peers in the same run, on weights that are not in cache."""

from bitinfer.bench.kernels import bench_kernels
from bitinfer.bench.model import ModelReport, bench_model
from bitinfer.bench.report import SHAPES, BenchReport, Measurement, parse_shapes, parse_tokens

__all__ = [
    "SHAPES",
    "BenchReport",
    "Measurement",
    "ModelReport",
    "bench_kernels",
    "bench_model",
    "parse_shapes",
    "parse_tokens",
]
