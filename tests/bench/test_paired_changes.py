"""What rows lose against FP32, on the same samples."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassF1Score

from qakd_plugin import Candidate, benchmark, export_float
from qakd_plugin.bench import row_fields
from qakd_plugin.bench.changes import with_changes
from qakd_plugin.bench.intervals import mcnemar_p_value, paired_interval
from qakd_plugin.bench.jobs import Job
from qakd_plugin.tasks.metrics import Counted, outputs_and_targets

Z = 1.959963984540054


def refused(difference, gained, lost, total):
    """Whether a score test at 5 % refuses a difference; the other unknown share is the most likely one, found by search."""

    def negative_likelihood(second):
        first, neither = second + difference, 1 - 2 * second - difference
        terms = ((gained, first), (lost, second), (total - gained - lost, neither))
        if any(share < 0 or (count and share == 0) for count, share in terms):
            return 1e9
        return -sum(count * math.log(share) for count, share in terms if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    second = minimize_scalar(negative_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    variance = (2 * second + difference * (1 - difference)) / total
    return abs((gained - lost) / total - difference) > Z * math.sqrt(max(variance, 1e-300))


@pytest.mark.parametrize(
    ("gained", "lost", "total"),
    [(12, 2, 50), (3, 14, 300), (0, 5, 450), (1, 0, 44), (0, 0, 300), (200, 180, 50_000), (0, 9, 9)],
)
def test_the_interval_of_a_paired_difference_holds_what_a_score_test_does_not_refuse(gained, lost, total):
    low, high = paired_interval(gained, lost, total)
    found, step = (gained - lost) / total, 1e-3 * (high - low)
    assert -1 <= low <= found <= high <= 1
    for end, outwards in ((low, -step), (high, step)):
        assert not refused(end - outwards, gained, lost, total)
        if -1 < end + outwards < 1:
            assert refused(end + outwards, gained, lost, total)
    assert paired_interval(lost, gained, total) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 5), (3, 14), (7, 7)])
def test_mcnemars_test_counts_both_tails_of_a_fair_coin(gained, lost):
    total, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    assert mcnemar_p_value(gained, lost) == pytest.approx(min(1.0, 2 * tail))


class Table(nn.Module):
    """Logits of an image that holds its own number."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x):
        return self.logits[x[:, 0].long()]


