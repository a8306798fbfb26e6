"""What the gate is made of: outputs compared one by one, codes imposed, errors that name the place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from qakd_plugin import ExportError, ParityError, export_onnx, prepare
from qakd_plugin.deploy.canonical.write import export_canonical
from qakd_plugin.deploy.parity.gate import check_parity
from qakd_plugin.deploy.parity.imposed_codes import imposed_codes
from qakd_plugin.deploy.parity.onnxruntime import run
from qakd_plugin.deploy.parity.recorded_codes import run_prepared
from qakd_plugin.deploy.parity.report import arrays, deviations, largest_deviation
from qakd_plugin.toolkits import adapter_for


class _Tree(nn.Module):
    """Outputs in a tree, two of them made by no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, object]:
        logits = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return {"logits": logits, "more": [logits.abs(), (logits.square() + 1.0, logits.argmax(1))]}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _prepared(network: type[nn.Module], images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return prepare(network().eval(), [images])


def test_the_output_that_differs_is_named_wherever_it_stands_in_a_tree(images: Tensor) -> None:
    student = _prepared(_Tree, images)
    form = adapter_for(student).export_form(student)
    file = export_canonical(form, images)
    assert check_parity(file, form, student, images, fused=True).unfused.top1 == 1.0
    add = next(node for node in file.graph if node.op_type == "Add" and node.outputs[0].is_graph_output())
    one = ir.tensor(np.float32(1.5), name="one")
    value = ir.Value(name="one", const_value=one)
    file.graph.register_initializer(value)
    add.replace_input_with(1, value)
    with pytest.raises(ParityError, match=r"^more\.1\.0: .* of the range of more\.1\.0 although all .*comes after") as caught:
        check_parity(file, form, student, images, fused=False)
    assert caught.value.layer == "more.1.0"


class _SameTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.cat([self.again(x), self.again(x).relu()], 1).mean((2, 3)))


def test_a_layer_called_twice_with_one_input_is_one_in_the_file(images: Tensor, tmp_path: Path) -> None:
    """Its two quantizers are merged by the exporter."""
    student = _prepared(_SameTwice, images)
    exported = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime")
    labels = [
        entry.value
        for node in onnx.load(exported.path).graph.node
        for entry in node.metadata_props
        if entry.key == "qakd.quantizer" and entry.value.startswith("again")
    ]
    assert labels == ["again.input_qdq", "again.output_qdq"]


def test_a_call_with_another_input_than_the_one_recorded_differs(images: Tensor) -> None:
    student = _prepared(_SameTwice, images)
    form = adapter_for(student).export_form(student)
    _, codes = run_prepared(student, form, images)
    codes["again.input_qdq"] = codes["again.input_qdq"][:1]
    with imposed_codes(form, codes, 0.01) as outcome, torch.no_grad():
        form(images)
    outcome.raise_first("one", "the other")
    codes["again.input_qdq"][0] = codes["again.input_qdq"][0][:, :, ::-1].copy()
    with imposed_codes(form, codes, 0.01) as outcome, torch.no_grad():
        form(images)
    with pytest.raises(ParityError, match=r"^again\.input_qdq: one and the other quantize differently: \d+ of"):
        outcome.raise_first("one", "the other")
    codes["again.input_qdq"][0] = codes["again.input_qdq"][0][:3]
    with imposed_codes(form, codes, 0.01) as outcome, torch.no_grad():
        form(images)
    with pytest.raises(ParityError, match=r"^again\.input_qdq: .*codes of shape \(3, 4, 6, 6\) and \(16, 4, 6, 6\)"):
        outcome.raise_first("one", "the other")


def _file(node: onnx.NodeProto, *initializers: onnx.TensorProto) -> ir.Model:
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))


@pytest.mark.parametrize("fusions", [False, True])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            _file(helper.make_node("Frob", ["input"], ["y"], name="odd/Frob", domain="nowhere")),
            "ONNX Runtime cannot load .*nowhere:Frob",
        ),
        (
            _file(
                helper.make_node("Reshape", ["input", "shape"], ["y"], name="view/Reshape"),
                numpy_helper.from_array(np.array([-1, 7]), "shape"),
            ),
            "^view/Reshape: ONNX Runtime cannot run what was exported, so it cannot be proven: ",
        ),
    ],
)
def test_what_the_runtime_cannot_take_is_one_line_that_says_where(file: ir.Model, message: str, fusions: bool) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        run(file, torch.zeros(2, 3), fusions=fusions)
    assert "\n" not in str(caught.value)


def test_an_operator_without_a_kernel_is_named() -> None:
    """ONNX has it for float64, the runtime has not."""
    atan = helper.make_node("Atan", ["wide"], ["y"], name="odd.angle/Atan")
    file = _file(atan, numpy_helper.from_array(np.array([1.0]), "wide"))
    file.graph.outputs[0].dtype = ir.DataType.DOUBLE
    with pytest.raises(ExportError, match=r"^odd\.angle/Atan: ONNX Runtime cannot load what was exported.*Atan\(7\)"):
        run(file, torch.zeros(2, 3), fusions=False)


def test_deviations_are_those_of_each_output_over_its_own_range() -> None:
    expected = [np.array([0.0, 10.0], np.float32), np.array([[1.0], [2.0]], np.float32), np.zeros((0, 2), np.float32)]
    actual = [np.array([0.0, 11.0], np.float32), np.array([[1.0], [2.5]], np.float32), np.zeros((0, 2), np.float32)]
    assert deviations(actual, expected) == pytest.approx([0.1, 0.5, 0.0])
    assert largest_deviation(actual, expected) == pytest.approx(0.5)
    assert deviations([actual[0], actual[1].T, actual[2]], expected)[1] == float("inf")
    assert deviations(actual[:2], expected) == [float("inf")] * 3
    actual[0][1] = np.nan
    assert np.isnan(largest_deviation(actual, expected)), "not a number agrees with nothing"


def test_an_output_that_hardly_varies_is_held_to_what_float32_resolves():
    expected = np.array([0.5, 0.50001], np.float32)  # a ten-thousandth of their range is far below a unit in the last place
    one_unit_up = np.nextafter(expected, np.float32(1))
    assert (one_unit_up - expected).max() > 1e-4 * np.ptp(expected)
    assert deviations([one_unit_up], [expected]) == [0.0]
    assert deviations([expected + np.float32(1e-6)], [expected])[0] > 1e-2
    around_zero = np.array([0.0, 1.0], np.float32)
    assert deviations([around_zero + np.float32(1e-5)], [around_zero])[0] == pytest.approx(1e-5, rel=0.1)


def test_all_tensors_of_a_tree_are_outputs() -> None:
    tree = {"a": torch.ones(2, 1), "b": [torch.tensor([1, 2]), (None, "text", torch.tensor([True]))]}
    assert [array.tolist() for array in arrays(tree)] == [[[1.0], [1.0]], [1.0, 2.0], [1.0]]
