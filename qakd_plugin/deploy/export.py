"""``export_onnx``: a trained model becomes a file that provably computes the same; ``export_float``: its float baseline."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import onnx_ir as ir
import torch
from torch import Tensor, nn

from .._common.device import move
from .._common.files import write_atomic
from .._common.module_copy import copied, uncompiled
from .._common.module_mode import eval_mode
from .._common.one_at_a_time import one_at_a_time
from .._common.precision import dtype_name
from .._common.training_record import training_records
from ..errors import ExportError, UnsupportedQuantizerError
from ..export_form.tracing import Traced, trace
from ..placement.targets import TARGETS, Target
from ..preparation.feasibility import target_problem
from ..preparation.recorded import recorded
from ..tasks.inputs import Inputs, call, call_problem, named_inputs, named_tensors, with_tensors
from ..toolkits import Adapter, adapter_for
from .canonical.clamps import quantizers_after_relu
from .canonical.graph import WEIGHT_KEY, weight_dequantizers
from .canonical.write import to_canonical, to_proto
from .diagnosis import left_in_float, transposed, with_separate_biases
from .file_record import FileRecord, finite
from .parity.float16 import Float16Parity, check_float16
from .parity.gate import check_parity
from .parity.openvino import check_openvino
from .parity.recorded_codes import check_same_bits
from .parity.report import ParityReport, arrays
from .targets.float16 import to_float16
from .targets.onnxruntime import to_onnxruntime_form
from .targets.onnxruntime_moves import move_codes
from .targets.openvino import to_openvino_form
from .targets.openvino_kernels import settled_for_kernels
from .targets.tensorrt import check_weights, to_tensorrt_form
from .targets.weight_packing import WeightStorage

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedModel:
    """A written file, and the proof that came with it.

    Attributes:
        path: the ONNX file.
        target: whose form it has.
        parity: the three comparisons with the trained model; of an FP16 file, before its float part was converted.
        float16: of an FP16 file, what the conversion changed; None otherwise.
    """

    path: Path
    target: Target
    parity: ParityReport
    float16: Float16Parity | None = None

    def __fspath__(self) -> str:
        return str(self.path)


@one_at_a_time
@torch.no_grad()
def export_onnx(
    prepared_model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    target: Target = "tensorrt",
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    weight_storage: WeightStorage = "int4",
    float16: bool = False,
) -> ExportedModel:
    """Export a trained, prepared model to ONNX with Q/DQ, and prove that the file computes what was trained.

    The canonical form ("tensorrt") has int8 codes, zero point 0, float biases and BatchNorm folded exactly. "onnxruntime" is an
    exact rewrite of it that ONNX Runtime's integer kernels can take, "openvino" one with unsigned codes for what cannot be
    negative, which OpenVINO is faster with. The opset is 20, or 21 where weights are stored in 4 bits.

    Inputs are called as in ``forward``, a single tensor "input"; outputs by their path ("logits", "0", "boxes.p3"). The batch
    is dynamic: the first dimension of every input that has as many entries as the first input. Where the network fixes it, a
    warning and the file's metadata ("qakd.fixed") say so. Whatever is dynamic is proven at a second size, too.

    On x86 processors without VNNI, ONNX Runtime's integer kernels add pairs of products in 16 bits, which saturate, unless a
    session has ``session.x64quantprecision``. The gate sets it on such a processor; so should who runs the file on one.

    Weights of at most 4 bits take 4 bits in the file. For ONNX Runtime and OpenVINO a Cast follows them that the runtime
    folds: outputs and speed are those of int8 codes. TensorRT has no such form: there this holds for linear layers, with a
    scale per channel or, where their activations stay in floating point, in blocks, and for embeddings; all other weights take
    8 bits. Where weights alone are quantized, ONNX Runtime's file has its operators for that (MatMulNBits at accuracy level 1,
    GatherBlockQuantized), which compute what was trained in any session. OpenVINO by default quantizes the activations of such
    layers on its own: set DYNAMIC_QUANTIZATION_GROUP_SIZE to 0 for the numbers that were trained.

    The file's metadata ("qakd.method", "qakd.toolkit", "qakd.bits", "qakd.target", "qakd.parity", "qakd.training") says by what
    the model was prepared and trained, as far as :func:`~qakd_plugin.distill`, :func:`~qakd_plugin.attach` and the bridges to
    other trainers saw it, and what was proven: reports show it.

    Args:
        prepared_model: prepared by a supported toolkit, trained or calibrated; it is not changed.
        example_inputs: a tensor (N, ...), a tuple of positional arguments or a mapping of keywords; floats, integers (token
            ids) and masks. Parity is checked on these samples: pass real ones, several.
        path: where the file goes; it appears whole or not at all.
        target: "tensorrt", "onnxruntime" or "openvino".
        input_names: in the file, in the order of the inputs, in the place of their own.
        output_names: likewise of the outputs.
        dynamic: further dimensions that may have any size, by input, with a name each; one name is one size:
            ``{"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}``. ``{}`` makes a file in which nothing is
            dynamic, not even the batch.
        weight_storage: the narrowest type of weights beside quantized activations. "int4" needs ONNX Runtime 1.23 or later,
            OpenVINO, or TensorRT-RTX; "int8" is for older ones, and for a classic TensorRT that takes no 4 bits there; "int2"
            (opset 25) makes files of 2-bit models smaller still, for ONNX Runtime alone. Embeddings, and linear layers whose
            activations stay in floating point, take 4 bits with each of the three, where they have no more: all targets read it
            there.
        float16: for TensorRT: write what is not quantized, and all scales, in FP16. Strongly typed engines compute it as the
            file says, and INT8 layers beside FP32 ones lose to FP16 throughout. The gate then holds in two steps: exactly for
            the float32 form, and within the tolerances of :mod:`qakd_plugin.deploy.parity.float16` for its conversion.

    Returns:
        The path (usable wherever a path is) and the parity report.

    Raises:
        NotPreparedError: no toolkit prepared the model, or a range was never calibrated.
        UnsupportedQuantizerError: the target cannot take a quantizer; names it.
        ExportError: the model cannot be traced, fixes a dimension that was asked for, does not read an input, or the target
            has no such input; a name does not fit; the path cannot be written.
        ParityError: the file would not compute what was trained; names the first layer that differs.
    """
    if target not in TARGETS:
        raise ExportError(f"target={target!r} is unknown: use one of {list(TARGETS)}.")
    if float16 and target != "tensorrt":
        raise ExportError(
            f"float16=True is for target='tensorrt': {target} fuses integer layers beside float32 only. Leave it out."
        )
    _check_storage(weight_storage, target)
    prepared_model = uncompiled(prepared_model)
    samples = _checked(prepared_model, example_inputs)
    adapter = adapter_for(prepared_model)
    _check_quantizers(adapter, prepared_model, target)
    form = adapter.export_form(prepared_model)
    move(form, "cpu")
    traced = trace(form, samples, dynamic, input_names=input_names, output_names=output_names)
    _check_types(traced, samples, target)
    _tell_fixed(traced)
    canonical = to_canonical(traced)
    _tell_computed_weights(canonical)
    model = _for_target(canonical, target, weight_storage)
    evaluated = _evaluated(adapter, prepared_model)
    after_relu = quantizers_after_relu(canonical.graph)
    parity = check_parity(model, form, evaluated, samples, fused=target == "onnxruntime", after_relu=after_relu)
    if target == "onnxruntime" and (moved := move_codes(model)) is not model:
        check_same_bits(model, moved, samples)
        model = moved
    if target == "openvino":
        proven, model = model, settled_for_kernels(model)
        check_same_bits(proven, model, samples)
        parity = replace(parity, openvino=check_openvino(model, form, samples, arrays(call(evaluated, samples))))
    if target == "onnxruntime":
        _tell_slow(model, recorded(prepared_model) is not None)
    conversion = None
    if float16:
        model = to_float16(model)
        conversion = check_float16(model, form, samples)
    record = FileRecord(
        adapter.name, *_bits(adapter, prepared_model), target, training_records(prepared_model), finite(parity.as_dict())
    )
    model.metadata_props.update(record.as_metadata())
    write_atomic(path, to_proto(model).SerializeToString(), ExportError)
    return ExportedModel(Path(path), target, parity, conversion)


@one_at_a_time
def export_float(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    float16: bool = False,
) -> Path:
    """Write a float model to ONNX with a dynamic batch dimension: the row every quantized one is compared with.

    Args:
        model: any float network; exported in eval mode, its own mode is put back.
        example_inputs: as for :func:`export_onnx`; any batch size.
        path: of the file.
        input_names: as for :func:`export_onnx`.
        output_names: likewise.
        dynamic: likewise.
        float16: compute in FP16; inputs and outputs stay float32.

    Raises:
        ExportError: torch.export cannot trace the model, a dimension or name does not fit, a weight is beyond FP16, it is
            larger than an ONNX file may be, or the path cannot be written.
    """
    with eval_mode(model):
        _check_inputs(model, example_inputs)
        traced = trace(model, example_inputs, dynamic, input_names=input_names, output_names=output_names)
        _tell_fixed(traced)
        exported = to_canonical(traced)
    if float16:
        exported = to_float16(exported)
    return write_atomic(path, to_proto(exported).SerializeToString(), ExportError)


def _tell_computed_weights(canonical: ir.Model) -> None:
    """Name layers whose quantized weight is not what they multiply with: they compute in floating point."""
    computed = [
        node.metadata_props.get(WEIGHT_KEY, str(node.name))
        for node in weight_dequantizers(canonical.graph)
        if not _is_multiplied(node.outputs[0])
    ]
    if computed:
        _log.warning(
            "%s: not this quantized weight is multiplied, but what the forward pass makes of it (weight standardization, or "
            "the like), so these layers compute in floating point. toolkit='pt2e' quantizes what is multiplied.",
            ", ".join(computed),
        )


def _is_multiplied(weight: ir.Value) -> bool:
    """Whether everything that reads a weight is a layer, be it transposed or reshaped before."""
    return all(
        node.op_type in _LAYERS or (node.op_type in _VIEWS and _is_multiplied(node.outputs[0])) for node, _ in weight.uses()
    )


_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Einsum"}
_VIEWS = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity", "Cast"}


def _for_target(canonical: ir.Model, target: Target, storage: WeightStorage) -> ir.Model:
    if target == "onnxruntime":
        return to_onnxruntime_form(canonical, storage)
    if target == "openvino":
        return to_openvino_form(canonical, storage)
    model = to_tensorrt_form(canonical) if storage == "int4" else canonical
    check_weights(model)
    return model


def _bits(adapter: Adapter, model: nn.Module) -> tuple[int, int]:
    """Of most weights and of most activations, the fewer where two are as common; 32 where none is quantized."""
    quantizers = adapter.quantizers(model)
    found = []
    for role in ("weight", "activation"):
        counted = Counter(adapter.qparams(quantizer).bits for quantizer in quantizers if quantizer.role == role)
        found.append(min(counted, key=lambda bits: (-counted[bits], bits), default=32))
    return found[0], found[1]


def _evaluated(adapter: Adapter, prepared: nn.Module) -> nn.Module:
    """A copy of the prepared model as it is evaluated: in eval mode, ranges frozen."""
    evaluated = copied(prepared)
    move(evaluated, "cpu")
    adapter.set_mode(evaluated, False)
    adapter.freeze_ranges(evaluated, True)
    return evaluated


def _check_storage(storage: str, target: str) -> None:
    if storage not in get_args(WeightStorage):
        raise ExportError(f"weight_storage={storage!r} is unknown: use one of {list(get_args(WeightStorage))}.")
    if storage == "int2" and target != "onnxruntime":
        raise ExportError(
            f"weight_storage='int2': {target} does not load 2-bit weights, ONNX Runtime alone does. Take 'int4', which "
            "holds them in 4 bits."
        )


def _check_inputs(model: nn.Module, example: Inputs) -> None:
    """Refuse what no network can be exported with, or not this one."""
    if not isinstance(example, Tensor | tuple | list | Mapping):
        raise ExportError(
            f"example_inputs: a tensor, a tuple of positional arguments or a mapping of keywords was expected, got "
            f"{type(example).__name__}. Pass a batch of real inputs."
        )
    nowhere = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if nowhere:
        raise ExportError(f"{nowhere[0]} lies on the meta device, without numbers: load the weights first.")
    if problem := call_problem(model, example):
        raise ExportError(
            f"example_inputs: {problem}. Pass a tensor, a tuple of positional arguments or a mapping of keywords."
        )
    tensors = named_inputs(model, example)
    if not any(tensor.ndim for tensor in tensors.values()):
        raise ExportError("example_inputs holds no tensor with dimensions (N, ...). Pass a batch of real inputs.")
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ExportError(
                f"example_inputs: {name!r} lies on the meta device, without numbers. Pass a batch of real inputs."
            )
        # A mask may be minus infinity somewhere; what is the only input may not.
        wrong = torch.isnan(tensor) if len(tensors) > 1 else ~torch.isfinite(tensor)
        if tensor.is_complex() or bool(wrong.any()):
            raise ExportError(f"example_inputs: {name!r} holds NaN, infinite or complex values. Pass a batch of real inputs.")


def _checked(model: nn.Module, example: Inputs) -> Inputs:
    """The example on the CPU, its floats in float32."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ExportError(f"{name} is {dtype_name(parameter.dtype)}, and files are proven in float32: pass model.float().")
    _check_inputs(model, example)
    tensors = named_inputs(model, example).values()
    return with_tensors(
        example, [tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu() for tensor in tensors]
    )


def _check_types(traced: Traced, samples: Inputs, target: str) -> None:
    for name, tensor in zip(traced.inputs, named_tensors(samples).values(), strict=True):
        if target == "tensorrt" and tensor.dtype in _NOT_IN_TENSORRT:
            raise ExportError(
                f"example_inputs: {name!r} is {tensor.dtype}, a type that TensorRT does not have. Pass it as torch.int32 or "
                "torch.int64."
            )


_NOT_IN_TENSORRT = (torch.int16, torch.uint16, torch.uint32, torch.uint64)
"""Refused by the parsers of TensorRT and TensorRT-RTX; int8, uint8, int32, int64 and bool are taken."""


def _tell_fixed(traced: Traced) -> None:
    for line in traced.fixed:
        _log.warning("export: %s. The file takes this size alone.", line)


def _tell_slow(model: ir.Model, ours: bool) -> None:
    """Say which quantized convolutions will run in floating point, and what to write unless the model is ``ours``."""
    names, quantized = left_in_float(model)
    if names:
        remedy = (
            ""
            if ours
            else " For ModelOpt mtq.quantize(model, qakd_plugin.configuration(model), forward_loop) puts quantizers there, as "
            "qakd_plugin.prepare(model, batches) does."
        )
        _log.warning(
            "export: ONNX Runtime will compute %d of %d quantized convolutions in floating point, because no quantizer but an "
            "addition, a concatenation, a pooling or the like reads what they output: %s.%s",
            len(names),
            quantized,
            ", ".join(names),
            remedy,
        )
    if biases := with_separate_biases(model):
        _log.warning(
            "export: ONNX Runtime will compute %d of %d quantized convolutions in floating point, because it would round their "
            "biases by more than a twelfth of a step of their outputs: %s. Input and weights have coarse steps beside the "
            "output: a clamp far below what they reach, or channels that BatchNorm scales up by far more than others, do that.",
            len(biases),
            quantized,
            ", ".join(biases),
        )
    if names := transposed(model):
        _log.warning(
            "export: ONNX Runtime will compute %s in floating point: it has no integer kernel for transposed convolutions. "
            "Upsampling followed by a convolution has one.",
            ", ".join(names),
        )


def _check_quantizers(adapter: Adapter, model: nn.Module, target: str) -> None:
    quantizers = adapter.quantizers(model)
    for quantizer in quantizers:
        problem = target_problem(quantizer, adapter.qparams(quantizer), target)
        if problem:
            raise UnsupportedQuantizerError(
                f"{quantizer.fqn}: {problem}. Prepare the model with a symmetric configuration (qakd_plugin.prepare makes "
                "one, unless another target is asked for), or export for another target."
            )
