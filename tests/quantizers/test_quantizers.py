"""Every quantizer computes what its paper's formulas say, forward and backward."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from qakd_plugin import EWGS, LSQ, PACT, DoReFa, QakdError
from qakd_plugin.quantizers import fake_quantize as module
from qakd_plugin.quantizers import refresh_delta, remove_tensors, rule_from_dict
from qakd_plugin.quantizers.fake_quantize import discretize, fake_quantize

BITS = [2, 3, 4, 8]


def half_even(v):
    return np.rint(v)


def activation_reference(x, g, scale, low, high, *, learns, delta, decay):
    """Output, gradient of x, gradient of the scale: element by element, in float64."""
    out, grad_x, grad_scale = np.empty_like(x), np.empty_like(x), 0.0
    for i, (value, upstream) in enumerate(zip(x, g, strict=True)):
        v = value / scale
        clipped = min(max(v, low), high)
        code = half_even(clipped)
        out[i] = code * scale
        inside = low < v < high
        scaled = upstream + delta * abs(upstream) * (clipped - code) / (high - low)
        grad_x[i] = scaled if inside else 0.0
        if learns == "step":  # d(s code)/ds: the code itself, and through v where it is not clipped
            grad_scale += upstream * code - (scaled * v if inside else 0.0)
        elif learns == "clip" and not inside:
            grad_scale += upstream * (high if v >= high else low)
    if learns == "clip":
        grad_scale += decay * (scale * high) * high
    return out, grad_x, grad_scale


def special_values(scale, low, high):
    """Ties, bounds, saturation, zero, and values in between."""
    codes = np.concatenate([np.arange(low - 2, high + 3), np.arange(low - 2, high + 2) + 0.5])
    generator = np.random.default_rng(0)
    return np.concatenate([codes * scale, generator.normal(0, 0.6 * (high - low), 200) * scale, [0.0]])


ACTIVATIONS = [
    pytest.param(LSQ(), id="LSQ"),
    pytest.param(PACT(alpha_decay=0.01), id="PACT"),
    pytest.param(DoReFa(), id="DoReFa"),
    pytest.param(EWGS(delta=0.0), id="EWGS-STE"),
    pytest.param(EWGS(delta=0.7), id="EWGS"),
]


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("bits", [1, *BITS])
@pytest.mark.parametrize("config", ACTIVATIONS)
def test_activations_equal_the_formulas_in_float64(config, bits, unsigned):
    if bits == 1 and not unsigned:
        with pytest.raises(QakdError, match="activation_bits=1"):
            config.activation_rule(bits, unsigned)
        return
    rule = config.activation_rule(bits, unsigned)
    low, high = rule.codes
    scale = 0.25  # a power of two: ties and bounds are exact in float32 as well
    holder = nn.Module()
    rule.install(holder, torch.tensor(scale * high))
    scale = float(holder.qakd_log_scale.detach().exp().double())
    assert scale == pytest.approx(0.25, rel=1e-6)
    if abs(scale - 0.25) > 0:  # exp(log(s)) may miss by one unit in the last place
        holder.qakd_log_scale.data.add_(math.log(0.25 / scale))
    scale = float(holder.qakd_log_scale.detach().exp().double())
    values = special_values(scale, low, high)
    x = torch.tensor(values, dtype=torch.float32)[None].requires_grad_(True)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    out = rule(x, holder)
    out.backward(g)
    learns = {LSQ: "step", PACT: "clip", DoReFa: "nothing", EWGS: "step"}[type(config)]
    delta, decay = getattr(config, "delta", 0.0), getattr(config, "alpha_decay", 0.0)
    exact = x.detach().double().numpy()[0]
    expected, grad_x, grad_scale = activation_reference(
        exact, g.double().numpy()[0], scale, low, high, learns=learns, delta=delta, decay=decay
    )
    np.testing.assert_allclose(out.detach().numpy()[0], expected, atol=1e-6)
    np.testing.assert_allclose(x.grad.numpy()[0], grad_x, atol=1e-5)
    if learns == "nothing":
        assert not list(holder.parameters())
        return
    factor = 1 / math.sqrt(x.shape[1] * high) if learns == "step" else 1.0
    # The parameter is the scale's logarithm: its gradient has a factor s.
    assert float(holder.qakd_log_scale.grad) == pytest.approx(grad_scale * factor * scale, rel=1e-4, abs=1e-4)


def weight_reference(kind, w, holder, rule):
    """Fake-quantized weight in float64 with autograd through everything but rounding: the straight-through estimator."""
    n = {8: 254}.get(rule.bits, 2**rule.bits - 1)

    def rounded(v):
        return v + (torch.round(v) - v).detach()

    if kind is LSQ:
        s = holder["log_scale"].exp()
        low, high = rule.codes
        v = w / s
        inside = (v > low) & (v < high)
        return torch.where(inside, rounded(v), torch.where(v >= high, float(high), float(low))) * s
    if kind in (DoReFa, PACT):
        unit = holder["unit"]
        t = unit * torch.tanh(w / unit)
        m = t.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1) if unit.ndim else t.abs().max()
        x = t / m / 2 + 0.5  # [0, 1]
        return m * (2 * rounded(x * n) / n - 1)
    lower_upper = holder["log_interval"].exp() * n
    center = holder["offset"] * lower_upper / 2
    x = (w - (center - lower_upper / 2)) / lower_upper
    inside = (x > 0) & (x < 1)
    x = torch.where(inside, x, torch.where(x >= 1, 1.0, 0.0))
    return holder["log_scale"].exp() * n / 2 * (2 * rounded(x * n) / n - 1)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [1, *BITS])
@pytest.mark.parametrize("config", [LSQ(), PACT(), DoReFa(), EWGS(delta=0.0)], ids=lambda c: type(c).__name__)
def test_weights_equal_the_formulas_in_float64(config, bits, per_channel):
    if bits == 1 and isinstance(config, LSQ):
        with pytest.raises(QakdError, match="weight_bits=1"):
            LSQ(weight_bits=1)
        return
    rule = config.weight_rule(bits, 0 if per_channel else None, None)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 3, 2, 2, generator=generator) * 0.3
    w[3] *= 4  # beyond what tanh leaves straight
    clip = 0.8 * (w.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1) if per_channel else w.abs().max())
    holder = nn.Module()
    rule.install(holder, clip)
    if isinstance(config, EWGS):
        holder.qakd_offset.data.add_(0.05)
        holder.qakd_log_scale.data.sub_(0.1)
    w.requires_grad_(True)
    g = torch.randn(w.shape, generator=generator)
    out = rule(w, holder)
    out.backward(g)
    exact = {k.removeprefix("qakd_"): v.detach().double() for k, v in [*holder.named_parameters(), *holder.named_buffers()]}
    for name, _ in holder.named_parameters():
        exact[name.removeprefix("qakd_")].requires_grad_(True)
    w64 = w.detach().double().requires_grad_(True)
    expected = weight_reference(type(config), w64, exact, rule)
    expected.backward(g.double())
    np.testing.assert_allclose(out.detach().numpy(), expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(w.grad.numpy(), w64.grad.numpy(), atol=1e-4)
    factor = 1 / math.sqrt(w.numel() / clip.numel() * rule.codes[1]) if isinstance(config, LSQ) else 1.0
    for name, parameter in holder.named_parameters():
        np.testing.assert_allclose(
            parameter.grad.numpy(), factor * exact[name.removeprefix("qakd_")].grad.numpy(), atol=2e-4, err_msg=name
        )


@pytest.mark.parametrize("config", [LSQ(), PACT(), DoReFa(), EWGS()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("bits", [1, *BITS])
def test_quantized_weights_lie_on_the_grid_that_is_exported(config, bits):
    if bits == 1 and isinstance(config, LSQ):
        return
    rule = config.weight_rule(bits, 0, None)
    w = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    holder = nn.Module()
    rule.install(holder, w.abs().amax(1, keepdim=True))
    quantized = rule(w, holder).detach()
    params = rule.qparams(holder)
    codes = quantized / params.scale[:, None]
    assert float((codes - codes.round()).abs().max()) < 1e-4
    assert params.quant_min <= int(codes.min()) <= int(codes.max()) <= params.quant_max
    assert -128 <= params.quant_min <= params.quant_max <= 127
    assert len(codes.round().unique()) <= 2**bits
    assert params.bits == bits
    if params.code_step == 2:
        assert bool((codes.round() % 2 == 1).logical_or(codes.round() % 2 == -1).all())


def test_ewgs_with_delta_zero_is_the_straight_through_estimator_bit_for_bit():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    g = torch.randn(1000, generator=torch.Generator().manual_seed(1))

    def gradients(delta):
        a, s = x.clone().requires_grad_(True), torch.tensor(0.3, requires_grad=True)
        fake_quantize(a, s, -8, 7, delta=delta).backward(g)
        return a.grad, s.grad

    straight, zero, scaled = gradients(None), gradients(torch.tensor(0.0)), gradients(torch.tensor(0.5))
    assert torch.equal(straight[0], zero[0])
    assert torch.equal(straight[1], zero[1])
    assert not torch.equal(straight[0], scaled[0])


def test_ewgs_pulls_a_value_towards_the_next_level_in_the_direction_of_its_gradient():
    # dL/dx_q > 0 wants a smaller x_q: a value below its level (x_c < x_q) gets a smaller step than one above it.
    v = torch.tensor([1.8, 2.2], requires_grad=True)
    discretize(v, 0, 3, delta=torch.tensor(3.0)).backward(torch.ones(2))
    assert torch.allclose(v.grad, torch.tensor([0.8, 1.2]))


@pytest.mark.parametrize("delta", [None, 0.3], ids=["STE", "EWGS"])
def test_what_follows_may_write_over_the_output(delta):
    generator = torch.Generator().manual_seed(0)
    values, upstream = torch.randn(2, 500, generator=generator)
    found = []
    for follow in (lambda out: (out + 0.25).relu(), lambda out: out.add_(0.25).relu_()):
        x, scale = values.clone().requires_grad_(), torch.tensor(0.2, requires_grad=True)
        out = follow(fake_quantize(x, scale, -8, 7, delta=None if delta is None else torch.tensor(delta)))
        out.backward(upstream, retain_graph=True)
        out.backward(upstream)  # the second pass has nothing left of the first one's
        found.append((x.grad, scale.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    with torch.inference_mode():
        quantized = fake_quantize(values, scale.detach(), -8, 7)
    assert torch.equal(quantized, fake_quantize(values, scale.detach(), -8, 7))


class Quantized(nn.Module):
    """Three layers whose weight and output are quantized, with ReLUs in place; ``outputs`` watches what quantizers return."""

    def __init__(self, config):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
        self.of_weights, self.of_outputs = (nn.ModuleList(nn.Module() for _ in self.layers) for _ in range(2))
        self.rules = config.weight_rule(4, 0, None), config.activation_rule(4, False)
        for layer, of_weight, of_output in zip(self.layers, self.of_weights, self.of_outputs, strict=True):
            nn.init.normal_(layer.weight, std=0.3, generator=generator)
            self.rules[0].install(of_weight, torch.ones(16, 1))
            self.rules[1].install(of_output, torch.tensor(2.0))
        self.outputs = []

    def forward(self, x):
        for layer, of_weight, of_output in zip(self.layers, self.of_weights, self.of_outputs, strict=True):
            x = self.rules[1](nn.functional.linear(x, self.rules[0](layer.weight, of_weight)), of_output)
            self.outputs.append(StorageWeakRef(x.untyped_storage()))
            x = x.relu_()
        return x


@pytest.mark.parametrize("config", [LSQ(), PACT(), DoReFa(), EWGS(delta=0.3)], ids=lambda c: type(c).__name__)
def test_activation_checkpointing_frees_what_quantizers_keep_and_changes_no_gradient(config):
    plain, x = Quantized(config), torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    saving = copy.deepcopy(plain)
    plain(x).square().sum().backward()
    assert all(output.expired() for output in plain.outputs)  # nothing outlives the backward pass
    out = checkpoint(saving, x, use_reentrant=False)
    assert [output.expired() for output in saving.outputs] == [True, True, False]  # but the last, which is what came out
    out.square().sum().backward()
    gradients = [[parameter.grad for parameter in network.parameters()] for network in (plain, saving)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_offloading_takes_everything_that_a_quantizer_keeps():
    x, scale = torch.randn(64, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    taken = []

    def take(tensor):
        taken.append(tensor.numel())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(take, lambda tensor: tensor):
        out = fake_quantize(x, scale, -8, 7)
        kept = StorageWeakRef(out.untyped_storage())
        total = out.sum()
    del out
    assert kept.expired()
    assert sorted(taken) == [1, 64, 64]  # scale, input and output
    total.backward()
    again = (x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_())
    fake_quantize(*again, -8, 7).sum().backward()
    expected = [tensor.grad for tensor in again]
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(scale.grad, expected[1])


@pytest.mark.parametrize("config", [LSQ(), PACT(), DoReFa(), EWGS()], ids=lambda c: type(c).__name__)
def test_a_single_element_and_a_zero_are_quantized(config):
    for shape in ((1,), (1, 1), (2, 0)):
        rule, holder = config.activation_rule(4, True), nn.Module()
        rule.install(holder, torch.tensor(1.5))
        x = torch.zeros(shape, requires_grad=True)
        rule(x, holder).sum().backward()
        assert torch.equal(x.grad, torch.zeros(shape))
    rule, holder = config.weight_rule(4, 0, None), nn.Module()
    rule.install(holder, torch.ones(2, 1))
    w = torch.zeros(2, 3, requires_grad=True)
    out = rule(w, holder)
    out.sum().backward()
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isfinite(w.grad).all())


@pytest.mark.parametrize("config", [LSQ(), PACT(), DoReFa(), EWGS()], ids=lambda c: type(c).__name__)
def test_under_bfloat16_autocast_the_arithmetic_stays_in_float32(config):
    rule, holder = config.weight_rule(8, 0, None), nn.Module()
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    rule.install(holder, w.abs().amax(1, keepdim=True))
    expected = rule(w, holder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rule(w, holder), expected)
        rounded = rule(w.bfloat16(), holder)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, rule(w.bfloat16().float(), holder).bfloat16())


def _steps(x, config, upstream, *, wide):
    """Output and gradients of an activation's quantizer in the type of ``x``; or as if it were converted as a whole."""
    rule, holder = config.activation_rule(4, False), nn.Module()
    rule.install(holder, torch.tensor(1.5))
    x = x.detach().requires_grad_()
    out = rule(x.float(), holder).to(x.dtype) if wide else rule(x, holder)
    out.backward(upstream)
    return out.detach(), x.grad, [parameter.grad for parameter in holder.parameters()]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every second channel"])
