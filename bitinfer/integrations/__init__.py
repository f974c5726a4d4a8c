"""Connections to other libraries, made when those libraries are imported and never before."""

from bitinfer.integrations.hooks import install

__all__ = ["install"]
