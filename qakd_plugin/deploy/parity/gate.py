"""Proof that a file computes what was trained.

Comparing logits alone cannot tell a wrong export from a rounding tie: two correct programs sum a convolution in different
orders, an activation that falls on a tie is rounded the other way in one of them, and the difference spreads. So ties are made
explicit. One program is run and its integer codes are recorded at every quantizer; the other is run with the same codes
*imposed*, and every place where it would have chosen another code must lie on a tie. With all ties settled alike, logits must
agree closely: every output, where a model has several.

The steps:
  1. the integer weight codes of the file are those of the trained model, up to the sign BatchNorm folding gives a channel;
  2. ONNX Runtime without fusions computes the export form;
  3. the export form computes the prepared model;
  4. where the file is meant for it, ONNX Runtime with all its fusions on computes the export form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...errors import ParityError
from ...export_form.modules import ActivationQDQ, StoredWeight
from ...runtimes.onnxruntime import session_options, start_session
from ..canonical.clamps import quantizers_after_relu
from ..canonical.graph import (
    COARSE_KEY,
    QUANTIZER_KEY,
    WEIGHT_KEY,
    activation_quantizers,
    constant,
    scalar,
    stored_codes,
    weight_dequantizers,
)

Array = npt.NDArray[np.float32]

Codes = dict[str, list[Array]]
"""Integer codes, as floats, of every call of every activation quantizer, by name."""

Outputs = dict[str, Array]
"""What layers put out, by name."""

TIE_TOLERANCE = 1e-2
"""How far from a tie, in steps, an activation may be rounded the other way. Float32 sums of a few thousand products differ by
up to about 1e-3 steps between programs; a wrong scale, weight or bias moves values by whole steps."""

FUSED_TIE_TOLERANCE = 0.1
"""The same with fusions on: integer kernels round the bias to a multiple of s_x * s_w, which adds up to a few hundredths."""

LOGIT_TOLERANCE = 1e-4
"""Largest deviation of logits, relative to their range, once ties are settled; of each output, where there are several."""


@dataclass(frozen=True)
class Agreement:
    """How two sets of logits compare: N samples. Of several outputs, each number is that of the one that agrees least.

    Attributes:
        top1: share of samples with the same arg max.
        sqnr_db: signal to quantization-noise ratio, dB.
        max_deviation: largest absolute difference over the range of the reference.
        samples: N.
    """

    top1: float
    sqnr_db: float
    max_deviation: float
    samples: int


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and how it came out.

    Attributes:
        weight_codes: integer weight codes found equal.
        activation_codes: integer activation codes compared.
        ties_runtime: activations on a tie that the runtime rounds the other way than the export form.
        ties_toolkit: activations on a tie that the toolkit rounds the other way than the export form.
        ties_fused: likewise, the runtime with fusions on; None where it was not run.
        runtime_deviation: runtime against export form, ties settled; over the range of the logits.
        toolkit_deviation: export form against prepared model, ties settled; likewise.
        unfused: the file without fusions against the prepared model, ties left as they fall.
        fused: the file as it is deployed, fusions on, against the prepared model; None where it was not run.
        openvino: the file in OpenVINO against the prepared model; None where it is not meant for it, or it is not installed.
    """

    weight_codes: int
    activation_codes: int
    ties_runtime: int
    ties_toolkit: int
    ties_fused: int | None
    runtime_deviation: float
    toolkit_deviation: float
    unfused: Agreement
    fused: Agreement | None
    openvino: Agreement | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain data for a report."""
        return asdict(self)


def check_parity(
    file: ir.Model,
    form: nn.Module,
    prepared: nn.Module,
    samples: Tensor,
    *,
    fused: bool,
    behind_relu: Collection[str] | None = None,
) -> ParityReport:
    """Run all steps.

    Args:
        file: the model as it will be written.
        form: the export form it came from.
        prepared: the prepared model, in eval mode with frozen ranges.
        samples: float32 (N, ...) inputs.
        fused: also check the file with the runtime's fusions on.
        behind_relu: :func:`.clamps.quantizers_after_relu` of the canonical model, where ``file`` is another form of it.

    Raises:
        ParityError: with the name of the first layer or quantizer that differs.
    """
    weight_codes = check_weight_codes(file, form)
    behind_relu = quantizers_after_relu(file.graph) if behind_relu is None else behind_relu
    runtime = "the exported file in ONNX Runtime"
    runtime_logits, codes = run_recorded(file, samples, optimize=False)
    behind = layers_behind_quantizers(file, form)

    def in_file(names: Sequence[str]) -> Outputs:
        return run_layers(file, samples, names)

    def in_prepared(names: Sequence[str]) -> Outputs:
        with recorded_outputs(prepared, names) as outputs, torch.no_grad():
            prepared(samples)
        return outputs

    runtime_check, runtime_deviation = _same(
        form, samples, runtime_logits, codes, runtime, TIE_TOLERANCE, behind, in_file, behind_relu
    )
    toolkit_logits, codes = _run_prepared(prepared, form, samples)
    toolkit_check, toolkit_deviation = _same(
        form, samples, toolkit_logits, codes, "the prepared model", TIE_TOLERANCE, behind, in_prepared
    )
    fused_check, fused_agreement = None, None
    if fused:
        fused_logits, codes = run_recorded(file, samples, optimize=True)
        fusions = f"{runtime} with fusions"
        fused_check, _ = _same(form, samples, fused_logits, codes, fusions, FUSED_TIE_TOLERANCE, behind, in_file, behind_relu)
        fused_agreement = least_agreement(toolkit_logits, fused_logits)
    return ParityReport(
        weight_codes=weight_codes,
        activation_codes=runtime_check.compared,
        ties_runtime=runtime_check.ties,
        ties_toolkit=toolkit_check.ties,
        ties_fused=None if fused_check is None else fused_check.ties,
        runtime_deviation=runtime_deviation,
        toolkit_deviation=toolkit_deviation,
        unfused=least_agreement(toolkit_logits, runtime_logits),
        fused=fused_agreement,
    )


def _same(
    form: nn.Module,
    samples: Tensor,
    logits: Sequence[Array],
    codes: Codes,
    program: str,
    tolerance: float,
    behind: Sequence[str],
    outputs_of: Callable[[Sequence[str]], Outputs],
    behind_relu: Collection[str] = (),
) -> tuple[ImposedCodes, float]:
    """Run the export form with another program's codes; raise unless only ties differ and the logits agree.

    Where they do not although all codes agree, the layers ``behind`` the last quantizers are compared one by one.
    """
    with (
        imposed_codes(form, codes, tolerance, behind_relu) as outcome,
        recorded_outputs(form, behind) as settled,
        torch.no_grad(),
    ):
        expected = arrays(form(samples))
    outcome.raise_first(program, "its export form")
    deviation = largest_deviation(logits, expected)
    if not deviation <= LOGIT_TOLERANCE:
        others = outputs_of(behind)
        differ = [
            name
            for name in settled
            if name in others and not largest_deviation([others[name]], [settled[name]]) <= LOGIT_TOLERANCE
        ]
        layer = differ[0] if differ else "logits"
        raise ParityError(
            f"{layer}: {program} and its export form differ by {deviation:.2g} of the logit range although all activation "
            f"codes agree; allowed are {LOGIT_TOLERANCE:g}. "
            + (
                "It is the first layer behind the last quantizer that computes something else."
                if differ
                else "What is behind the last quantizer computes something else."
            ),
            layer,
        )
    return outcome, deviation


def arrays(outputs: object) -> list[Array]:
    """All tensors in what a model returns, however nested, in the order that they have in an exported file."""
    return [leaf.detach().float().numpy() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def least_agreement(references: Sequence[Array], outputs: Sequence[Array]) -> Agreement:
    """Compare all outputs with references of the same shapes; each number is that of the output that agrees least."""
    found = [agreement(*pair) for pair in zip(references, outputs, strict=True)]
    return Agreement(
        top1=min(one.top1 for one in found),
        sqnr_db=min(one.sqnr_db for one in found),
        max_deviation=max(one.max_deviation for one in found),
        samples=found[0].samples,
    )


def agreement(reference: Array, logits: Array) -> Agreement:
    """Compare (N, ...) logits with a reference of the same shape."""
    if reference.ndim < 2:  # one number per sample: a single class
        reference, logits = reference.reshape(-1, 1), logits.reshape(-1, 1)
    signal = reference.astype(np.float64)
    noise = logits.astype(np.float64) - signal
    power = float((noise**2).sum())
    return Agreement(
        top1=float((reference.argmax(1) == logits.argmax(1)).mean()),
        sqnr_db=float("inf") if power == 0 else float(10 * np.log10((signal**2).sum() / power)),
        max_deviation=float(np.abs(noise).max()) / max(float(np.ptp(signal)), 1e-30),
        samples=len(reference),
    )


def check_weight_codes(file: ir.Model, form: nn.Module) -> int:
    """Step 1. Returns how many codes were compared.

    Raises:
        ParityError: a code or a scale of the file is not the trained model's; names the layer.
    """
    stored = {name: module for name, module in form.named_modules() if isinstance(module, StoredWeight)}
    compared = 0
    for node in weight_dequantizers(file.graph):
        name = node.metadata_props.get(WEIGHT_KEY, "")
        layer = name.removesuffix(".weight") or "(root)"
        weight = stored.pop(name, None)
        if weight is None:
            continue  # a layer that is called twice appears twice
        codes, scale = stored_codes(node), constant(node.inputs[1])
        assert scale is not None
        trained = weight.codes.numpy().astype(np.int32)
        for channel, bits in _coarse_channels(node):
            trained[channel] = np.rint(trained[channel] / 2.0**bits)
        problem = _codes_differ(codes.astype(np.int32), trained, 0 if weight.block else weight.axis)
        if problem:
            raise ParityError(f"{layer}: {problem} between the file and the trained model.", layer)
        if weight.block and not np.array_equal(scale, weight.scale.numpy()):
            raise ParityError(f"{layer}: the scales of its blocks differ between the file and the trained model.", layer)
        if not np.all(np.isfinite(scale) & (scale > 0)):
            raise ParityError(f"{layer}: the file holds a weight scale that is not finite and positive.", layer)
        compared += codes.size
    if stored:
        layer = next(iter(stored)).removesuffix(".weight")
        raise ParityError(f"{layer}: its stored weight is missing in the file.", layer)
    return compared


def _coarse_channels(node: ir.Node) -> list[tuple[int, int]]:
    """Output channels whose codes lost their lowest bits, with how many: see :mod:`.targets.onnxruntime_bias`."""
    pairs = (entry.split(":") for entry in node.metadata_props.get(COARSE_KEY, "").split(",") if entry)
    return [(int(channel), int(bits)) for channel, bits in pairs]


def _codes_differ(codes: npt.NDArray[np.int32], trained: npt.NDArray[np.int32], axis: int) -> str | None:
    """Codes of a channel, along ``axis``, may differ by a power of two and by a sign, or be all zero."""
    if codes.shape != trained.shape:
        return f"weight shapes differ ({codes.shape} and {trained.shape})"
    codes, trained = np.moveaxis(codes, axis, 0), np.moveaxis(trained, axis, 0)
    rows, reference = codes.reshape(len(codes), -1), trained.reshape(len(trained), -1)
    largest, wanted = (np.abs(part).max(axis=1, initial=0, keepdims=True) for part in (rows, reference))
    factor = np.where(wanted > 0, largest // np.maximum(wanted, 1), 1)
    powers = (factor & (factor - 1) == 0).all(1)
    same = powers & ((rows == reference * factor).all(1) | (rows == -reference * factor).all(1))
    if same.all():
        return None
    channel = int(np.flatnonzero(~same)[0])
    return f"integer weight codes differ, first in output channel {channel},"


def run_recorded(file: ir.Model, samples: Tensor, *, optimize: bool) -> tuple[list[Array], Codes]:
    """Outputs with or without the runtime's fusions, and the integer codes of every activation quantizer, by its calls.

    Fused kernels put out the codes that their quantizer would have, so reading them does not undo a fusion.
    """
    logits, recorded = run_labelled(file, samples, optimize=optimize)
    codes: Codes = {}
    for labels, array in recorded:
        for label in labels.split(","):
            name, _, call = label.partition("#")
            calls = codes.setdefault(name, [])
            assert len(calls) == int(call or 0), f"calls of {name} are out of order"
            calls.append(array)
    return logits, codes


def run_labelled(file: ir.Model, samples: Tensor, *, optimize: bool) -> tuple[list[Array], list[tuple[str, Array]]]:
    """As :func:`run_recorded`, for files from which quantizers were dropped too: codes with their labels, in order."""
    tapped, taps = with_codes(file)
    session = _session(tapped, optimize=optimize)
    found = [np.asarray(one, dtype=np.float32) for one in session.run(None, {session.get_inputs()[0].name: samples.numpy()})]
    count = len(found) - len(taps)
    return found[:count], [
        (labels, codes - np.float32(zero)) for (labels, zero), codes in zip(taps, found[count:], strict=True)
    ]


def check_same_bits(file: ir.Model, rewritten: ir.Model, samples: Tensor) -> None:
    """Run a file and a rewrite of it, from which quantizers may have been dropped, without fusions: not one bit may differ.

    Raises:
        ParityError: names the first quantizer whose codes differ.
    """
    (outputs, codes), (others, kept) = (run_labelled(one, samples, optimize=False) for one in (file, rewritten))
    known = dict(codes)
    pairs = [(labels, known.get(labels), array) for labels, array in kept]
    pairs += [("logits", *pair) for pair in zip(outputs, others, strict=True)]
    for labels, expected, array in pairs:
        if expected is None or not np.array_equal(expected, array):
            name = labels.partition(",")[0].partition("#")[0]
            raise ParityError(f"{name}: the file computes other numbers than before quantizers were dropped from it.", name)


def with_codes(file: ir.Model) -> tuple[ir.Model, list[tuple[str, float]]]:
    """A copy that also puts out the codes of every activation quantizer, and their labels and zero points."""
    tapped = ir.serde.deserialize_model(ir.serde.serialize_model(file))
    taps: list[tuple[str, float]] = []
    for node in activation_quantizers(tapped.graph):
        label = node.metadata_props.get(QUANTIZER_KEY)
        if label is None:
            continue
        value = node.outputs[0]
        clip = next((use.node for use in value.uses() if use.node.op_type == "Clip"), None)
        value = value if clip is None else clip.outputs[0]
        value.dtype = value.dtype or ir.DataType.INT8
        tapped.graph.outputs.append(value)
        taps.append((label, scalar(node.inputs[2] if len(node.inputs) > 2 else None, 0.0)))
    return tapped, taps


class ImposedCodes:
    """Outcome of a run with imposed codes: how many were compared, how many ties there were, the first mismatch.

    Args:
        tolerance: distance from a tie, in steps, within which a code may differ by one.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.compared = 0
        self.ties = 0
        self.mismatch: tuple[str, str] | None = None

    def raise_first(self, program: str, other: str) -> None:
        """Raise ParityError for the first quantizer whose codes differ for another reason than a tie."""
        if self.mismatch is not None:
            name, detail = self.mismatch
            raise ParityError(f"{name}: {program} and {other} quantize differently: {detail}.", name)


