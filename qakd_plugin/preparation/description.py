"""What a prepared model holds, as a table a person can read and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from .._common.console import cell
from .._common.module_copy import uncompiled
from ..errors import NotPreparedError, UnsupportedQuantizerError
from ..placement.targets import TARGETS
from ..quantizers.qparams import QParams
from ..toolkits import Quantizer, adapter_for
from .feasibility import target_problem


@dataclass(frozen=True)
class QuantizerDescription:
    """One quantizer.

    Attributes:
        name: dotted, in the model.
        role: "weight", "activation" or "internal".
        kind: "toolkit", or which learned quantizer :func:`qakd_plugin.use_quantizers` put in its place.
        bits: of a code. This and what follows is None where no range was calibrated, or it is dynamic.
        axis: the channel dimension of a weight with one scale per channel; None per tensor.
        block: length of the blocks that share a scale; None without blocks.
        quant_min: lowest integer code.
        quant_max: highest integer code.
        scale_min: smallest scale: the step between neighbouring codes.
        scale_max: largest scale.
        zero_point: 0 where it is symmetric; None where channels have different ones.
        problems: maps a target to the reason why it cannot take the quantizer.
    """

    name: str
    role: str
    kind: str
    bits: int | None
    axis: int | None
    block: int | None
    quant_min: int | None
    quant_max: int | None
    scale_min: float | None
    scale_max: float | None
    zero_point: int | None
    problems: dict[str, str]


@dataclass(frozen=True)
class Description:
    """A prepared model.

    Attributes:
        toolkit: that prepared it.
        model: name of its class.
        quantizers: every active one, in the order of the modules.
    """

    toolkit: str
    model: str
    quantizers: tuple[QuantizerDescription, ...]

    @property
    def weight_quantizers(self) -> int:
        return sum(q.role == "weight" for q in self.quantizers)

    @property
    def activation_quantizers(self) -> int:
        return sum(q.role == "activation" for q in self.quantizers)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def summary(self) -> str:
        """One line."""
        bits = sorted({f"W{q.bits}" if q.role == "weight" else f"A{q.bits}" for q in self.quantizers if q.bits}, reverse=True)
        learned = "".join(f" with {kind}" for kind in sorted({q.kind for q in self.quantizers} - {"toolkit"}))
        return (
            f"{self.model} prepared by {self.toolkit}{learned}: {self.weight_quantizers} weight and "
            f"{self.activation_quantizers} activation quantizers ({', '.join(bits)})"
        )

    def table(self) -> Table:
        """A rich table, one row per quantizer."""
        table = Table(title=cell(self.summary()))
        for column in ("quantizer", "role", "kind"):
            table.add_column(column)
        for column in ("bits", "codes", "axis", "scale"):
            table.add_column(column, justify="right")
        for target in TARGETS:
            table.add_column(target)
        for q in self.quantizers:
            codes = "-" if q.quant_min is None else f"{q.quant_min}..{q.quant_max}"
            scale = "-" if q.scale_min is None else f"{q.scale_min:.3g}"
            if q.scale_min != q.scale_max:
                scale = f"{q.scale_min:.3g}..{q.scale_max:.3g}"
            verdicts = (q.problems.get(target, "yes") for target in TARGETS)
            table.add_row(
                cell(q.name),
                q.role,
                q.kind,
                str(q.bits or "-"),
                codes,
                "-" if q.axis is None else str(q.axis),
                scale,
                *verdicts,
            )
        return table

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def describe(prepared_model: nn.Module) -> Description:
    """List every quantizer of a prepared model, and whether each deployment target can take it.

    Args:
        prepared_model: prepared by a supported toolkit.

    Returns:
        Data that prints as a table.

    Raises:
        NotPreparedError: no toolkit prepared the model.
    """
    prepared_model = uncompiled(prepared_model)
    adapter = adapter_for(prepared_model)
    rows = []
    for quantizer in adapter.quantizers(prepared_model):
        rule = adapter.learned(quantizer)
        kind = "toolkit" if rule is None else rule.method
        try:
            rows.append(_row(quantizer, kind, adapter.qparams(quantizer)))
        except (NotPreparedError, UnsupportedQuantizerError) as problem:
            rows.append(_row(quantizer, kind, None, str(problem)))
    return Description(adapter.name, type(prepared_model).__name__, tuple(rows))


def _row(quantizer: Quantizer, kind: str, qparams: QParams | None, problem: str | None = None) -> QuantizerDescription:
    if qparams is None:
        problems: dict[str, str] = dict.fromkeys(TARGETS, problem or "unknown")
        return QuantizerDescription(
            quantizer.fqn, quantizer.role, kind, None, None, None, None, None, None, None, None, problems
        )
    found = {target: target_problem(quantizer, qparams, target) for target in TARGETS}
    zero_points = qparams.zero_point.flatten()
    return QuantizerDescription(
        name=quantizer.fqn,
        role=quantizer.role,
        kind=kind,
        bits=qparams.bits,
        axis=qparams.axis,
        block=qparams.block,
        quant_min=qparams.quant_min,
        quant_max=qparams.quant_max,
        scale_min=float(qparams.scale.min()),
        scale_max=float(qparams.scale.max()),
        zero_point=int(zero_points[0]) if bool((zero_points == zero_points[0]).all()) else None,
        problems={target: reason for target, reason in found.items() if reason},
    )
