"""What needs no explanation where outputs are compared. Without torch, which tuning does not need either."""

LOGIT_TOLERANCE = 1e-4
"""Largest deviation of logits, relative to their range, once ties are settled; of each output, where there are several."""

LABELS = 0.1
"""Share of labels that may differ where a file outputs nothing else, and more only where rounding changes as many: of a few
samples one may be undecided."""
