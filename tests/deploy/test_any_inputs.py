"""Any inputs and outputs: what a file is called with, what is dynamic in it, and what is refused."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from agreement import AS_WRITTEN
from torch import Tensor, nn

from qakd_plugin import EngineError, ExportError, ParityError, build_engine, export_float, export_onnx, prepare
from qakd_plugin.deploy.engine.trtexec import input_shape, trtexec_command

BERT = {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}


class _Masked(nn.Module):
    """An image and a mask of integers; two heads in a dict, labels among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scores, self.box = nn.Conv2d(1, 8, 3, 2, padding=1), nn.Linear(8, 5), nn.Linear(8, 4)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, object]:
        x = torch.relu(self.conv(image * mask[:, None].to(image.dtype))).mean((2, 3))
        scores = self.scores(x)
        return {"heads": {"scores": scores, "box": self.box(x)}, "label": scores.argmax(1), "cache": None, "step": 3}


class _Sized(nn.Module):
    """A network of convolutions for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, 2, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(image)))


class _Pooled(_Sized):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).mean((2, 3))


class _PadsForStride(_Sized):
    """Reads a setting of a layer where it calls it, as padding like TensorFlow's does."""

    def forward(self, image: Tensor) -> Tensor:
        rows, columns = self.first.stride
        return super().forward(nn.functional.pad(image, (0, columns - 1, 0, rows - 1)))


def _image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES = _image(4, 1, 16, 16)
SIZES = {"input": {2: "height", 3: "width"}}


def _prepared(network: nn.Module, example: Any) -> nn.Module:
    return prepare(network.eval(), [example], "modelopt", batch_fn=lambda batch: (batch, None))


