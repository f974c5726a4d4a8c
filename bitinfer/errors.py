"""The exceptions that bitinfer raises for bad input, beside ValueError and TypeError for bad arguments."""


class BitinferError(Exception):
    """Base class: catch it to catch every error of bitinfer's own."""


class FormatError(BitinferError, ValueError):
    """A checkpoint is damaged, of an unknown layout, or not what its config says. The message names the tensor."""


class BackendError(BitinferError, RuntimeError):
    """A backend that was asked for cannot run here. The message says why and which can."""
