"""For who has not prepared a model yet: call the toolkit with a configuration that deploys well."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._common.computed_weights import reparametrized
from .._common.module_copy import copied, has_hooks
from .._common.module_mode import eval_mode
from .._common.one_at_a_time import one_at_a_time
from .._common.precision import dtype_name
from ..errors import NotPreparedError, QakdError
from ..placement.attention import open_attention
from ..placement.attention_products import open_products
from ..placement.folded_batch_norm import fold_frozen_batch_norms, frozen_batch_norms
from ..placement.placement import layer_graph
from ..placement.targets import TARGETS, Target
from ..tasks.batches import BatchFn, batch_splitter, default_batch
from ..tasks.inputs import HALF, Inputs, call, device_of_network, dtypes_named, named_tensors, precision_of
from ..tasks.outputs import named_outputs
from ..toolkits import PLACEMENT, Adapter, Precision, adapter_for, adapter_named
from .calibration_batches import CalibrationBatches
from .pretrained import mark_pretrained
from .recorded import Preparation, described_inputs, record

_log = logging.getLogger(__name__)
_WITH_PRODUCTS = ("modelopt", "pt2e")
"""Toolkits that can quantize what the products of attention multiply."""


@one_at_a_time
def prepare(
    model: nn.Module,
    calibration_batches: Iterable[object],
    toolkit: str = "modelopt",
    weight_bits: int = 8,
    activation_bits: int = 8,
    keep: Sequence[str] | None = None,
    *,
    edges: int = 8,
    quantize_attention: bool = False,
    target: Target = "tensorrt",
    batch_fn: BatchFn = default_batch,
) -> nn.Module:
    """Prepare a float model for quantization-aware training with a configuration that deploys well.

    Weights are symmetric per channel, activations symmetric per tensor; below 8 bits activations that a ReLU made non-negative
    get an unsigned grid. The first and the last layer stay at 8 bits (``edges``). A quantizer goes after every convolution that
    feeds a residual add, a concatenation, a pooling or a SiLU, because ONNX Runtime runs it in floating point otherwise, and on
    the sum of a residual block (with ModelOpt, where a module returns it). Tensors that are concatenated get one range, so that
    codes are moved and not rounded again; with ModelOpt, learned quantizers may part.
    Ranges minimize the squared error over all calibration batches. ``nn.MultiheadAttention`` becomes a module of the same name
    whose four projections are linear layers (:func:`qakd_plugin.placement.attention.open_attention`), or they would stay in
    floating point. What ``modelopt.torch.opt.save`` wrote of a model comes back with
    :func:`qakd_plugin.toolkits.modelopt.restore_modelopt`.

    Args:
        model: the float model; it is not changed.
        calibration_batches: batches as the loader yields them (x, (x, y), a dict ...); several, since all ranges come from
            them. They are walked through once, and two are in memory at a time, however many there are.
        toolkit: "modelopt"; "pt2e" (torchao; the model then takes images of this one size); "torchao" (``QATConfig``: weights
            of linear layers only; activations and convolutions stay in floating point, and scales follow the weights);
            "torch_ao" (FX graph mode); "torch_ao_eager" (adds and concatenations must be written with ``FloatFunctional``).
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
        keep: names or patterns ("fc", "layer1.*") of modules that stay in floating point. None: the heads of a detector (see
            docs/tasks.md), and nothing of other networks.
        edges: bits of the weights of the first and the last layer, 2 to 8. A large classifier in 4 bits makes the file of a
            2- or 4-bit model a good deal smaller, for some accuracy. Their inputs keep 8 bits: an image in fewer would lose
            much and save nothing.
        quantize_attention: quantize what the two products of attention multiply, to 8 bits each whatever ``activation_bits``
            is: query, key, value, and the weights that softmax makes. Of every ``nn.MultiheadAttention`` and of every module
            that calls ``F.scaled_dot_product_attention`` once, as those of timm and transformers do; others are named in a
            warning. They compute the two products one after the other from then on, in training as well, which takes more
            memory and time than PyTorch's one operator. With "modelopt" and "pt2e".
        target: "tensorrt": every target takes the model. "onnxruntime" or "openvino": TensorRT does not, because 8-bit
            activations that cannot be negative get codes 0..255 in the place of 0..127: a grid twice as fine, and no clamp
            after each ReLU. With "openvino" a convolution that a SiLU, Hardswish, GELU or the like reads has no quantizer in
            front of that, only after it: OpenVINO computes both in one kernel, while ONNX Runtime would compute the
            convolution in floating point. Nor has the last convolution of a residual block in front of the sum, which has one:
            OpenVINO adds in floating point. (Quantizers in front of a ReLU stay signed: eager mode's of layers that are not
            fused with it, ModelOpt's where no module returns what the ReLU lets through. Eager mode keeps those in front of a
            SiLU. With "torchao", which leaves activations alone, this changes nothing.)
        batch_fn: splits a batch into (inputs, targets), as in ``distill``.

    Returns:
        A prepared copy in eval mode, with calibrated ranges: post-training quantization, and the starting point of ``distill``.
        Ranges hold still, whatever the copy is called on, until ``distill`` or ``attach`` lets those of torch.ao and PT2E
        follow the training; who trains it in another way calls the toolkit's ``enable_observer``.

    Raises:
        QakdError: an argument is out of range, a pattern of ``keep`` matches nothing, there is no calibration batch, or no
            attention to quantize.
        NotPreparedError: the model is prepared already.
        MissingPackageError: the toolkit is not installed.
    """
    return prepare_as(
        model,
        calibration_batches,
        toolkit,
        weight_bits,
        activation_bits,
        keep,
        edges=edges,
        quantize_attention=quantize_attention,
        target=target,
        batch_fn=batch_fn,
    )


@one_at_a_time
def prepare_as(
    model: nn.Module,
    calibration_batches: Iterable[object],
    toolkit: str,
    weight_bits: int,
    activation_bits: int,
    keep: Sequence[str] | None,
    *,
    target: str,
    batch_fn: BatchFn,
    edges: int = 8,
    quantize_attention: bool = False,
    placement: int = PLACEMENT,
) -> nn.Module:
    """:func:`prepare`, also as earlier versions placed quantizers.

    Raises:
        QakdError: as :func:`prepare`, or ``placement`` is of a later version.
    """
    adapter, precision = _parse_request(toolkit, weight_bits, activation_bits, keep, edges, target)
    if quantize_attention and adapter.name not in _WITH_PRODUCTS:
        raise QakdError(
            f"quantize_attention=True: toolkit={adapter.name!r} cannot quantize products of two activations. Use toolkit="
            f"{' or '.join(map(repr, _WITH_PRODUCTS))}."
        )
    if not 1 <= placement <= PLACEMENT:
        raise QakdError(
            f"placement {placement} is of a later version of qakd_plugin; this one knows 1 to {PLACEMENT}: update it."
        )
    if placement < 3:
        precision = replace(precision, before_activations=True)
    if placement < 4:
        precision = replace(precision, before_sums=True)
    precision = replace(precision, placement=placement)
    _require_float(model)
    _require_plain_weights(adapter, model)
    batches = CalibrationBatches(calibration_batches, batch_splitter(batch_fn, model), device_of_network(model))
    example = batches.first
    if recurrent := [name for name, module in model.named_modules() if isinstance(module, nn.RNNBase | nn.RNNCellBase)]:
        _log.warning("%s: recurrent layers stay in floating point.", ", ".join(recurrent))
    _warn_of_sync_batch_norms(adapter, model)
    network = open_attention(model)
    added = _added(model)
    with _added_named(adapter, added, batches), _uncomputable_named(model, batches, calibration_batches):
        if quantize_attention:
            network = open_products(network, example, keep or ())
        if frozen_batch_norms(network):
            network = fold_frozen_batch_norms(network, layer_graph(network, example))
        prepared = adapter.prepare(network, example, batches, precision)
        deque(batches, maxlen=0)  # a toolkit without ranges of activations asks for none; each is checked all the same
    adapter.freeze_ranges(prepared, True)  # FX and PT2E would move them with whatever they are called on, in eval mode as well
    if added:
        _require_same(adapter, model, prepared, example, added)
    kept = None if keep is None else list(keep)
    inputs = described_inputs(example)
    asked = Preparation(adapter.name, weight_bits, activation_bits, kept, target, inputs, placement, edges, quantize_attention)
    record(prepared, asked)
    mark_pretrained(prepared)
    return prepared


@one_at_a_time
def configuration(
    model: nn.Module,
    toolkit: str = "modelopt",
    weight_bits: int = 8,
    activation_bits: int = 8,
    keep: Sequence[str] | None = None,
    *,
    edges: int = 8,
    target: Target = "tensorrt",
) -> Any:
    """The configuration that :func:`prepare` uses, for who calls the toolkit themselves. Calibration is theirs, too.

    Args:
        model: the float model; it is not changed.
        toolkit: as in :func:`prepare`.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8; 8 for torch.ao.
        keep: as in :func:`prepare`; without inputs, what only ``torch.export`` can read is not read.
        edges: as in :func:`prepare`.
        target: as in :func:`prepare`; "tensorrt" for torch.ao.

    Returns:
        - "modelopt": the dict for ``mtq.quantize``;
        - "pt2e": the Quantizer for ``prepare_qat_pt2e``;
        - "torchao": pairs (``QATConfig``, ``filter_fn``) to call ``quantize_`` with, one after the other;
        - "torch_ao": the QConfigMapping for ``prepare_qat_fx(..., backend_config=get_tensorrt_backend_config())``;
        - "torch_ao_eager": a QConfig for each named module, to assign as its ``qconfig`` before ``prepare_qat``.

    Raises:
        QakdError: as :func:`prepare`, or the toolkit has no configuration for fewer than 8 activation bits, or for ``target``.
        MissingPackageError: the toolkit is not installed.
    """
    adapter, precision = _parse_request(toolkit, weight_bits, activation_bits, keep, edges, target)
    return adapter.configuration(model, precision)


def _parse_request(
    toolkit: str, weight_bits: int, activation_bits: int, keep: Sequence[str] | None, edges: int, target: str
) -> tuple[Adapter, Precision]:
    adapter = adapter_named(toolkit)
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits), ("edges", edges)):
        if not 2 <= bits <= 8:
            raise QakdError(f"{name}={bits} is out of range: it must be 2 to 8.")
    if target not in TARGETS:
        raise QakdError(f"target={target!r} is unknown: use one of {list(TARGETS)}.")
    kept = None if keep is None else tuple(keep)
    return adapter, Precision(
        weight_bits,
        activation_bits,
        kept,
        unsigned_bytes=target != "tensorrt",
        edges=edges,
        before_activations=target != "openvino",
        before_sums=target != "openvino",
    )


def _warn_of_sync_batch_norms(adapter: Adapter, model: nn.Module) -> None:
    """Of those that will not synchronize: toolkits that fold BatchNorm know none, or leave it where it is."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if names and adapter.name in _NOT_SYNCHRONIZED:
        _log.warning(
            "%s: with toolkit=%r SyncBatchNorm %s. Use toolkit='modelopt', which keeps it, or put nn.BatchNorm2d with its "
            "state_dict in its place.",
            ", ".join(names),
            adapter.name,
            _NOT_SYNCHRONIZED[adapter.name],
        )


