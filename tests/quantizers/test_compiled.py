"""Compiled kernels of fake_quantize: the bits of the eager ones, on every device; where nothing can be compiled, it is said."""

import pytest
import torch
from torch._dynamo.utils import counters

from qakd_plugin import QakdError
from qakd_plugin.quantizers import compiled
from qakd_plugin.quantizers.compiled import compiled_kernels
from qakd_plugin.quantizers.fake_quantize import fake_quantize

GPU = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.fixture
def calls(monkeypatch):
    """How often the compiled kernels were run forward and backward; as they are for tensors of any size."""
    found = {"forward": 0, "backward": 0}

    def counted(name):
        kernel = getattr(compiled, name)

        def call(*args, **kwargs):
            found[name] += 1
            return kernel(*args, **kwargs)

        monkeypatch.setattr(compiled, name, call)

    monkeypatch.setattr(compiled, "_SMALLEST", 256)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        with compiled_kernels(torch.device(device)):
            pass  # what it tries is not counted
    counted("forward")
    counted("backward")
    return found


def _step(x, upstream, scale, *numbers, **options):
    """Output, gradient of x, gradient of the scale."""
    x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_()
    out = fake_quantize(x, scale, *numbers, **options)
    (out + 0).relu_().backward(upstream)
    return out.detach(), x.grad, scale.grad


def _tensors(shape, device, dtype=torch.float32, layout=torch.contiguous_format):
    draw = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=draw) for _ in range(2))
    x.view(-1)[:40] = torch.arange(-20, 20) / 4  # codes, ties and bounds of the scale 1/2
    return tuple(tensor.to(device, dtype, memory_format=layout) for tensor in (x, upstream))


ONE, EACH = "one scale", "a scale for each channel"
CASES = {
    "LSQ": ((-8, 7), {"gradient_scale": 0.1}, (ONE, EACH)),
    "clip learned": ((0, 15), {"through_rounding": False, "decay": 0.01}, (ONE,)),
    "EWGS": ((-7, 7), {"delta": 0.7}, (ONE,)),
    "no zero": ((-1.5, 1.5), {"shift": 1.5, "delta": 0.3}, (EACH,)),
}


def _compare(found, expected):
    assert found[0].dtype == expected[0].dtype
    assert found[0].stride() == expected[0].stride()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)  # of sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("case", ["LSQ", *(pytest.param(name, marks=pytest.mark.matrix) for name in list(CASES)[1:])])
def test_outputs_and_gradients_are_the_bits_of_the_eager_kernels(case, device, calls):
    levels, options, scales = CASES[case]
    options = {key: torch.tensor(value, device=device) if key == "delta" else value for key, value in options.items()}
    made = {ONE: torch.tensor(0.5), EACH: torch.linspace(0.3, 0.7, 8).reshape(8, 1, 1, 1)}
    for scale in (made[name].to(device) for name in scales):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, upstream = _tensors((8, 4, 16, 16), device, layout=layout)
            expected, before = _step(x, upstream, scale, *levels, **options), calls["backward"]
            with compiled_kernels(torch.device(device)):
                _compare(_step(x, upstream, scale, *levels, **options), expected)
                _compare(_step(x, upstream.contiguous(), scale, *levels, **options), expected)
            assert calls["backward"] == before + 2


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_what_is_narrower_is_read_and_written_as_it_is(device, calls):
    x, upstream = _tensors((8, 4, 16, 16), device, torch.bfloat16)
    scale = torch.tensor(0.5, device=device)
    expected = _step(x, upstream, scale, -8, 7)
    with compiled_kernels(torch.device(device)):
        _compare(_step(x, upstream, scale, -8, 7), expected)
    assert calls == {"forward": 1, "backward": 1}


def test_other_sizes_compile_nothing_anew(calls):
    scale = torch.tensor(0.5)
    with compiled_kernels(torch.device("cpu")):
        graphs = []
        for shape in [(64, 256), (96, 128), (8, 4, 48, 64)]:
            x, upstream = _tensors(shape, "cpu")
            _step(x, upstream, scale, 0, 15)
            graphs.append(counters["stats"]["unique_graphs"])
        assert len(set(graphs)) == 1
    assert calls["backward"] == 3


def test_eager_kernels_run_outside_without_gradients_and_where_rows_do_not_fit(calls):
    scale = torch.tensor(0.5, requires_grad=True)
    x = torch.randn(128, 64)
    fake_quantize(x, scale, -8, 7)
    with compiled_kernels(torch.device("cpu")):
        with torch.no_grad():
            fake_quantize(x, scale, -8, 7)
        fake_quantize(x[:, ::2], scale, -8, 7)
        fake_quantize(x[:, :1], scale, -8, 7)
        fake_quantize(x.double(), scale, -8, 7)
        fake_quantize(torch.randn(133, 61), scale, -8, 7)
        fake_quantize(x, torch.full((1, 64), 0.5), -8, 7)
    assert calls == {"forward": 0, "backward": 0}


def test_nothing_but_the_input_is_kept_for_the_backward_pass(calls):
    x, scale = torch.randn(128, 64, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    kept = []
    with (
        compiled_kernels(torch.device("cpu")),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        fake_quantize(x, scale, -8, 7)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), scale.data_ptr()}


def test_what_cannot_be_compiled_is_an_error_that_says_what_to_install(monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled, "_kernel", lambda function: fails)
    monkeypatch.setattr(compiled, "_run_once", compiled._run_once.__wrapped__)  # as in a process that has compiled nothing
    with (
        pytest.raises(QakdError, match=r"compile_quantizers=True: .*no compiler.*apt-get install g\+\+"),
        compiled_kernels(torch.device("cpu")),
    ):
        pass
    assert not compiled.are_on()


def test_second_derivatives_are_refused_not_wrong(calls):
    x, scale = torch.randn(128, 64, requires_grad=True), torch.tensor(0.5)
    with compiled_kernels(torch.device("cpu")):
        out = fake_quantize(x, scale, -8, 7)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
