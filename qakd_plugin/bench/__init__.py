"""Measurement of deployed files: latency, accuracy through the runtime, integer layers. Knows files, nothing of torch
models."""

from .measure import Candidate, benchmark
from .record import Row

__all__ = ["Candidate", "Row", "benchmark"]