_NOT_SYNCHRONIZED = {
    "pt2e": "normalizes with the samples of each process, as BatchNorm does",
    "torch_ao": "is not folded into the layer before it, and tensors around it are quantized",
    "torch_ao_eager": "is not folded into the layer before it, and tensors around it are quantized",
}


def _require_float(model: nn.Module) -> None:
    if (dtype := precision_of(model)) in HALF:
        raise QakdError(
            f"model holds {dtype_name(dtype)} weights, in which steps of training are lost to rounding and "
            'codes do not lie on their grid: pass model.float(), and mixed_precision="bf16" to distill for speed.'
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise QakdError(
                f"model: {name} lies on the meta device, where it has no numbers. Load them first: "
                "model.to_empty(device='cpu') and model.load_state_dict(...)."
            )
        if parameter.dtype == torch.float64:
            raise QakdError(f"model: {name} is float64, and quantizers compute in float32: pass model.float().")
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise QakdError(f"model: {name} holds NaN or infinite weights. Load those from before they were lost.")
    try:
        adapter = adapter_for(model)
    except NotPreparedError:
        return
    raise NotPreparedError(f"model is prepared by {adapter.name} already: pass the float model, or call distill with this one.")


def _require_plain_weights(adapter: Adapter, model: nn.Module) -> None:
    """Refuse layers that compute their weight, where the toolkit would quantize what it is computed from, or nothing."""
    for name, module in model.named_modules():
        if (found := reparametrized(module)) is None or (adapter.name == "pt2e" and is_parametrized(module)):
            continue
        how, remedy = found
        raise QakdError(
            f"model: {name} ({type(module).__name__}) computes its weight by {how}, where no quantizer sees it. Make it a "
            f"parameter again before prepare: {remedy.format(name)}"
        )


def _added(model: nn.Module) -> list[str]:
    """What was added to modules from outside, and may change what they compute, in words."""
    found = []
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if is_parametrized(module):
            found.append(f"the parametrization of {where}")
        if "forward" in vars(module):
            found.append(f"the forward that was put in the place of {where}'s own")
        if has_hooks(module):
            found.append(f"a hook of {where}")
    return found


@contextmanager
def _added_named(adapter: Adapter, added: Sequence[str], batches: CalibrationBatches) -> Iterator[None]:
    """Say what a toolkit may have failed at; without anything of the kind, what it raises passes."""
    try:
        yield
    except QakdError:
        raise
    except Exception as error:
        if not added or error is batches.error:
            raise
        reason = " ".join(str(error).split())[:200]
        raise QakdError(
            f"model: toolkit={adapter.name!r} cannot prepare {', '.join(added[:3])} ({type(error).__name__}: {reason}). Write "
            "what it does in forward, or use toolkit='pt2e'."
        ) from error


@torch.no_grad()
def _require_same(adapter: Adapter, model: nn.Module, prepared: nn.Module, inputs: Inputs, added: Sequence[str]) -> None:
    """Refuse a toolkit that lost what was added and changes what the network computes; the rest is no loss."""
    unquantized = copied(prepared)
    adapter.set_mode(unquantized, False)
    adapter.freeze_ranges(unquantized, True)
    adapter.set_fake_quant(unquantized, False)
    with eval_mode(model):
        expected = named_outputs(call(model, inputs)).values()
    for wanted, found in zip(expected, named_outputs(call(unquantized, inputs)).values(), strict=True):
        if wanted.is_floating_point() and not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
            raise QakdError(
                f"model: toolkit={adapter.name!r} loses {', '.join(added[:3])}, which changes what is computed. Write what it "
                f"does in forward, or use toolkit={'modelopt' if adapter.name == 'pt2e' else 'pt2e'!r}."
            )


@contextmanager
def _uncomputable_named(model: nn.Module, batches: CalibrationBatches, given: object) -> Iterator[None]:
    """Within the block, an error that the float network raises on a batch, too, says which batch that is.

    Raises:
        QakdError: the network cannot compute a batch.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, QakdError) as error:  # a toolkit may find another reason for the same failure
        if error is not batches.error:
            _require_computable(model, batches.last, batches.index, given)
        raise


@torch.no_grad()
def _require_computable(model: nn.Module, batch: Inputs, index: int, given: object) -> None:
    try:
        with eval_mode(model), dtypes_named(model, batch, "calibration_batches"):
            call(model, batch)
    except QakdError:
        raise
    except Exception as error:  # whatever a user's network raises
        shapes = ", ".join(f"{name!r} {tuple(x.shape)} {dtype_name(x.dtype)}" for name, x in named_tensors(batch).items())
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "Yield what it was trained on, or pass batch_fn=lambda batch: (inputs, targets)."
        if isinstance(given, Tensor):
            advice = "A tensor counts as a batch per entry: pass a list of batches, [images]."
        raise QakdError(
            f"calibration_batches: {type(model).__name__} cannot compute batch {index}, {shapes}: {reason}. {advice}"
        ) from error
