"""Learned quantizers: LSQ, PACT, DoReFa, EWGS."""

from .base import QuantizerConfig, Rule, remove_tensors, rule_from_dict
from .curvature import refresh_delta
from .dorefa import DoReFa
from .ewgs import EWGS
from .lsq import LSQ
from .pact import PACT

__all__ = ["EWGS", "LSQ", "PACT", "DoReFa", "QuantizerConfig", "Rule", "refresh_delta", "remove_tensors", "rule_from_dict"]