@pytest.mark.parametrize("config", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_of_samples_compute_what_the_whole_does(config, dtype, layout, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 100 // torch.get_num_threads())
    draw = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(7, 6, 3, 3, generator=draw).to(dtype) for _ in range(2))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout != "contiguous":
        x, upstream = x[:, ::2], upstream[:, ::2]
    assert len(list(module._blocks(x))) in {3, 4, 7}
    found, expected = (_steps(x, config, upstream, wide=wide) for wide in (False, True))
    assert found[0].dtype == found[1].dtype == dtype
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2])  # of sums in another order


def test_nothing_is_kept_in_float32_of_what_is_narrower():
    x, scale = torch.randn(64, 64).bfloat16().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize(x, scale, -8, 7)
    assert [tensor.numel() for tensor in kept if tensor.dtype == torch.float32] == [1]
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in kept) == 1


@pytest.mark.parametrize("config", [LSQ(), PACT(), EWGS()], ids=lambda c: type(c).__name__)
def test_scales_stay_positive_under_a_rate_that_is_far_too_high(config):
    rule, holder = config.activation_rule(4, True), nn.Module()
    rule.install(holder, torch.tensor(0.5))
    optimizer = torch.optim.Adam(holder.parameters(), lr=0.3)
    for _ in range(50):
        optimizer.zero_grad()
        (-rule(torch.rand(4, 20), holder)).sum().backward()
        optimizer.step()
        for sign in (1, -1):
            holder.qakd_log_scale.grad = torch.tensor(100.0 * sign)
            optimizer.step()
    assert 0 < float(rule.scale(holder)) < math.inf


