"""The binary language model that comes with the package: 14.8 MB, English, made by ``examples/embedded_model``.

``model/`` is an ordinary packed folder; its ``README.md`` is the model card.
"""

from pathlib import Path


def embedded_model() -> Path:
    """Return the folder of the model that comes with bitinfer, which ``bitinfer.load()`` opens.

    It is a demonstration: 80 million binary weights that write grammatical English, and know little.
    """
    return Path(__file__).parent / "model"