@contextmanager
def imposed_codes(form: nn.Module, codes: Codes, tolerance: float, behind_relu: Collection[str] = ()) -> Iterator[ImposedCodes]:
    """Within the block, every activation quantizer of ``form`` puts out the recorded codes in place of its own.

    Those that the other program has ``behind_relu`` may have their ReLU behind them here: what it will take away stays.
    """
    outcome = ImposedCodes(tolerance)
    calls: dict[str, int] = {}

    def hook(name: str) -> object:
        def impose(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            assert isinstance(module, ActivationQDQ)
            call = calls.get(name, 0)
            calls[name] = call + 1
            given = torch.from_numpy(codes[name][call])
            return _impose(module, args[0], given, outcome, name, (f"{name}#{call}" if call else name) in behind_relu)

        return impose

    handles = [
        module.register_forward_hook(hook(name))  # type: ignore[arg-type]
        for name, module in form.named_modules()
        if isinstance(module, ActivationQDQ) and name in codes
    ]
    try:
        yield outcome
    finally:
        for handle in handles:
            handle.remove()


def _impose(module: ActivationQDQ, x: Tensor, given: Tensor, outcome: ImposedCodes, name: str, behind_relu: bool) -> Tensor:
    zero_point = module.zero_point
    exact = x / module.scale
    own = torch.clamp(torch.round(exact) + zero_point, module.quant_min, module.quant_max) - zero_point
    # The codes that the ReLU of the other program took away: should there be none here, all that follows would differ.
    given = torch.where((given == 0) & (own < 0), own, given) if behind_relu else given
    differ = own != given
    outcome.compared += own.numel()
    count = int(differ.sum())
    if count:
        distance = (exact[differ] - (own[differ] + given[differ]) / 2).abs()
        steps = (own[differ] - given[differ]).abs()
        is_tie = float(steps.max()) <= 1 and float(distance.max()) <= outcome.tolerance
        if not is_tie and outcome.mismatch is None:
            outcome.mismatch = (
                name,
                f"{count} of {own.numel()} codes differ, by up to {float(steps.max()):.0f} steps, "
                f"{float(distance.max()):.2g} steps away from a rounding tie",
            )
        outcome.ties += count
    return given * module.scale


def _run_prepared(prepared: nn.Module, form: nn.Module, samples: Tensor) -> tuple[list[Array], Codes]:
    """Run the prepared model and record the codes of its activation quantizers under the export form's names."""
    codes: Codes = {}

    def hook(name: str, quantizer: ActivationQDQ) -> object:
        def record(module: nn.Module, args: object, output: Tensor) -> None:
            codes.setdefault(name, []).append(torch.round(output / quantizer.scale).numpy())

        return record

    handles = []
    seen: set[int] = set()
    for name, quantizer in form.named_modules():
        if isinstance(quantizer, ActivationQDQ) and id(quantizer) not in seen:
            seen.add(id(quantizer))
            source = prepared.get_submodule(quantizer.source)
            handles.append(source.register_forward_hook(hook(name, quantizer)))  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            logits = arrays(prepared(samples))
    finally:
        for handle in handles:
            handle.remove()
    return logits, codes


def layers_behind_quantizers(file: ir.Model, form: nn.Module) -> list[str]:
    """Names of the export form's innermost modules that the file computes behind its last quantizers."""
    quantized: set[ir.Node] = set()
    waiting = list(activation_quantizers(file.graph))
    while waiting:
        node = waiting.pop()
        if node not in quantized:
            quantized.add(node)
            waiting += [source for value in node.inputs if value is not None and (source := value.producer()) is not None]
    modules = dict(form.named_modules())
    found = dict.fromkeys(_layer_name(node) for node in file.graph if node not in quantized)
    names = [name for name in found if name in modules and not isinstance(modules[name], ActivationQDQ | StoredWeight)]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _layer_name(node: ir.Node) -> str:
    return (node.name or "").partition("/")[0]


@contextmanager
def recorded_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[Outputs]:
    """Within the block, remember what named layers put out at their last call, in the order of these calls."""
    outputs: Outputs = {}

    def record(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.pop(name, None)
            outputs[name] = output.detach().numpy()

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda module, args, output, name=name: record(name, output))
        for name in names
        if name in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def run_layers(file: ir.Model, samples: Tensor, names: Sequence[str]) -> Outputs:
    """What the file computes at the end of each named layer, without fusions."""
    tapped = ir.serde.deserialize_model(ir.serde.serialize_model(file))
    last = {_layer_name(node): node.outputs[0] for node in tapped.graph if _layer_name(node) in names}
    if not last:
        return {}
    for value in last.values():
        if not value.is_graph_output():
            value.dtype = value.dtype or ir.DataType.FLOAT
            tapped.graph.outputs.append(value)
    session = _session(tapped, optimize=False)
    found = session.run([value.name for value in last.values()], {session.get_inputs()[0].name: samples.numpy()})
    return dict(zip(last, found, strict=True))


def largest_deviation(actual: Sequence[Array], expected: Sequence[Array]) -> float:
    """Largest difference of any output over the range of what is expected of it; infinite where shapes differ."""
    if [one.shape for one in actual] != [one.shape for one in expected]:
        return float("inf")
    differences = [
        float(np.abs(one - other).max()) / max(float(np.ptp(other)), 1e-30) for one, other in zip(actual, expected, strict=True)
    ]
    return float(np.max(differences))  # unlike Python's, NumPy's keeps NaN


def _session(file: ir.Model, *, optimize: bool) -> onnxruntime.InferenceSession:
    data = ir.serde.serialize_model(file).SerializeToString()
    return start_session(data, session_options(fusions=optimize))
