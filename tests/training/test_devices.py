"""What holds on every device: nothing waits for it within a step, networks go back where they came from, numbers are alike.

On machines without a GPU the meta device stands for one: it computes shapes, and raises where the host looks at a value.
"""

import contextlib
import copy
import os
from functools import partial

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qakd_plugin import (
    EWGS,
    LSQ,
    PACT,
    SQAKD,
    CMISelector,
    Features,
    QakdError,
    attach,
    default_batch,
    distill,
    export_onnx,
    prepare,
    use_quantizers,
)
from qakd_plugin._common.device import move
from qakd_plugin.augment import data as augment_data
from qakd_plugin.augment.candidates import resolve_candidates
from qakd_plugin.augment.selector import FixedAugmentation, SelectedAugmentation
from qakd_plugin.placement.calibration import RangeObserver, _counted
from qakd_plugin.quantizers import compiled as kernels
from qakd_plugin.quantizers.fake_quantize import fake_quantize
from qakd_plugin.toolkits import adapter_for

GPU = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
DEVICES = ["cpu", GPU]
FILES = ("torch_ao", "pt2e", "modelopt")
SGD = partial(torch.optim.SGD, momentum=0.9)


class Net(nn.Module):
    """Convolutions, BatchNorm, a linear layer, and tensors made on the way; (N, 3, 8, 8) images."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.pool, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        ramp = torch.arange(8, dtype=x.dtype, device=x.device).reshape(1, 8, 1, 1)
        return self.fc(self.pool(self.second(x) + ramp / 8).flatten(1))


@pytest.fixture(scope="module")
def x():
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def student(net, x):
    """A prepared student of ``net``, each call another copy: ``student("pt2e", LSQ())``."""
    made = {}

    def make(toolkit="modelopt", quantizers=None):
        if toolkit not in made:
            made[toolkit] = prepare(net, [x], toolkit, weight_bits=8, activation_bits=8)
        found = copy.deepcopy(made[toolkit])
        return found if quantizers is None else use_quantizers(found, quantizers)

    return make


class _Reads(TorchDispatchMode):
    """Counts looks of the host at a value of a tensor, and copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.devices, self.crossings = [], 0

    @property
    def count(self):
        return len(self.devices)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.devices.append(args[0].device.type)
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.crossings += out.device != args[0].device
        elif func is torch.ops.aten.index.Tensor:
            self.crossings += any(index is not None and index.device != args[0].device for index in args[1])
        return out


def _to_meta_but_flags(network):
    """Flags of quantizers are read once after a move, and then no more: here they are as read already."""
    flags = {name: buffer for name, buffer in network.named_buffers() if name.endswith("fake_quant_enabled")}
    move(network, "meta")
    for name, flag in flags.items():
        owner, _, own = name.rpartition(".")
        network.get_submodule(owner)._buffers[own] = flag


@pytest.mark.parametrize(
    ("toolkit", "quantizers", "method"),
    [
        ("modelopt", LSQ(), SQAKD(features=Features(["fc"], through_quantizer=True))),
        ("modelopt", PACT(), SQAKD()),
        ("torch_ao", EWGS(), SQAKD()),
        ("pt2e", LSQ(), SQAKD(features=Features(["fc"], through_quantizer=True))),
    ],
    ids=["modelopt-LSQ", "modelopt-PACT", "torch_ao-EWGS", "pt2e-LSQ"],
)
def test_the_host_looks_at_no_value_within_a_step(toolkit, quantizers, method, student, net, x, monkeypatch):
    pupil, teacher = student(toolkit, quantizers), copy.deepcopy(net)
    with attach(pupil, teacher, method) as kd:
        kd.train()

        def step(images):
            optimizer = SGD(pupil.parameters(), lr=1e-3)
            pupil(images)
            kd.loss().backward()
            torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        step(x)  # what is checked once
        _to_meta_but_flags(pupil)
        move(teacher, "meta")
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta knows none
        with _Reads() as reads:
            step(x.to("meta"))
    assert reads.count == 0


