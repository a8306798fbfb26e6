"""TensorRT engines: built, vouched for, run."""

from ..._moved import forwarded

__getattr__ = forwarded(__name__, "build")
