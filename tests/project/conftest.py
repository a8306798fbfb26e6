"""Shared: data that are made up."""

import gzip

import numpy as np
import pytest


@pytest.fixture
def garments(tmp_path):
    """Fashion-MNIST's files, of 1,400 and 100 images: a class is a bright row."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 1400), ("t10k", 100)):
        labels = draw.integers(0, 10, count).astype(np.uint8)
        pixels = draw.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        pixels[np.arange(count), 2 * labels + 4] = 255
        for kind, header, found in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(b"\0" * header + found.tobytes()))
    return tmp_path
