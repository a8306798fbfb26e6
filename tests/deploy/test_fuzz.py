"""Random small networks go the whole way: prepared, canonical ONNX, ONNX Runtime's form, each proven exact; RTX builds.

``make test`` runs 40 of them, always the same; ``make fuzz`` runs 500 new ones and shrinks what fails.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qakd_plugin import DoReFa, build_engine, prepare, use_quantizers
from qakd_plugin.bench.census import census
from qakd_plugin.deploy.canonical.clamps import quantizers_after_relu
from qakd_plugin.deploy.canonical.write import export_canonical, to_proto
from qakd_plugin.deploy.parity.gate import check_parity
from qakd_plugin.deploy.targets.onnxruntime import to_onnxruntime_form
from qakd_plugin.deploy.targets.openvino import to_openvino_form
from qakd_plugin.toolkits import adapter_for

SIZE = 16


@dataclass(frozen=True)
class Convolution:
    """Of a network's body; ``kind`` says how it is wired."""

    kind: str
    channels: int
    kernel: int
    stride: int
    dilation: int
    grouped: bool
    batch_norm: bool
    bias: bool
    activation: str


@dataclass(frozen=True)
class Plan:
    """A network, and how it is quantized; layer number ``keep`` stays in floating point.

    With ``unsigned_bytes`` it is prepared a second time, for ONNX Runtime and OpenVINO alone.
    """

    body: tuple[Convolution | str, ...]
    head: str
    toolkit: str
    weight_bits: int
    activation_bits: int
    seed: int
    keep: int | None
    unsigned_bytes: bool


convolutions = st.builds(
    Convolution,
    kind=st.sampled_from(["plain", "residual", "concat", "shared", "transposed"]),
    channels=st.sampled_from([4, 6, 16]),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 1, 2]),
    dilation=st.sampled_from([1, 1, 2]),
    grouped=st.booleans(),
    batch_norm=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(["none", "relu", "relu6", "hardswish"]),
)
plans = st.builds(
    Plan,
    body=st.lists(convolutions | st.sampled_from(["max_pool", "average_pool"]), min_size=1, max_size=3).map(tuple),
    head=st.sampled_from(["pool", "flatten", "hidden", "mean"]),
    toolkit=st.sampled_from(["modelopt", "torch_ao"]),
    weight_bits=st.integers(1, 8),
    activation_bits=st.integers(2, 8),
    seed=st.integers(0, 2**16),
    keep=st.none() | st.integers(0, 9),
    unsigned_bytes=st.booleans(),
)


def _activation(name: str) -> nn.Module:
    return {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish}[name]()


def _convolution(
    inputs: int, outputs: int, step: Convolution, kernel: int | None = None, stride: int | None = None
) -> nn.Module:
    kernel, stride = kernel or step.kernel, stride or step.stride
    groups = 1
    if step.grouped:
        groups = inputs if inputs == outputs else 2
    padding = step.dilation * (kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, step.dilation, groups, bias=step.bias)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs)) if step.batch_norm else layer


class Wired(nn.Module):
    """One or two convolutions and how they are put together."""

    def __init__(self, inputs: int, step: Convolution) -> None:
        super().__init__()
        self.kind = step.kind
        outputs = inputs if step.kind in {"residual", "shared"} else step.channels
        stride = 1 if step.kind in {"residual", "shared"} else step.stride
        if step.kind == "transposed":
            self.first: nn.Module = nn.ConvTranspose2d(inputs, outputs, 2, 2, bias=step.bias)
        else:
            self.first = _convolution(inputs, outputs, step, step.kernel, stride)
        self.second = _convolution(inputs, outputs, step, 1, stride) if step.kind == "concat" else nn.Identity()
        self.activation, self.again = _activation(step.activation), _activation(step.activation)
        self.channels = 2 * outputs if step.kind == "concat" else outputs

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "residual":
            return self.activation(self.first(x) + x)
        if self.kind == "concat":
            return self.again(torch.cat([self.activation(self.first(x)), self.second(x)], 1))
        if self.kind == "shared":
            return self.again(self.first(self.activation(self.first(x))))
        return self.activation(self.first(x))


