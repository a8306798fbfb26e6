"""Files of several inputs and outputs, and metrics that are not accuracy, through the runtimes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from qakd_plugin import Candidate, QakdError, benchmark, default_batch, write_report
from qakd_plugin.bench import row_fields
from qakd_plugin.bench.loading import make_runner
from qakd_plugin.runtimes.base import Input

WORDS, CLASSES = 50, 4
RUNTIMES = ("onnxruntime", "openvino")


class Tokens(nn.Module):
    """The sum of what each unmasked token says for each class, and how many tokens there were."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, CLASSES)

    def forward(self, ids, mask):
        return {"logits": (self.embedding(ids) * mask[..., None]).sum(1), "length": mask.sum(1).to(self.embedding.weight.dtype)}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Tokens().eval()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """The same network by hand."""
    axis = numpy_helper.from_array(np.array([1]), "axis")
    last = numpy_helper.from_array(np.array([2]), "last")
    table = numpy_helper.from_array(network.embedding.weight.detach().numpy(), "table")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["said"]),
        helper.make_node("Cast", ["mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weights", "last"], ["column"]),
        helper.make_node("Mul", ["said", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axis"], ["logits"], keepdims=0),
        helper.make_node("ReduceSum", ["weights", "axis"], ["length"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in ("ids", "mask")]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES]),
        helper.make_tensor_value_info("length", TensorProto.FLOAT, ["batch"]),
    ]
    graph = helper.make_graph(nodes, "tokens", inputs, outputs, [axis, last, table])
    path = tmp_path_factory.mktemp("tokens") / "tokens.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def texts(count=40, length=6, seed=0):
    """Token ids, a mask, and labels that the network gets right about half the time."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (count, length), generator=draw)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (count, 1), generator=draw)).long()
    return {"ids": ids, "mask": mask}


def labelled(network, inputs, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        best = network(**inputs)["logits"].argmax(1)
    random = torch.randint(CLASSES, best.shape, generator=draw)
    return {**inputs, "labels": torch.where(torch.rand(best.shape, generator=draw) < 0.5, best, random)}


def batches(network, sizes=(16, 16, 8)):
    return [labelled(network, texts(count, seed=index), seed=index) for index, count in enumerate(sizes)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    if "peak" not in request.node.name:
        monkeypatch.setattr(row_fields, "peak_rss_mib", lambda *_: None)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runners_take_inputs_and_give_outputs_by_the_files_own_names(runtime, file, network):
    runner, inputs = make_runner(file, runtime, 1), texts()
    assert runner.inputs == {name: Input((None, None), np.dtype("int64")) for name in ("ids", "mask")}
    assert runner.outputs == ("logits", "length")
    with torch.no_grad():
        expected = network(**inputs)
    ids, mask = (part.numpy() for part in inputs.values())
    for given in ({"mask": mask, "ids": ids}, {"0": ids, "1": mask}, {"ids": ids.astype(np.uint8), "mask": mask.astype(bool)}):
        found = runner.run(given)
        assert list(found) == ["logits", "length"]
        for name, array in found.items():
            np.testing.assert_allclose(array, expected[name], atol=1e-5)
    runner.close()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, mask: {"ids": ids}, "the file takes 'ids', 'mask', got 'ids'"),
        (lambda ids, mask: {"ids": ids, "mask": mask, "more": ids}, "got 'ids', 'mask', 'more'"),
        (lambda ids, mask: {"0": ids}, "got 1 without a name"),
        (lambda ids, mask: {"ids": ids, "mask": mask.astype("f")}, "input 'mask' takes int64, got float32"),
        (lambda ids, mask: {"ids": ids.astype("u8") + 2**63, "mask": mask}, "got uint64 with numbers that it cannot hold"),
        (lambda ids, mask: {"ids": ids[0], "mask": mask}, r"input 'ids' takes shape \[any, any\], got \[6\]"),
    ],
)
def test_inputs_that_a_file_does_not_take_are_named(change, message, runtime, file):
    runner = make_runner(file, runtime, 1)
    with pytest.raises(QakdError, match=message):
        runner.run(change(*(part.numpy() for part in texts().values())))


def test_what_a_runtime_cannot_compute_is_one_line_that_names_the_file(file):
    with pytest.raises(QakdError, match=r"tokens\.onnx: ONNX Runtime cannot compute it: .*indices"):
        benchmark([file], [{name: array + WORDS for name, array in texts().items()}], calls=1)


def test_a_metric_through_every_runtime_is_that_of_the_network_in_torch(file, network):
    """A mapping without any function that splits it: files and modules take what they have inputs for."""
    loader = batches(network)
    metric = MetricCollection({"f1": MulticlassF1Score(CLASSES), "rmse": MeanSquaredError(squared=False)})

    def counted(outputs, targets):
        return outputs["logits"].argmax(1), targets

    def rows(runtimes, batch_fn):
        found = benchmark(
            [Candidate(file), Candidate(network)],
            loader,
            runtimes,
            calls=1,
            batch_fn=batch_fn,
            metric=metric,
            metric_fn=counted,
        )
        return [row for row in found if row.precision == "float32"]

    for batch in loader:
        with torch.no_grad():
            metric.update(network(batch["ids"], batch["mask"])["logits"].argmax(1), batch["labels"])
    expected = {name: float(value) for name, value in metric.compute().items()}
    first, again = rows((*RUNTIMES, "torch"), None), rows(("onnxruntime", "torch"), default_batch)
    assert [row.runtime for row in first] == [*RUNTIMES, "torch"]
    assert [row.metrics for row in first if row.runtime != "openvino"] == [row.metrics for row in again], "it is seeded"
    for row in first:
        assert {value.name: value.value for value in row.metrics} == pytest.approx(expected)
        assert [value.higher_is_better for value in row.metrics] == [True, False]
        assert all(value.low < value.value < value.high for value in row.metrics)
        assert (row.samples, row.accuracy) == (40, None)


def test_intervals_do_not_depend_on_how_samples_are_batched(file, network):
    """Resampling within batches of one sample would always draw the same one."""
    found = []
    for size in (1, 20):
        loader = batches(network, [size] * (40 // size))
        (row,) = benchmark(
            [file],
            loader,
            calls=1,
            metric=MulticlassAccuracy(CLASSES, average="micro"),
            metric_fn=lambda outputs, targets: (outputs["logits"], targets),
        )
        (value,) = row.metrics
        half = 1.96 * (value.value * (1 - value.value) / 40) ** 0.5
        found.append((value.high - value.low) / (2 * half))
    assert all(0.7 < ratio < 1.4 for ratio in found)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_accuracy_is_counted_whatever_the_lengths_of_the_batches(runtime, file, network):
    loader = [labelled(network, texts(30, length, seed=length), seed=length) for length in (3, 5, 5, 9)]
    with torch.no_grad():
        hits = [network(batch["ids"], batch["mask"])["logits"].argmax(1) == batch["labels"] for batch in loader]
    row, *_ = benchmark([file], loader, (runtime,), calls=2, batch_sizes=(4,))
    assert (row.precision, row.accuracy, row.samples) == ("float32", torch.cat(hits).double().mean().item(), 120)


def test_each_output_is_compared_with_its_own_reference(file, network):
    loader = batches(network)
    with torch.no_grad():
        outputs = [network(batch["ids"], batch["mask"]) for batch in loader]
    reference = {name: torch.cat([found[name] for found in outputs]).numpy() for name in ("logits", "length")}
    reference["logits"][:4] = np.roll(reference["logits"][:4], 1, axis=1)
    noise = np.square(np.roll(reference["logits"][:4], -1, axis=1) - reference["logits"][:4]).sum()
    (row,) = benchmark([file], loader, calls=1, reference=reference)
    logits, length = row.outputs
    assert (logits.output, logits.agreement) == ("logits", 36 / 40)
    assert logits.sqnr_db == pytest.approx(10 * np.log10(np.square(reference["logits"]).sum() / noise), abs=1e-3)
    assert (length.output, length.agreement, length.sqnr_db) == ("length", None, None), "no labels, and no deviation"
    assert (row.agreement, row.sqnr_db) == (logits.agreement, logits.sqnr_db)
    (single,) = benchmark([file], loader, calls=1, reference=reference["logits"])
    assert (single.agreement, single.outputs) == (36 / 40, ())
    with pytest.raises(QakdError, match=r"reference: tokens\.onnx has no output 'boxes'; it outputs 'logits'"):
        benchmark([file], loader, calls=1, reference={"boxes": reference["logits"]})


def test_a_loader_without_labels_is_there_for_the_inputs_that_cannot_be_random(file):
    with pytest.raises(QakdError, match="its input 'ids' holds int64, which is not drawn at random; pass a loader"):
        benchmark([file], calls=1)
    (row,) = benchmark([file], [texts()], calls=2, batch_sizes=(3,), profile_layers=True)
    assert (row.accuracy, row.metrics, row.batch, row.samples) == (None, (), 3, 0)
    assert any(layer.op == "Gather" for layer in row.layers)


def test_peak_memory_of_a_file_of_integers_is_measured(file):
    (row,) = benchmark([file], [texts()], calls=1)
    assert row.peak_rss_mib is None or row.peak_rss_mib > 20


def test_an_input_without_a_batch_dimension_goes_with_every_call(tmp_path):
    """As many rows as the first batch has samples: the file says which of the two counts samples."""
    x, bias = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["batch", 8]), ("bias", [8, 8])))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "bias"], ["y"])], "net", [x, bias], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "net.onnx")
    bias = np.random.default_rng(0).normal(size=(8, 8)).astype("f")
    images = np.random.default_rng(1).normal(size=(20, 8)).astype("f")
    loader = [((images[start : start + 8], bias), (images @ bias)[start : start + 8]) for start in (0, 8, 16)]
    (row,) = benchmark(
        [tmp_path / "net.onnx"], loader, batch_fn=lambda batch: batch, metric=MeanSquaredError(), batch_sizes=(5,), calls=1
    )
    assert (row.samples, row.batch) == (20, 5)
    assert row.metrics[0].value < 1e-9
    loader[1] = ((images[:8], bias + 1), loader[1][1])
    with pytest.raises(QakdError, match="input '1' has no batch dimension, and differs between batches"):
        benchmark([tmp_path / "net.onnx"], loader, batch_fn=lambda batch: (batch[0], np.zeros(len(batch[1]), int)), calls=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metric_fn": lambda outputs, targets: (outputs["boxes"], targets)},
            "tokens.onnx: metric_fn: there is no 'boxes'. The",
        ),
        ({"metric_fn": lambda outputs, targets: outputs["logits"]}, "metric_fn must return a tuple.*got Tensor"),
        ({"metric_fn": lambda outputs, targets: (outputs["logits"][:3], targets)}, r"one entry per sample.*\(3, 4\).*\(16,\)"),
        ({"metric_fn": lambda outputs, targets: (outputs["length"], targets)}, "MulticlassF1Score does not take"),
        ({}, r"the network outputs 'logits' \(16, 4\) float32, 'length' \(16,\) float32. Say what the metric takes"),
        ({"metric": "f1"}, "must be a torchmetrics"),
        ({"metric": None, "metric_fn": len}, "metric_fn says what a metric takes, and there is none"),
        ({"batch_fn": lambda batch: batch["ids"]}, "batch_fn must return .inputs, targets., got Tensor"),
        ({"batch_fn": lambda batch: ([batch["ids"]], None)}, "inputs are a list"),
        ({"batch_fn": lambda batch: ({"ids": batch["ids"]}, None)}, "the file takes 'ids', 'mask', got 'ids'"),
        ({"loader": []}, "loader is empty"),
        ({"loader": None}, "metric: it is counted on a loader's samples"),
        ({"loader": [texts()]}, "the batch holds no targets"),
        ({"loader": [{"text": ["a"]}]}, r"keys \['text'\], and the inputs are ids, mask"),
        ({"loader": [{"ids": ["a"], "mask": ["b"]}]}, "cannot be read as arrays of numbers"),
    ],
)
def test_what_cannot_be_counted_is_named(options, message, file, network):
    given = {"metric": MulticlassF1Score(CLASSES), "calls": 1, "loader": batches(network), **options}
    with pytest.raises(QakdError, match=message):
        benchmark([file], given.pop("loader"), **given)


def test_several_outputs_without_one_called_logits_have_no_accuracy(file, network, tmp_path):
    model = onnx.load(file)
    for node in model.graph.node:
        node.output[:] = ["classes" if name == "logits" else name for name in node.output]
    model.graph.output[0].name = "classes"
    onnx.save(model, tmp_path / "two.onnx")
    with pytest.raises(QakdError, match=r"two\.onnx outputs 'classes' .* which of them holds logits is not known.*metric="):
        benchmark([tmp_path / "two.onnx"], batches(network), calls=1)


def test_a_report_of_a_metric_names_it_and_its_interval(file, network, tmp_path):
    rows = benchmark(
        [file],
        batches(network),
        calls=1,
        metric=MulticlassF1Score(CLASSES),
        metric_fn=lambda outputs, targets: (outputs["logits"], targets),
    )
    path = write_report(rows, tmp_path / "report.html")
    (value,) = rows[0].metrics
    for text in (path.read_text(), path.with_suffix(".md").read_text()):
        assert "multiclass" in text
        assert f"{value.value:.4g}" in text
        assert f"{value.low:.4g} to {value.high:.4g}" in text
