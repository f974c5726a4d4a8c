"""Measurements of the kernels: each op against ``F.linear`` in the same run, on weights that are not in cache."""

from bitinfer.bench.kernels import SHAPES, BenchReport, Measurement, bench_kernels, parse_shapes

__all__ = ["SHAPES", "BenchReport", "Measurement", "bench_kernels", "parse_shapes"]