class Network(nn.Module):
    """What a plan describes; (N, 3, 16, 16) images."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        channels, layers = 4, [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()]
        for step in plan.body:
            if isinstance(step, str):
                layers.append(nn.MaxPool2d(3, 2, 1) if step == "max_pool" else nn.AvgPool2d(2, ceil_mode=True))
            else:
                layers.append(Wired(channels, step))
                channels = layers[-1].channels
        self.body, self.head = nn.Sequential(*layers), plan.head
        self.pool = nn.AdaptiveAvgPool2d(2 if plan.head == "flatten" else 1)
        features = 4 * channels if plan.head == "flatten" else channels
        self.hidden = nn.Linear(features, 12) if plan.head == "hidden" else nn.Identity()
        self.logits = nn.Linear(12 if plan.head == "hidden" else features, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x.mean([2, 3]) if self.head == "mean" else self.pool(x).flatten(1)
        if self.head == "hidden":
            x = F.gelu(self.hidden(x))
        return self.logits(x)


def _settled(plan: Plan) -> tuple[nn.Module, Tensor]:
    """With random weights, negative gammas too, and BatchNorm statistics that fit."""
    torch.manual_seed(plan.seed)
    model, images = Network(plan).train(), torch.rand(16, 3, SIZE, SIZE) - 0.3
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(12):
            model(images)
    return model.eval(), images


def _is_dead(model: nn.Module, images: Tensor) -> bool:
    """Whether some layer puts out nothing but zeros: there is no scale for that, and prepared models say so."""
    zeros: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: zeros.append(name) if not out.any() else None)
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return bool(zeros)


def run_plan(plan: Plan, folder) -> None:
    """All the way; whatever is wrong raises."""
    model, images = _settled(plan)
    if _is_dead(model, images):
        return
    canonical, rewritten = _proven(plan, model, images, "tensorrt")
    (folder / "ort.onnx").write_bytes(to_proto(rewritten).SerializeToString())
    assert census(folder / "ort.onnx").total > 0
    (folder / "canonical.onnx").write_bytes(to_proto(canonical).SerializeToString())
    engine = build_engine(
        folder / "canonical.onnx", folder / "net.engine", "tensorrt_rtx", opt_batch=1, max_batch=2, capabilities=["SM89"]
    )
    assert engine.path.stat().st_size > 0
    if plan.unsigned_bytes:
        _proven(plan, model, images, "onnxruntime")


def _proven(plan: Plan, model: nn.Module, images: Tensor, target: str) -> tuple[ir.Model, ir.Model]:
    """The canonical form and ONNX Runtime's, which compute what was prepared; and so does OpenVINO's."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    student = prepare(
        model,
        [images[:8], images[8:]],
        plan.toolkit,
        weight_bits=max(plan.weight_bits, 2),
        activation_bits=plan.activation_bits,
        keep=() if plan.keep is None else (layers[plan.keep % len(layers)],),
        target=target,
    )
    if plan.weight_bits == 1:
        use_quantizers(student, DoReFa(weight_bits=1), calibration_batches=[images])
    adapter = adapter_for(student)
    adapter.set_mode(student, False)
    form = adapter.export_form(student)
    canonical = export_canonical(form, images)
    adapter.freeze_ranges(student, True)
    check_parity(canonical, form, student, images, fused=False)
    rewritten = to_onnxruntime_form(canonical)
    moved = quantizers_after_relu(canonical.graph)
    assert check_parity(rewritten, form, student, images, fused=True, after_relu=moved).activation_codes > 0
    check_parity(to_openvino_form(canonical), form, student, images, fused=False, after_relu=moved)
    return canonical, rewritten


_common = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@settings(max_examples=8, derandomize=True, database=None, **_common)
@given(plans)
def test_eight_fixed_networks_go_all_the_way(tmp_path_factory, plan):
    run_plan(plan, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.fuzz
@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "500")), **_common)
@given(plans)
def test_random_networks_go_all_the_way(tmp_path_factory, plan):
    run_plan(plan, tmp_path_factory.mktemp("fuzz"))
