"""The configuration for ``mtq.quantize``."""

from __future__ import annotations

from typing import Any

from ...placement.placement import OutputQuantizer, Placement
from ...placement.sums import Sum
from ..adapter import Precision


def modelopt_config(placement: Placement, precision: Precision) -> dict[str, Any]:
    """The configuration for ``mtq.quantize`` that :func:`qakd_plugin.prepare` uses.

    Quantizers after a convolution stand in front of its ReLU, where ModelOpt's unsigned ones would refuse negative values.
    Where unsigned codes are wanted they stand after it, if a module returns what it lets through.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]

    def enable(name: str, **attributes: Any) -> None:
        entries.append({"quantizer_name": name, "cfg": attributes, "enable": True})

    for layer in placement.layers:
        edge = layer in placement.edges
        bits = precision.bits_of_weight(edge)
        axis = 1 if layer in placement.transposed and precision.placement > 1 else 0
        enable(f"{layer}.weight_quantizer", num_bits=bits, axis=axis, narrow_range=bits == 8)
        bits = 8 if edge else precision.activation_bits
        if bits < 8 or layer not in placement.covered:
            enable(
                f"{layer}.input_quantizer",
                num_bits=bits,
                axis=None,
                unsigned=precision.is_unsigned(bits, layer in placement.unsigned),
            )
    for output in placement.outputs:
        enable(output_name(output, precision), num_bits=8, axis=None, unsigned=_is_after_clamp(output, precision))
    for total in placement.sums:
        enable(_name(total, precision), num_bits=8, axis=None, unsigned=precision.is_unsigned(8, total.unsigned))
    for operand in placement.operands:
        unsigned = precision.is_unsigned(8, operand.unsigned)
        enable(f"{operand.name}.input_quantizer", num_bits=8, axis=None, unsigned=unsigned)
    return {"quant_cfg": entries, "algorithm": "max"}


def output_name(output: OutputQuantizer, precision: Precision) -> str:
    """ModelOpt's name of a quantizer that a placement wants."""
    if _is_after_clamp(output, precision):
        return f"{output.after_clamp}.output_quantizer"
    return f"{output.name}.{'input' if output.in_front else 'output'}_quantizer"


def quantized_modules(placement: Placement, precision: Precision) -> list[str]:
    """Names of the modules that hold a quantizer, some of them twice."""
    outputs = (output_name(output, precision).rpartition(".")[0] for output in placement.outputs)
    sums, operands = (total.name for total in placement.sums), (operand.name for operand in placement.operands)
    return [*placement.layers, *outputs, *sums, *operands]


def joined_quantizers(placement: Placement, precision: Precision) -> dict[str, str]:
    """Names of quantizers that should have one grid, with the name of their group's first; others have none."""
    found: dict[str, str] = {}
    for group in placement.joined:
        names = [_name(quantizer, precision) for quantizer in group]
        found.update(dict.fromkeys(names, names[0]))
    return found


def _name(quantizer: OutputQuantizer | Sum | str, precision: Precision) -> str:
    if isinstance(quantizer, OutputQuantizer):
        return output_name(quantizer, precision)
    return f"{quantizer}.input_quantizer" if isinstance(quantizer, str) else f"{quantizer.name}.output_quantizer"


def _is_after_clamp(output: OutputQuantizer, precision: Precision) -> bool:
    return output.after_clamp is not None and precision.is_unsigned(8, non_negative=True) and precision.placement > 1
