"""From a float model to a prepared model, and from a prepared model to learned quantizers."""

from .._moved import forwarded

__getattr__ = forwarded(__name__, "prepared")
