"""Decoding whole models: :func:`fuse` puts a loop of our own behind ``model.generate``.

``layers.py`` is one decoder layer over a key and value cache (``cache.py``), ``decoder.py`` a model of them,
``sampling.py`` chooses tokens on the device, ``generation.py`` is the loop.
"""

from bitinfer.models.decoder import Decoder
from bitinfer.models.generation import fuse, fuse_if_possible, unfuse

__all__ = ["Decoder", "fuse", "fuse_if_possible", "unfuse"]