@pytest.mark.parametrize("toolkit", ["torch_ao", "pt2e"])
def test_a_flag_is_read_again_once_somebody_wrote_to_it(toolkit, student, x):
    """Also in a copy made between the writing and the reading."""
    pupil = student(toolkit, LSQ(weight_bits=2, activation_bits=2))
    adapter = adapter_for(pupil)
    quantized = pupil(x)
    flags = [q.module.fake_quant_enabled for q in adapter.quantizers(pupil)]
    adapter.set_fake_quant(pupil, False)
    copied = copy.deepcopy(pupil)
    floating = pupil(x)
    assert not torch.allclose(quantized, floating)
    torch.testing.assert_close(copied(x), floating)
    for flag in flags:
        flag.fill_(1)
    torch.testing.assert_close(pupil(x), quantized)
    state = pupil.state_dict()
    pupil.load_state_dict({name: torch.zeros_like(v) if "fake_quant_enabled" in name else v for name, v in state.items()})
    torch.testing.assert_close(pupil(x), floating)


@pytest.mark.parametrize("delta", [None, 0.3], ids=["straight-through", "EWGS"])
@pytest.mark.parametrize(("shape", "shift"), [((), 0.0), ((6, 1, 1, 1), 3.5)], ids=["per-tensor", "per-channel"])
def test_a_compiled_quantizer_has_the_gradients_of_one_that_is_not(shape, shift, delta):
    generator = torch.Generator().manual_seed(0)
    data, steps = torch.randn(6, 5, 7, 3, generator=generator), torch.rand(shape, generator=generator) * 0.2 + 0.1

    def quantized(own, scale):
        strength = None if delta is None else torch.tensor(delta)
        return fake_quantize(own, scale, -3.5 if shift else -4, 3.5 if shift else 3, shift=shift, delta=strength)

    found = []
    for call in (quantized, torch.compile(quantized, backend="eager", fullgraph=True)):
        own, scale = (tensor.clone().requires_grad_() for tensor in (data, steps))
        out = call(own, scale)
        out.backward(torch.cos(data))
        found.append((out.detach(), own.grad, scale.grad))
    torch.testing.assert_close(*found)


