"""What this processor can do with narrow numbers, as far as the system tells: on Linux."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
_WITHOUT_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})
_WITHOUT_BFLOAT16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"})
TOLD = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "avx512_bf16", "amx_bf16", "bf16")
"""Flags that speed depends on, and results."""


@cache
def cpu_flags() -> frozenset[str]:
    """Of the first core; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system
        return frozenset()
    return next(
        (frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), frozenset()
    )


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16, rather than in float32 with conversions.

    OpenVINO and torch do it with oneDNN, which ``ONEDNN_MAX_CPU_ISA`` may keep from it.
    """
    return _onednn_limit() not in _WITHOUT_BFLOAT16 and not _BFLOAT16.isdisjoint(cpu_flags())


def onednn_adds_products_in_16_bits() -> bool:
    """Whether oneDNN's integer kernels, which OpenVINO's are, may saturate: see :func:`adds_products_in_16_bits`."""
    return adds_products_in_16_bits() or _onednn_limit() in _WITHOUT_VNNI


def _onednn_limit() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()


def has_amx() -> bool:
    """Whether this processor multiplies int8 matrices in AMX."""
    return "amx_int8" in cpu_flags()


def adds_products_in_16_bits() -> bool:
    """Whether this is an x86 processor without VNNI: its only instruction for u8 times s8 adds pairs of products in 16 bits."""
    return platform.machine().lower() in {"x86_64", "amd64"} and bool(cpu_flags()) and cpu_flags().isdisjoint(_VNNI)
