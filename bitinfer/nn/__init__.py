"""Drop-in layers for packed weights, and the walk that puts them into a model."""

from bitinfer.nn.linear import BinaryLinear
from bitinfer.nn.replace import ReplaceReport, replace_linear

__all__ = ["BinaryLinear", "ReplaceReport", "replace_linear"]