@pytest.mark.parametrize("config", [LSQ(), PACT(), DoReFa(), EWGS()], ids=lambda c: type(c).__name__)
def test_a_rule_is_plain_data_and_its_tensors_can_be_taken_off(config):
    for rule in (config.weight_rule(4, 0, None), config.activation_rule(4, False)):
        assert rule_from_dict(rule.as_dict()) == rule
        assert rule_from_dict(rule.as_dict()) is rule_from_dict(rule.as_dict())  # made once, not in every forward pass
        holder = nn.Linear(2, 2)
        rule.install(holder, torch.ones(2, 1) if rule.axis == 0 else torch.tensor(1.0))
        learned = {id(parameter) for parameter in holder.parameters()} - {id(holder.weight), id(holder.bias)}
        assert {id(parameter) for parameter in rule.parameters(holder)} == learned
        remove_tensors(holder)
        assert set(dict(holder.named_parameters())) == {"weight", "bias"}
        assert not dict(holder.named_buffers())


def test_delta_is_the_curvature_over_three_deviations_of_the_gradient():
    """For loss = sum_i h_i x_i^2 / 2 of the discretized values, Tr(H) / N = mean h and g = h x are known."""
    rule, holder = EWGS(delta=0.1).activation_rule(4, True), nn.Module()
    rule.install(holder, torch.tensor(1.5))
    x, h = torch.rand(8, 30, generator=torch.Generator().manual_seed(0)) * 1.5, torch.linspace(0.5, 2, 30)
    span = 1.5  # codes on an interval of length 1 stand for 0..1.5
    found = refresh_delta(lambda: 0.5 * (h * rule(x, holder) ** 2).sum())
    quantized = rule(x, holder).detach()
    trace, gradient = span**2 * h.mean(), span * h * quantized
    assert float(holder.qakd_delta) == pytest.approx(float(trace / (3 * gradient.std())), rel=1e-4)
    assert len(found) == 1


