"""The gate: what is proven before a file is written."""

from ..._moved import forwarded

__getattr__ = forwarded(__name__, "gate", "report", "weights", "recorded_codes", "imposed_codes", "layers")
