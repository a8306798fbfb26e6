"""Where quantizers belong in a float network, and how their ranges are calibrated."""

from .._moved import forwarded

__getattr__ = forwarded(__name__, "placement")
