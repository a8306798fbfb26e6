"""Models prepared by NVIDIA ModelOpt."""

from .registration import restore_modelopt

__all__ = ["restore_modelopt"]
