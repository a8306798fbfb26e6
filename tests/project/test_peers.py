"""Beside other tools: every peer's code trains and exports, lines are counted as they are said to be, failures are told."""

from contextlib import nullcontext

import glyphs
import peers
import pytest
import torch
from evidence import Size
from torch import nn

from qakd_plugin.demo.net import DigitNet


@pytest.fixture
def study(tmp_path, monkeypatch):
    """With few images, and a teacher that is not trained."""
    pools = glyphs.render(1100, seed=0), glyphs.render(100, seed=1)
    splits = tuple((torch.from_numpy(images)[:, None] / 255, torch.from_numpy(labels)) for images, labels in pools)
    torch.manual_seed(0)
    network = DigitNet(width=8)
    network.head = nn.Linear(32, len(glyphs.CLASSES))
    monkeypatch.setattr(peers.Glyphs, "__post_init__", lambda self: None)
    study = peers.Glyphs(Size(images=200, epochs=1, seeds=1), tmp_path)
    (images, labels), study.test = splits
    study.train, study.validation = (images[:200], labels[:200]), (images[200:300], labels[200:300])
    study.teacher = network.eval()
    return study


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peer, id=peer.name, marks=() if peer.name in {"ours_modelopt", "nncf_qat"} else pytest.mark.matrix)
        for peer in peers.PEERS
    ],
)
def test_a_peer_trains_and_exports(peer, study, tmp_path, monkeypatch):
    eager = nullcontext()
    if peer.name.startswith("nncf"):
        pytest.importorskip("nncf")
        # Compiling its extension takes a minute or two: without a compiler it falls back on PyTorch's operators.
        monkeypatch.setattr("torch.utils.cpp_extension.load", _no_compiler)
        eager = torch.compiler.set_stance("force_eager")
    elif "modelopt" in peer.name:
        pytest.importorskip("modelopt")
    with eager:
        found = peers.run(peer, 8, study, seed=0, folder=tmp_path / "files")
    assert "error" not in found
    assert found["deployed"]
    for one in found["deployed"].values():
        assert (tmp_path / "files" / one["file"]).is_file()
        assert one["accuracy"] == pytest.approx(found["accuracy"], abs=0.05)


def _no_compiler(*args, **kwargs):
    raise RuntimeError("no compiler")


def test_a_tool_that_fails_is_a_result(study, tmp_path):
    five_bits = peers.run(peers.Peer("modelopt_distill", "", "", ()), 5, study, seed=0, folder=tmp_path / "files")
    assert all("error" in one for one in five_bits["deployed"].values())
    assert "No module named" in peers.run(peers.Peer("no_such_file", "", "", ()), 8, study, 0, tmp_path / "files")["error"]


def test_lines_with_code_count_and_no_others():
    source = '''"""Says what it is.

At length.
"""

import os
from pathlib import (
    Path,
)


def f(x):
    """What it does."""
    # why
    y = [
        x,  # this

        "#",
    ]

    return y


@staticmethod
def g(): return """two
lines"""
'''
    assert peers.count_lines(source) == 9  # def, y = [, x, "#", ], return, @, def and the second line of its text
    assert all(peer.lines > 5 for peer in peers.PEERS)


def test_the_table_tells_figures_and_failures():
    deployed = {"onnxruntime": {"file": "a.onnx", "accuracy": 0.9}, "openvino": {"error": "QakdError: no `such` op"}}
    students = [
        _student("ours_modelopt", [{"accuracy": 0.92, "cpu_seconds": 4.0, "deployed": deployed}]),
        _student("nncf_qat", [{"accuracy": a, "cpu_seconds": 6.0, "deployed": {}} for a in (0.90, 0.91)]),
        _student("torch_ao_kd_loop", [{"error": "AttributeError: gone"}]),
    ]
    row = {"method": "ours_modelopt", "weight_bits": 8, "runtime": "onnxruntime", "cpu_ms": 0.123}
    rows = [{**row, "integer_layers": 3, "total_layers": 4}]
    document = {"teacher": 0.95, "students": students, "rows": rows, "size": {"images": 64, "epochs": 3, "seeds": 2}}
    table = peers.make_table(document).splitlines()
    assert table[0].startswith("| student (64 images, 3 epochs; seeds: 2) | lines of user code |")
    assert table[2] == "| FP32 teacher |  |  | 95.00 | 95.00 | 95.00 |"
    assert table[3] == "| ours_modelopt, W8A8 | 12 | 4.0 (1.00x) | 92.00 | 90.00; 0.12; 3 of 4 | fails (1) |"
    assert table[4] == "| nncf_qat, W8A8 | 12 | 6.0 (1.50x) | 90.50 | no export for it | no export for it |"
    assert table[5] == "| torch_ao_kd_loop, W8A8 | 12 | fails (2) |  |  |  |"
    assert table[6:] == ["", "(1) `QakdError: no 'such' op`", "", "(2) `AttributeError: gone`"]


def _student(peer, cells):
    return {"peer": peer, "label": peer, "bits": 8, "lines": 12, "cells": cells}