def test_a_compiled_student_has_the_gradients_of_one_that_is_not(student, net, x):
    """In training, where a graph that ended between BatchNorm and its convolution would find its statistics changed."""
    gradients = []
    for compiled in (False, True):
        pupil = student("pt2e", LSQ(4, 4))
        called = torch.compile(pupil, backend="aot_eager") if compiled else pupil
        with attach(called, copy.deepcopy(net), SQAKD()) as kd:
            kd.train()
            called(x)
            kd.loss().backward()
        gradients.append([p.grad for p in pupil.parameters() if p.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chosen", [None, "cutmix", "randomerasing+cutmix"])
def test_the_host_looks_at_no_value_of_augmented_images(chosen, x):
    """Nor does anything travel to the device: images, labels, and what they are normalised with are there."""
    stats = ([0.5, 0.4, 0.3], [0.2, 0.2, 0.3])
    augmentation = FixedAugmentation(lambda images: images.flip(3), stats)
    judges = [augmentation.unit_range._extremes]
    if chosen is not None:
        augmentation = SelectedAugmentation(CMISelector(), [], default_batch, stats)
        (augmentation.chosen,), augmentation.classes = resolve_candidates([chosen]), 10
        augmentation._extremes = augmentation.chosen.extremes()
        judges = [augmentation.unit_range._extremes, augmentation._extremes]
    for extremes in judges:  # as a first batch leaves them
        extremes._seen = torch.zeros((), device="meta"), torch.ones((), device="meta")
    augmentation.unit_range._there = [values.to("meta") for values in augmentation.unit_range._stats]
    with _Reads() as reads:
        images, _ = augmentation(x.to("meta"), torch.zeros(16, dtype=torch.int64, device="meta"))
    assert images.device.type == "meta"
    assert reads.crossings == 1, "the test's own"
    assert set(reads.devices) <= {"cpu"}, "draws are the host's own"


def test_images_out_of_range_after_the_first_batch_are_refused_at_the_end_of_the_epoch(monkeypatch):
    monkeypatch.setattr(augment_data, "_is_read_at_once", lambda _: False)
    augmentation = FixedAugmentation(lambda images: images, None)
    good = torch.full((2, 3, 4, 4), 0.5)
    augmentation(good, None)
    assert augmentation(good * 4, None)[0].max() == 1, "clamped until then"
    with pytest.raises(QakdError, match=r"in 0.5..2.*input_stats"):
        augmentation.row()
    with pytest.raises(QakdError, match="input_stats"):
        FixedAugmentation(lambda images: images, None)(good * 4, None)  # the first at once


def test_what_a_captured_graph_makes_goes_where_the_network_goes(net, x):
    captured = torch.export.export(net, (x,)).module()
    expected = captured(x)
    there = copy.deepcopy(captured)
    move(there, "meta")
    assert there(x.to("meta")).device.type == "meta"
    move(captured, "cpu")
    assert torch.equal(captured(x), expected)


def test_counting_without_floats_is_the_histogram():
    values = torch.rand(50_000, generator=torch.Generator().manual_seed(0)).square() * 3
    found, expected = _counted(values, 3.0), torch.histc(values.double(), bins=2048, min=0.0, max=3.0)
    assert found.sum() == len(values)
    assert (found - expected).abs().sum() <= 20  # values on the edge of a bin, in two precisions
    assert _counted(torch.full((3,), 3.0), 3.0)[-1] == 3


def _by_autograd(x, scale, low, high, delta):
    """Straight-through or EWGS in elementary operations, float64: value, and gradients of x and scale for ``g = cos(x)``."""
    x, scale = x.double().cpu().requires_grad_(), scale.double().cpu().requires_grad_()
    v = x / scale
    clipped = v.clamp(low, high)
    out = (clipped + (clipped.round() - clipped).detach()) * scale
    g = torch.cos(x.detach())
    out.backward(g)
    if delta is None:
        return out.detach(), x.grad, scale.grad
    error = (clipped - clipped.round()).detach() / (high - low)
    stretched = (g + delta * g.abs() * error) * ((v > low) & (v < high))
    # Of the step: g times the code outside, and inside the code minus what the value would have been.
    inside = (v > low) & (v < high)
    of_scale = (g * clipped.round() - torch.where(inside, stretched * v, 0)).sum_to_size(scale.shape)
    return out.detach(), stretched, of_scale.detach()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("delta", [None, 0.3], ids=["straight-through", "EWGS"])
@pytest.mark.parametrize("shape", [(), (6, 1, 1, 1)], ids=["per-tensor", "per-channel"])
def test_a_quantizer_computes_on_each_device_what_float64_does(device, delta, shape):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(6, 5, 7, 3, generator=generator)
    steps = torch.rand(shape, generator=generator) * 0.2 + 0.1
    data = (data / steps).round() * steps + 0.3 * steps * torch.rand(data.shape, generator=generator)  # off the ties
    own, scale = (tensor.detach().clone().to(device).requires_grad_() for tensor in (data, steps))
    out = fake_quantize(own, scale, -4, 3, delta=None if delta is None else torch.tensor(delta, device=device))
    out.backward(torch.cos(own.detach()))
    for found, expected in zip((out, own.grad, scale.grad), _by_autograd(data, steps, -4, 3, delta), strict=True):
        torch.testing.assert_close(found.detach().cpu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_networks_come_back_to_their_device_and_the_teacher_with_its_bits(device, precision, student, net, x):
    pupil, teacher = student("modelopt", LSQ(4, 4)).to(device), copy.deepcopy(net).to(device)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    result = distill(pupil, teacher, [x, x], epochs=1, seed=0, mixed_precision=precision)
    for network in (result.model, teacher):
        assert {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]} == {device}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in result.history)


class _Stop(Exception):
    pass


class _StopAt:
    def __init__(self, step):
        self.step = step

    def on_step_end(self, step, losses):
        if step == self.step:
            raise _Stop


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(device, student, net, x, tmp_path):
    def run(folder, **options):
        pupil = student("pt2e", LSQ(4, 4)).to(device)
        return distill(pupil, copy.deepcopy(net), [x, x + 1, x - 1], epochs=2, seed=0, checkpoint_dir=folder, **options)

    whole = run(tmp_path / "whole").model.state_dict()
    with pytest.raises(_Stop):
        run(tmp_path / "cut", checkpoint_every=1, callbacks=[_StopAt(5)])
    found = run(tmp_path / "cut", checkpoint_every=1, resume=True).model.state_dict()
    different = [name for name, value in whole.items() if not torch.equal(value, found[name])]
    assert not different


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.usefixtures("_deterministic")
class TestOnAGpu:
    @pytest.mark.parametrize("toolkit", FILES)
    def test_gradients_are_those_of_the_cpu(self, toolkit, student, net, x):
        pupil = student(toolkit, LSQ(4, 4))
        found = {}
        for device in ("cpu", "cuda"):
            own, teacher = copy.deepcopy(pupil), copy.deepcopy(net).to(device)
            move(own, device)
            with attach(own, teacher, SQAKD()) as kd:
                kd.eval()
                own(x.to(device))
                kd.loss().backward()
            found[device] = torch.cat([p.grad.flatten().cpu() for p in own.parameters() if p.grad is not None])
        assert F.cosine_similarity(found["cpu"], found["cuda"], dim=0) > 0.99  # a few values lie on the other side of a tie

    @pytest.mark.parametrize("toolkit", FILES)
    def test_nothing_waits_within_a_step(self, toolkit, student, net, x):
        pupil, teacher, images = student(toolkit, LSQ(4, 4)), copy.deepcopy(net).cuda(), x.cuda()
        move(pupil, "cuda")
        optimizer = SGD(pupil.parameters(), lr=1e-3)
        with attach(pupil, teacher, SQAKD()) as kd:
            kd.train()
            for mode in ("default", "error"):
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    pupil(images)
                    kd.loss().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                finally:
                    torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("toolkit", FILES)
    def test_a_file_has_the_bytes_of_one_written_from_the_cpu(self, toolkit, student, x, tmp_path):
        pupil = student(toolkit, LSQ(4, 4))
        on_gpu = copy.deepcopy(pupil)
        move(on_gpu, "cuda")
        for model, name in ((pupil, "cpu"), (on_gpu, "gpu")):
            export_onnx(model, x, tmp_path / f"{name}.onnx")
        assert (tmp_path / "cpu.onnx").read_bytes() == (tmp_path / "gpu.onnx").read_bytes()

    @pytest.mark.parametrize("toolkit", FILES)
    def test_a_network_on_the_gpu_is_prepared_there(self, toolkit, net, x):
        prepared = prepare(copy.deepcopy(net).cuda(), [x.cuda()], toolkit)
        assert prepared(x.cuda()).device.type == "cuda"
        result = distill(use_quantizers(prepared, LSQ()), copy.deepcopy(net).cuda(), [x, x], epochs=1, seed=0)
        assert next(result.model.parameters()).device.type == "cuda"

    def test_ranges_are_the_same_each_time_and_those_of_the_cpu(self):
        values = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
        clips = []
        for device in ("cpu", "cuda", "cuda"):
            observer = RangeObserver()
            observer.observe(values.to(device))
            clips.append(observer.best_clip(7))
        assert clips[1] == clips[2] == pytest.approx(clips[0], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_quantizers_take_the_same_steps(device, student, net, x, monkeypatch):
    monkeypatch.setattr(kernels, "_SMALLEST", 256)
    ran, kernel = [], kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *args, **options: ran.append(1) or kernel(*args, **options))
    options = {"epochs": 1, "seed": 0, "lr": 1e-3, "optimizer": SGD, "grad_clip": None}
    runs = [distill(student("modelopt", LSQ()), net, [x] * 2, compile_quantizers=choice, **options) for choice in (False, True)]
    assert ran
    assert not kernels.are_on()
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_quantizers_are_refused_where_none_is_learned(student, net, x):
    with pytest.raises(
        QakdError, match=r"the prepared model has none. Call qakd.use_quantizers\(prepared_model, qakd.LSQ\(\)\)"
    ):
        distill(student("modelopt"), net, [x], epochs=1, compile_quantizers=True)
