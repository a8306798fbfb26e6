"""Models prepared by NVIDIA ModelOpt."""
