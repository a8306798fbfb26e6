"""Every toolkit with every quantizer: it learns, it is exported exactly, and TensorRT-RTX builds it.

A subset runs by default: every quantizer with ModelOpt, the toolkit's own and LSQ with every toolkit, and every number of
bits; `make matrix` runs all cells.
"""

import itertools

import pytest
import torch
from nets import Structures, Transformer, trained

from qakd_plugin import (
    EWGS,
    LSQ,
    PACT,
    SQAKD,
    DoReFa,
    QakdError,
    attach,
    build_engine,
    distill,
    export_onnx,
    prepare,
    use_quantizers,
)
from qakd_plugin.toolkits import adapter_for

TOOLKITS = ["modelopt", "pt2e", "torchao", "torch_ao", "torch_ao_eager"]
QUANTIZERS = [None, LSQ(), PACT(), DoReFa(), EWGS()]
BITS = [8, 4, 2]
IMAGE_ONLY = {"modelopt", "pt2e"}
"""Toolkits that quantize the transformer block as well."""


def _cells():
    covering = {(t, q, BITS[(t + q) % 3]) for t in range(len(TOOLKITS)) for q in range(len(QUANTIZERS)) if t < 1 or q < 2}
    for (t, toolkit), (q, quantizer), bits in itertools.product(enumerate(TOOLKITS), enumerate(QUANTIZERS), BITS):
        name = "own" if quantizer is None else type(quantizer).__name__
        marks = () if (t, q, bits) in covering else (pytest.mark.matrix,)
        yield pytest.param("structures", toolkit, quantizer, bits, id=f"{toolkit}-{name}-W{bits}A{bits}", marks=marks)
        if toolkit in IMAGE_ONLY:
            marks = () if (t, q, bits) in {(0, 1, 4), (1, 4, 8)} else (pytest.mark.matrix,)
            cell_id = f"transformer-{toolkit}-{name}-W{bits}A{bits}"
            yield pytest.param("transformer", toolkit, quantizer, bits, id=cell_id, marks=marks)


@pytest.fixture(scope="module")
def teachers(digits):
    torch.manual_seed(0)
    return {
        "structures": trained(Structures(), *digits.train),
        "structures-functional": trained(Structures(functional=True), *digits.train),
        "transformer": trained(Transformer(), *digits.train),
    }


@pytest.mark.parametrize(("network", "toolkit", "quantizer", "bits"), _cells())
def test_a_cell_learns_and_is_exported_exactly(
    network, toolkit, quantizer, bits, teachers, calibration, batches, digits, tmp_path
):
    teacher = teachers[network + "-functional" * (toolkit == "torch_ao_eager")]
    student = prepare(teacher, calibration, toolkit, weight_bits=bits, activation_bits=bits)
    if quantizer is not None:
        use_quantizers(student, quantizer)
    adapter = adapter_for(student)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    images = [x for x, _ in batches[:2]]
    distill(student, teacher, images, method=SQAKD(), epochs=1, seed=0, lr=1e-3)
    _every_quantizer_learns(adapter, student, teacher, images[0], before)
    samples = digits.test[0][:64]
    for target in ("onnxruntime", "tensorrt"):
        exported = export_onnx(student, samples, tmp_path / f"{target}.onnx", target=target)
        proof = exported.parity
        assert proof.weight_codes > 0
        assert proof.runtime_deviation < 1e-4
        assert proof.toolkit_deviation < 1e-4
        assert proof.ties_runtime + proof.ties_toolkit <= 2e-3 * max(proof.activation_codes, 1)
    engine = build_engine(
        exported.path, tmp_path / "student.engine", "tensorrt_rtx", opt_batch=1, max_batch=1, capabilities=["SM89"]
    )
    assert engine.path.stat().st_size > 0


def _every_quantizer_learns(adapter, student, teacher, images, before):
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    weights = {name for name, value in before.items() if value.ndim > 1 and "qakd_" not in name}
    assert weights <= moved
    adapter.set_mode(student, True)
    student.zero_grad()
    with attach(student, teacher, method=SQAKD()) as kd:
        student(images)
        kd.loss().backward()
    learned = [q for q in adapter.quantizers(student) if adapter.learned(q) is not None]
    for quantizer in learned:
        for name, parameter in quantizer.module.named_parameters():
            assert parameter.grad is not None, (quantizer.fqn, name)
            assert bool(torch.isfinite(parameter.grad).all()), (quantizer.fqn, name)
            assert bool((parameter.grad != 0).any()), (quantizer.fqn, name)
    assert {name for name in before if "qakd_" in name} <= moved
    adapter.set_mode(student, False)


# -- cells that cannot exist say why


def test_eager_mode_says_what_it_cannot_quantize(teachers, calibration):
    with pytest.raises(QakdError, match=r"depthwise\.0\.0: its input comes from 'relu_1'|which eager mode cannot quantize"):
        prepare(teachers["structures"], calibration, "torch_ao_eager")


def test_qatconfig_says_that_it_quantizes_linear_layers_only(calibration):
    with pytest.raises(QakdError, match="holds no linear layer"):
        prepare(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten()), calibration, "torchao")


def test_one_bit_is_refused_where_it_is_not_defined(teachers, calibration):
    student = prepare(teachers["structures"], calibration)
    with pytest.raises(QakdError, match="weight_bits=1"):
        use_quantizers(student, LSQ(weight_bits=1))
    with pytest.raises(QakdError, match="activation_bits=1"):
        use_quantizers(student, DoReFa(activation_bits=1), calibration_batches=calibration)