def _shapes(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(path).graph
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def _run(path: Path, feeds: Mapping[str, Tensor]) -> list[npt.NDArray[Any]]:
    """Without fusions, which round biases."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    found: list[npt.NDArray[Any]] = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return found


def test_inputs_by_their_names_outputs_by_their_paths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = torch.ones(6, 8, 8, dtype=torch.long)
    mask[:, :3] = 0
    inputs = (_image(6, 1, 8, 8), mask)
    student = _prepared(_Masked(), inputs)
    exported = export_onnx(student, inputs, tmp_path / "s.onnx", target="onnxruntime")
    assert _shapes(exported.path) == {
        "image": ["batch", 1, 8, 8],
        "mask": ["batch", 8, 8],
        "heads.scores": ["batch", 5],
        "heads.box": ["batch", 4],
        "label": ["batch"],
    }
    names = [node.name for node in onnx.load(exported.path).graph.node]
    assert "conv/Conv" in names
    with torch.no_grad():
        expected = student(*inputs)
    scores, box, label = _run(exported.path, {"image": inputs[0][:3], "mask": mask[:3]})
    assert np.allclose(scores, expected["heads"]["scores"][:3], atol=1e-5)
    assert np.allclose(box, expected["heads"]["box"][:3], atol=1e-5)
    assert np.array_equal(label, expected["label"][:3])
    renamed = export_onnx(
        student,
        {"mask": mask, "image": inputs[0]},
        tmp_path / "r.onnx",
        input_names=["valid", "picture"],
        output_names=["a", "b", "c"],
        dynamic={},
    )
    assert _shapes(renamed.path) == {
        "valid": [6, 8, 8],
        "picture": [6, 1, 8, 8],
        "a": [6, 5],
        "b": [6, 4],
        "c": [6],
    }


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100, num_labels=3
    )
    ids = torch.randint(0, 100, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return _prepared(transformers.BertForSequenceClassification(config), inputs), inputs


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_language_model_has_any_length(target: Any, bert: Any, tmp_path: Path) -> None:
    student, inputs = bert
    exported = export_onnx(student, inputs, tmp_path / "b.onnx", target, dynamic=BERT)
    expected_shapes = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"], "logits": ["batch", 3]}
    assert _shapes(exported.path) == expected_shapes
    if target == "openvino":
        openvino = pytest.importorskip("openvino")
        compiled = openvino.compile_model(exported.path, "CPU", AS_WRITTEN)
    for length in (7, 23):
        feeds = {name: torch.cat([tensor, tensor], 1)[:2, :length] for name, tensor in inputs.items()}
        with torch.no_grad():
            expected = student(**feeds).logits
        got = compiled({k: v.numpy() for k, v in feeds.items()})[0] if target == "openvino" else _run(exported.path, feeds)[0]
        assert np.abs(got - expected.numpy()).max() < 0.02 * float(expected.max() - expected.min())


def test_an_engine_has_sizes_for_every_dynamic_dimension(bert: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    student, inputs = bert
    file = export_onnx(student, inputs, tmp_path / "b.onnx", dynamic=BERT)
    options: dict[str, Any] = {"runtime": "tensorrt_rtx", "capabilities": ["SM89"], "max_batch": 16, "require_int8": 1.0}
    with pytest.raises(EngineError, match=r"'sequence' \(dimension 1 of 'input_ids'\) .* sizes=\{\"sequence\": \(smallest"):
        build_engine(file, tmp_path / "b.engine", **options)
    with pytest.raises(EngineError, match=r"no dynamic dimension 'length'.*'sequence'"):
        build_engine(file, tmp_path / "b.engine", sizes={"sequence": (4, 8, 16), "length": (1, 2, 3)}, **options)
    with pytest.raises(EngineError, match=r"'sequence' needs three whole numbers.*\(16, 8, 4\)"):
        build_engine(file, tmp_path / "b.engine", sizes={"sequence": (16, 8, 4)}, **options)
    engine = build_engine(file, tmp_path / "b.engine", sizes={"sequence": (4, 12, 64)}, **options)
    shapes = [[1, 4], [8, 12], [16, 64]]
    assert engine.manifest["shapes"] == {"input_ids": shapes, "attention_mask": shapes}
    assert engine.manifest["inputs"] == {"input_ids": [None, None], "attention_mask": [None, None]}
    line = trtexec_command(file, "e", input_shape(file), max_batch=16, sizes={"sequence": (4, 12, 64)})
    assert "--maxShapes=input_ids:16x64,attention_mask:16x64" in line


def test_a_network_may_read_the_settings_of_its_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = _prepared(_PadsForStride(), IMAGES)
    path = export_onnx(student, IMAGES, tmp_path / "s.onnx").path
    with torch.no_grad():
        expected = student(IMAGES)
    assert expected.shape[2:] == (9, 9)
    assert np.allclose(_run(path, {"input": IMAGES})[0], expected, atol=1e-5)


def test_images_have_any_height_and_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = _image(4, 1, 16, 24)
    student = _prepared(_Sized(), images)
    exported = export_onnx(student, images, tmp_path / "s.onnx", dynamic={"input": {2: "height", 3: "width"}})
    assert _shapes(exported.path)["input"] == ["batch", 1, "height", "width"]
    other = _image(2, 1, 20, 10, seed=1)
    with torch.no_grad():
        expected = student(other)
    assert np.allclose(_run(exported.path, {"input": other})[0], expected, atol=1e-5)


def test_a_batch_that_the_network_fixes_is_fixed_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Fixed(_Sized):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image).reshape(4, 3, -1).mean(2)

    images = IMAGES
    with caplog.at_level(logging.WARNING, "qakd_plugin"):
        exported = export_onnx(_prepared(Fixed(), images), images, tmp_path / "s.onnx")
    assert r"dimension 0 of 'input' (batch) is fixed to 4" in caplog.text
    assert _shapes(exported.path)["input"] == [4, 1, 16, 16]
    metadata = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    assert metadata["qakd.fixed"].startswith("dimension 0 of 'input' (batch) is fixed to 4")


@pytest.mark.parametrize("seen", [4, 2])  # the example's own size, and another
def test_what_a_network_keeps_for_the_shape_it_saw_last_does_not_fix_the_batch(
    seen: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Keeping(_Sized):
        shape: torch.Size | None = None
        columns = torch.empty(0)

        def forward(self, image: Tensor) -> Tensor:
            x = super().forward(image)
            if self.shape != x.shape:  # as detectors keep anchors
                self.shape, self.columns = x.shape, torch.arange(float(x.shape[3]))
            return x + self.columns

    student = _prepared(Keeping(), IMAGES)
    student(IMAGES[:seen])
    with caplog.at_level(logging.WARNING, "qakd_plugin"):
        exported = export_onnx(student, IMAGES, tmp_path / "s.onnx")
    assert "fixed" not in caplog.text
    assert isinstance(_shapes(exported.path)["input"][0], str)
    assert exported.parity.unfused.max_deviation < 1e-4
    other = _image(7, 1, 16, 16, seed=1)
    assert np.allclose(_run(exported.path, {"input": other})[0], student(other).detach(), atol=1e-4)
    assert student.shape == (7, 3, 8, 8)
    assert torch.equal(student.columns, torch.arange(8.0))  # and no tensor of the tracer


def test_a_size_baked_into_the_graph_is_found_at_a_second_size(tmp_path: Path) -> None:
    class Baked(_Sized):
        cells = 0

        def forward(self, image: Tensor) -> Tensor:
            x = super().forward(image)
            if not torch.compiler.is_exporting():
                self.cells = x.shape[2] * x.shape[3]  # a number for the tracer
            return x.sum((2, 3)) / self.cells

    student = _prepared(Baked(), IMAGES)
    assert export_onnx(student, IMAGES, tmp_path / "s.onnx").parity.unfused.top1 == 1
    with pytest.raises(ParityError, match=r"^logits: .* at height=8, width=8 and its export form differ"):
        export_onnx(student, IMAGES, tmp_path / "t.onnx", dynamic=SIZES)
    assert not (tmp_path / "t.onnx").exists()


def test_a_sample_alone_must_give_what_it_gives_in_a_batch(tmp_path: Path) -> None:
    class Normalized(_Pooled):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8, track_running_stats=False)

        def forward(self, image: Tensor) -> Tensor:
            return self.second(torch.relu(self.norm(self.first(image)))).mean((2, 3))

    torch.manual_seed(0)
    images = _image(4, 1, 16, 16) * torch.arange(1, 5).reshape(4, 1, 1, 1)
    student = _prepared(Normalized(), images)
    for count in (4, 1):
        with pytest.raises(ParityError, match=rf"for a sample alone .* in a batch of {max(count, 2)}: .*dynamic=\{{\}}"):
            export_onnx(student, images[:count], tmp_path / "s.onnx")
    assert export_onnx(student, images, tmp_path / "s.onnx", dynamic={}).parity.unfused.top1 == 1


class _Square(_Sized):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image + image.transpose(2, 3))


class _Positions(_Sized):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 1, 16, 16))

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image + self.positions)


class _Ignores(_Sized):
    def forward(self, image: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(image)


@functools.cache
def _student(network: type[nn.Module]) -> nn.Module:
    more = {_Masked: (IMAGES, IMAGES[:, 0]), _Ignores: (IMAGES, IMAGES)}
    return _prepared(network(), more.get(network, IMAGES))


@pytest.mark.parametrize(
    ("network", "inputs", "options", "message"),
    [
        (_Positions, IMAGES, {"dynamic": SIZES}, r"fixes dimension 2 of 'input' \(height\).*constant \(16\).*'height' out"),
        (_Square, IMAGES, {"dynamic": SIZES}, r"needs 'height' and 'width' .*equal. Give both one name"),
        (_Sized, IMAGES, {"dynamic": {"image": {2: "height"}}}, "there is no input 'image', the inputs are input"),
        (_Sized, IMAGES, {"dynamic": {"input": {4: "height"}}}, r"'input' has no dimension 4, its shape is \(4, 1, 16, 16\)"),
        (_Sized, IMAGES, {"dynamic": {"input": {1: "channels"}}}, "channels.* has size 1 .*at least 2"),
        (_Sized, IMAGES, {"dynamic": {"input": {2: 3}}}, r'needs a name such as "length", got 3'),
        (_Sized, IMAGES, {"dynamic": {"input": {0: "n", 2: "n"}}}, "both have the name 'n', but sizes 4 and 16"),
        (_Sized, IMAGES, {"input_names": ["a", "b"]}, "the model has 1 input, input. Give each a name"),
        (_Masked, (IMAGES, IMAGES[:, 0]), {"input_names": ["a", "a"]}, "'a' is there twice"),
        (_Masked, (IMAGES, IMAGES[:, 0]), {"output_names": ["a"]}, "the model has 3 outputs, heads.scores, heads.box, label"),
        (_Masked, (IMAGES, IMAGES[:, 0]), {"output_names": ["a", "b", "mask"]}, "'mask' is the name of an input and of an out"),
        (_Masked, {"image": IMAGES, "masks": IMAGES}, {}, "does not take the inputs image, masks.*takes image, mask"),
        (_Masked, (IMAGES, IMAGES[:, 0] * torch.nan), {}, "'mask' holds NaN"),
        (_Masked, (IMAGES, (IMAGES[:, 0] > 0.5).short()), {}, "'mask' is torch.int16, a type that TensorRT does not have"),
        (_Ignores, (IMAGES, IMAGES), {}, "does not read its input 'more'.*Leave it out"),
        (_Sized, "image", {}, "a tensor, a tuple of positional arguments or a mapping of keywords was expected, got str"),
        (_Sized, torch.tensor(1.0), {}, "no tensor with dimensions"),
    ],
)
def test_what_cannot_be_exported_is_named(
    network: type[nn.Module], inputs: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    student = _student(network)
    with pytest.raises(ExportError, match=message):
        export_onnx(student, inputs, tmp_path / "s.onnx", **options)
    assert not (tmp_path / "s.onnx").exists()


def test_a_float_model_is_written_likewise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = _Masked().eval()
    inputs = {"image": IMAGES, "mask": torch.ones(4, 16, 16, dtype=torch.bool)}
    sizes = {"image": {2: "height", 3: "width"}, "mask": {1: "height", 2: "width"}}
    path = export_float(network, inputs, tmp_path / "f.onnx", dynamic=sizes)
    assert _shapes(path)["mask"] == ["batch", "height", "width"]
    other = {name: tensor[:1, ..., :10, :12] for name, tensor in inputs.items()}
    with torch.no_grad():
        assert np.allclose(_run(path, other)[1], network(**other)["heads"]["box"], atol=1e-5)


@pytest.mark.parametrize("count", [1, 8])
def test_one_number_for_each_sample_has_the_range_of_all_samples(count, digits, tmp_path):
    """A sample alone has no range: its rounding would be infinitely large."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 1)).eval()
    student = prepare(net, [digits.test[0][:32]])
    for start in range(0, 24, 8):
        exported = export_onnx(student, digits.test[0][start : start + count], tmp_path / "s.onnx")
        assert exported.parity.runtime_deviation < 1e-4