def test_curvature_is_measured_in_one_thread_and_training_goes_on_in_another():
    rule, holder = EWGS(delta=0.1).activation_rule(4, True), nn.Module()
    rule.install(holder, torch.tensor(1.5))
    x = torch.rand(8, 30, generator=torch.Generator().manual_seed(0))
    gradients = []

    def train():
        values = x.clone().requires_grad_()
        rule(values, holder).square().sum().backward()
        gradients.append(values.grad)

    def loss():
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        return rule(x, holder).square().sum()

    train()
    assert len(refresh_delta(loss)) == 1
    assert torch.equal(*gradients)


def test_delta_is_zero_where_the_loss_is_concave_and_untouched_elsewhere():
    rule, holder = EWGS(delta=0.1).activation_rule(4, True), nn.Module()
    rule.install(holder, torch.tensor(1.5))
    x = torch.rand(8, 30)
    refresh_delta(lambda: -(rule(x, holder) ** 2).sum())
    assert float(holder.qakd_delta) == 0.0
    assert refresh_delta(lambda: (nn.Parameter(torch.ones(3)) ** 2).sum()) == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSQ(weight_bits=9), "weight_bits=9"),
        (lambda: LSQ(activation_bits=0), "activation_bits=0"),
        (lambda: DoReFa(weight_bits=2.5), "weight_bits=2.5"),
        (lambda: PACT(alpha_decay=-1), "alpha_decay=-1"),
        (lambda: EWGS(delta=-0.1), "delta=-0.1"),
        (lambda: EWGS(refresh_every=-1), "refresh_every=-1"),
    ],
)
def test_bad_numbers_are_named(make, message):
    with pytest.raises(QakdError, match=message):
        make()
