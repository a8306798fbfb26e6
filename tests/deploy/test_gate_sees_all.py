"""The gate sees what the model does: hooks of forward, layers of any name, equal and shared layers, every quantizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, weight_norm

from qakd_plugin import ParityError, QakdError, export_float, export_onnx, prepare
from qakd_plugin.deploy.canonical.graph import activation_quantizers
from qakd_plugin.deploy.canonical.labels import Call, calls_in, labels_of
from qakd_plugin.deploy.canonical.write import export_canonical
from qakd_plugin.deploy.parity.gate import check_parity
from qakd_plugin.toolkits import adapter_for

X = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TOOLKITS = ("modelopt", "torch_ao", "pt2e")


class _Named(nn.Module):
    """Two convolutions of any names, and a head."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({first: nn.Conv2d(1, 8, 3, padding=1), second: nn.Conv2d(8, 8, 3, padding=1)})
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def _float(first: str = "a", second: str = "b") -> nn.Module:
    torch.manual_seed(0)
    return _Named(first, second).eval()


@pytest.fixture(scope="module")
def prepared() -> dict[str, nn.Module]:
    return {toolkit: prepare(_float(), [X], toolkit) for toolkit in TOOLKITS}


def _normalised(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return ((args[0] - 0.5) / 0.25,)


def _changed(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return 2 * output + 1


def _outputs(file: Path) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": X.numpy()})[0])


def _deviation(model: nn.Module, file: Path) -> float:
    with torch.no_grad():
        expected = model(X)
    return float((_outputs(file) - expected).abs().max() / (expected.max() - expected.min()))


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_hooks_of_the_whole_model_are_in_the_file(toolkit, prepared, tmp_path):
    """Copies of a GraphModule lose them, and torch.export does not look at them."""
    model = copy.deepcopy(prepared[toolkit])
    plain = model(X)
    model.register_forward_pre_hook(_normalised)
    model.register_forward_hook(_changed)
    assert not torch.allclose(model(X), plain, atol=0.5)
    exported = export_onnx(model, X, tmp_path / "hooks.onnx")
    assert _deviation(model, exported.path) < 0.02  # ties alone


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao"])
def test_hooks_of_a_quantized_layer_are_in_the_file(toolkit, prepared, tmp_path):
    model = copy.deepcopy(prepared[toolkit])
    layer = model.get_submodule("layers.b")
    layer.register_forward_pre_hook(_normalised)
    layer.register_forward_hook(_changed)
    exported = export_onnx(model, X, tmp_path / "hooks.onnx")
    assert _deviation(model, exported.path) < 0.02


def test_hooks_of_a_float_graph_module_are_in_its_file(tmp_path):
    model = fx.symbolic_trace(_float())
    model.register_forward_hook(_changed)
    assert _deviation(model, export_float(model, X, tmp_path / "float.onnx")) < 1e-5


def test_a_toolkit_that_loses_a_hook_is_refused_where_the_hook_matters():
    """A layer that is fused with its ReLU becomes another module."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    shapes: list[torch.Size] = []
    model[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    assert adapter_for(prepare(model, [X], "torch_ao")).name == "torch_ao"
    model[0].register_forward_hook(_changed)
    with pytest.raises(QakdError, match=r"toolkit='torch_ao' loses a hook of 0, which changes what is computed"):
        prepare(model, [X], "torch_ao")


def _times_three(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, 3 * x)


def _replace_forward(module: nn.Module) -> None:
    module.forward = partial(_times_three, module)


ADDITIONS: dict[str, Callable[[nn.Module], object]] = {
    "orthogonal": lambda model: parametrizations.orthogonal(model.head),
    "weight norm": lambda model: parametrizations.weight_norm(model.layers["b"]),
    "weight norm of hooks": lambda model: weight_norm(model.layers["b"]),
    "forward of a layer": lambda model: _replace_forward(model.layers["b"]),
    "forward of the model": _replace_forward,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("toolkit", [*TOOLKITS, "torch_ao_eager"])
@pytest.mark.parametrize("added", ADDITIONS)
def test_what_was_added_to_a_module_is_prepared_or_refused(added, toolkit):
    """A toolkit puts a module of its own in the place of one, or reads the class where the object has more."""
    model = _float()
    ADDITIONS[added](model)
    with torch.no_grad():
        expected = model(X)
    try:
        found = prepare(model, [X], toolkit)
    except QakdError:
        # Refused of all toolkits: a weight that a hook computes. And torch.export traces the forward as one function.
        assert toolkit != "pt2e" or added in ("weight norm of hooks", "forward of the model")
        return
    with torch.no_grad():
        assert float((found(X) - expected).abs().max() / (expected.max() - expected.min())) < 0.02


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_layers_of_any_name_are_compared_as_those_of_plain_names(toolkit, prepared, tmp_path):
    odd = export_onnx(prepare(_float("a,b", "a#1%"), [X], toolkit), X, tmp_path / "odd.onnx").parity
    plain = export_onnx(prepared[toolkit], X, tmp_path / "plain.onnx").parity
    assert (odd.weight_codes, odd.activation_codes) == (plain.weight_codes, plain.activation_codes)


@pytest.mark.parametrize("name", ["c@1", 'a"b', "a\\b"])
def test_a_name_that_torch_export_cannot_keep_is_refused_and_its_layer_not_left_in_floating_point(name):
    with pytest.raises(QakdError, match="has @, a double quote or a backslash in its name: give it another"):
        prepare(_float("a", name), [X], "pt2e")


@pytest.mark.parametrize("call", [Call("a.input_qdq", 0), Call("a,b#1%2C.input_qdq", 3), Call("#", 1), Call("%", 0)])
def test_a_label_is_read_as_it_was_written(call):
    assert list(calls_in(f"first,{call},last#2")) == [Call("first", 0), call, Call("last", 2)]


class _Alike(nn.Module):
    """Small layers that are tied, equal, and one and the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.equal, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.tied.weight = self.first.weight
        self.equal.load_state_dict(self.first.state_dict())
        self.same = self.equal
        self.enter = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.flatten(1))
        for layer in (self.first, self.tied, self.equal, self.same, self.head):
            x = layer(torch.relu(x))
        return x


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_equal_and_shared_layers_are_each_compared(toolkit, tmp_path):
    torch.manual_seed(0)
    parity = export_onnx(prepare(_Alike().eval(), [X], toolkit), X, tmp_path / "alike.onnx").parity
    one, enter = 8 * 8, 64 * 8
    assert parity.weight_codes == enter + (3 if toolkit == "pt2e" else 4) * one  # PT2E stores a tied weight once


@pytest.fixture(scope="module")
def proof(prepared) -> tuple[ir.Model, nn.Module, nn.Module]:
    student = prepared["modelopt"]
    form = adapter_for(student).export_form(student)
    return export_canonical(form, X), form, student


def test_a_quantizer_that_the_file_lacks_is_named(proof):
    file, form, student = proof
    assert check_parity(file, form, student, X, fused=False).activation_codes > 0
    quantize = next(node for node in activation_quantizers(file.graph) if labels_of(node).startswith("layers.b"))
    labels = quantize.metadata_props.pop("qakd.quantizer")
    try:
        with pytest.raises(ParityError, match=r"^layers\.b\.input_qdq: the exported file .* lacks this quantizer") as caught:
            check_parity(file, form, student, X, fused=False)
    finally:
        quantize.metadata_props["qakd.quantizer"] = labels
    assert caught.value.layer == "layers.b.input_qdq"


class _Unused(_Named):
    """A layer is called, and what it outputs thrown away."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layers["a"](x))
        self.layers["b"](x)
        return self.head(x.mean((2, 3)))


def test_a_quantizer_that_no_output_depends_on_need_not_be_in_the_file(tmp_path):
    torch.manual_seed(0)
    model = prepare(_Unused("a", "b").eval(), [X], keep=[])
    model.get_submodule("layers.b").weight_quantizer.disable()
    exported = export_onnx(model, X, tmp_path / "unused.onnx")
    assert _deviation(model, exported.path) < 0.02
