"""Under which keys a mapping that a loader yields holds inputs and targets; read with torch and without."""

from __future__ import annotations

INPUT_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x")
TARGET_KEYS = ("labels", "label", "targets", "target", "y")