@pytest.fixture(scope="module")
def answers():
    """Labels of 240 images, and the logits of three networks: the second and third spoil other images of the first."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (240,), generator=draw)
    first = nn.functional.one_hot(labels, 4).float() * 3 + torch.randn(240, 4, generator=draw)
    second, third = first.clone(), first.clone()
    second[:12] = first[:12].roll(1, 1)
    third[10:16] = first[10:16].roll(2, 1)
    return labels, [first, second, third]


def rows_of(answers, monkeypatch, **options):
    monkeypatch.setattr(row_fields, "peak_rss_mib", lambda *_: None)
    labels, logits = answers
    loader = [(torch.arange(start, start + 60).float()[:, None], labels[start : start + 60]) for start in range(0, 240, 60)]
    models = [Candidate(Table(table).eval(), name, "m") for table, name in zip(logits, ("FP32", "other", "third"), strict=True)]
    models.append(replace(models[1], model="another network"))
    return benchmark(models, loader, ("torch",), calls=1, **options)


def test_what_a_row_loses_is_counted_on_the_same_samples(answers, monkeypatch):
    labels, logits = answers
    rows = [row for row in rows_of(answers, monkeypatch) if row.precision == "float32"]
    right = [(table.argmax(1) == labels).numpy() for table in logits]
    best, *others = rows
    assert best.change is None
    assert rows[3].change is None, "of another network there is nothing to compare with"
    for row, mine in zip(others[:2], right[1:], strict=True):
        gained, lost = int((mine & ~right[0]).sum()), int((right[0] & ~mine).sum())
        assert row.change.value == pytest.approx(row.accuracy - best.accuracy) == (gained - lost) / 240
        assert (row.change.low, row.change.high) == paired_interval(gained, lost, 240)
        assert row.change.p_value == mcnemar_p_value(gained, lost)
        assert row.change.baseline == "FP32 in torch"
    assert rows[1].change.excludes_zero
    assert rows[1].accuracy_high > best.accuracy_low, "intervals of their own overlap; the paired one tells them apart"


@pytest.mark.parametrize("metric", [MulticlassF1Score(4), MeanSquaredError()])
def test_what_a_metric_loses_has_a_paired_interval(answers, monkeypatch, metric):
    labels, logits = answers
    error = isinstance(metric, MeanSquaredError)

    def counted(outputs, targets):
        return (outputs.argmax(1).float(), targets.float()) if error else (outputs, targets)

    rows = [row for row in rows_of(answers, monkeypatch, metric=metric, metric_fn=counted) if row.precision == "float32"]
    best, row = rows[:2]
    change = row.change
    assert (change.p_value, change.baseline) == (None, "FP32 in torch")
    assert change.value == pytest.approx(row.metric.value - best.metric.value)
    assert (change.value > 0) == error
    assert change.low < change.value < change.high
    assert change.excludes_zero
    draw, differences = np.random.default_rng(0), []
    for _ in range(400):
        drawn = torch.from_numpy(draw.integers(0, 240, 240))
        scores = []
        for table in logits[:2]:
            fresh = metric.clone()
            fresh.update(*counted(table[drawn], labels[drawn]))
            scores.append(float(fresh.compute()))
        differences.append(scores[1] - scores[0])
    expected = np.percentile(differences, [2.5, 97.5])
    width = expected[1] - expected[0]
    np.testing.assert_allclose((change.low, change.high), expected, atol=0.35 * width)


def test_resamples_that_are_not_the_same_have_no_paired_interval(answers):
    labels, logits = answers
    one, other = (Counted(MulticlassF1Score(4), outputs_and_targets, bootstraps=20) for _ in range(2))
    one.update({"logits": logits[0]}, labels)
    other.update({"logits": logits[1][:200]}, labels[:200])
    assert one.paired_interval(other, "multiclass_f1_score") is None
    assert one.paired_interval(one, "multiclass_f1_score") == (0.0, 0.0)


class Fixed:
    """A tally whose count is known."""

    def __init__(self, accuracy):
        self.accuracy, self.counts = accuracy, (self,)

    def score(self):
        return {"accuracy": self.accuracy}

    def change(self, reference):
        return self.accuracy - reference.accuracy, None, None, None


def test_fp32_is_the_best_one_of_the_same_runtime_or_of_any(tmp_path):
    fp32, integer = Candidate("fp32.onnx", "FP32"), Candidate("int8.onnx", "PTQ", weight_bits=8, activation_bits=8)
    jobs = [
        Job(integer, "onnxruntime", "float32"),
        Job(fp32, "onnxruntime", "float32"),
        Job(replace(fp32, path="larger.onnx"), "onnxruntime", "float32"),
        Job(fp32, "openvino", "bfloat16"),
        Job(fp32, "openvino", "float32"),
        Job(integer, "openvino", "float32"),
        Job(integer, "tensorrt", "float32"),
    ]
    scores = (0.7, 0.8, 0.9, 0.95, 0.85, 0.6, 0.5)
    found = [score["change"] for score in with_changes(jobs, [Fixed(accuracy) for accuracy in scores])]
    assert [change and change.baseline for change in found] == [
        "larger.onnx in onnxruntime",
        "larger.onnx in onnxruntime",
        None,
        "fp32.onnx in openvino",
        None,
        "fp32.onnx in openvino",
        "larger.onnx in onnxruntime",
    ]


def test_files_are_compared_as_modules_are(answers, tmp_path, monkeypatch):
    monkeypatch.setattr(row_fields, "peak_rss_mib", lambda *_: None)
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), torch.randn(120, 1, 4, 4)
    export_float(net, images, tmp_path / "fp32.onnx")
    with torch.no_grad():
        labels = net(images).argmax(1)
        net[1].bias[0] += 0.5
    export_float(net, images, tmp_path / "other.onnx")
    best, other = benchmark([tmp_path / "fp32.onnx", tmp_path / "other.onnx"], [(images, labels)], calls=1)
    assert (best.accuracy, best.change, best.file) == (1.0, None, "fp32.onnx")
    assert 0 > other.change.value == pytest.approx(other.accuracy - 1)
    assert other.change.baseline == "fp32.onnx in onnxruntime"
