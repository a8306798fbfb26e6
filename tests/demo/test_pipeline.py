"""The demo where packages are missing; the whole of it runs in tests/cli."""

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from report_rows import ROW
from torch import nn

from qakd_plugin import MissingPackageError
from qakd_plugin.bench.intervals import wilson_interval
from qakd_plugin.demo import data, pipeline, summary
from qakd_plugin.report import read_report

FP32 = replace(ROW, method="FP32", toolkit=None, weight_bits=32, activation_bits=32, precision="float32", speedup=1.0)


@dataclass
class Trained:
    """What a run of ``distill`` that trains nothing returns."""

    model: nn.Module
    history: list


@pytest.fixture
def short(monkeypatch):
    """One student of each method, calibrated alone; exporting and measuring have tests of their own."""
    monkeypatch.setattr(pipeline, "CONFIGURATIONS", ((8, (pipeline.SQAKD(),)),))
    history = [{"epoch": 0, "phase": "none", "loss": 1.0, "val_accuracy": 0.5}]
    monkeypatch.setattr(pipeline, "distill", lambda model, *_, **__: Trained(model, history))
    monkeypatch.setattr(pipeline, "_export_all", lambda *_: [])
    monkeypatch.setattr(pipeline, "_measure", lambda *_: [FP32, ROW])


def test_without_tensorrt_rtx_the_first_step_says_so_and_the_report_too(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    path = pipeline.run(tmp_path, epochs=1, teacher_epochs=1, calls=2)
    output = capsys.readouterr().out
    first, _, rest = output.partition("2/8")
    assert "No engines are built: tensorrt_rtx cannot be imported" in first
    assert "pip install" in first
    assert "8/8" in rest
    document = read_report(path.with_suffix(".json"))
    assert document["engines"] == []
    (note,) = [note for note in document["runs"][0]["notes"] if "No engines" in note]
    assert "pip install" in note
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("module", ["modelopt.torch.quantization", "sklearn.datasets"])
def test_what_it_cannot_do_without_is_missed_before_anything_is_trained(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(pipeline, "train_float", lambda *_, **__: pytest.fail("the teacher was trained"))
    with pytest.raises(MissingPackageError, match=rf"{module.partition('.')[0]} is needed .*pip install -e '\.\[demo\]'"):
        pipeline.run(tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_digits_are_split_once_into_classes_of_equal_shares():
    parts = data.load(seed=3)
    sizes = [len(getattr(parts, split)[1]) for split in ("train", "validation", "test")]
    assert sum(sizes) == 1797
    for images, labels in (parts.train, parts.validation, parts.test):
        assert images.shape[1:] == (1, 32, 32)
        assert 0 <= images.min() < images.max() <= 1
        assert torch.bincount(labels).min() > 0.08 * len(labels)


def test_a_winner_is_named_only_where_intervals_part():
    def row(method, accuracy):
        low, high = wilson_interval(round(450 * accuracy), 450)
        return replace(
            ROW, method=method, weight_bits=2, activation_bits=2, accuracy=accuracy, accuracy_low=low, accuracy_high=high
        )

    (parted,) = summary.winners([FP32, row("PTQ", 0.2), row("QAT", 0.8), row("SQAKD", 0.96)])
    assert "W2A2: calibration alone reaches 20.0 [16.6, 23.9] %" in parted
    assert "SQAKD won, and the intervals part" in parted
    (close,) = summary.winners([FP32, row("PTQ", 0.2), row("QAT", 0.97), row("SQAKD", 0.96)])
    assert "neither has won" in close
    assert summary.winners([FP32, row("PTQ", 0.99), row("SQAKD", 0.99)]) == []
