"""bitinfer: binary language models at the cost of one bit per weight."""

__version__ = "0.1.0"
