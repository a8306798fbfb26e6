"""A program run with the integer codes that another one chose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...errors import KEEP_FLOAT, ParityError
from ...export_form.modules import ActivationQDQ
from ..canonical.labels import Call
from .recorded_codes import Codes


class ImposedCodes:
    """Outcome of a run with imposed codes.

    Attributes:
        tolerance: distance from a tie, in steps, within which a code may differ by one.
        compared: how many codes were compared.
        ties: how many of them differ on a tie.
        mismatch: the first quantizer that differs for another reason, and how.
        missing: quantizers that were called, but of which the other program recorded nothing.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.compared = 0
        self.ties = 0
        self.mismatch: tuple[str, str] | None = None
        self.missing: list[str] = []

    def differs(self, name: str, detail: str) -> None:
        """Remember the first quantizer that differs for another reason than a tie: all that follows may differ for it."""
        if self.mismatch is None:
            self.mismatch = (name, detail)

    def raise_first(self, program: str, other: str) -> None:
        """Raise ParityError for the first quantizer whose codes differ for another reason than a tie."""
        if self.mismatch is not None:
            name, detail = self.mismatch
            raise ParityError(f"{name}: {program} and {other} quantize differently: {detail}. {KEEP_FLOAT}", name)


@contextmanager
def imposed_codes(form: nn.Module, codes: Codes, tolerance: float, after_relu: Collection[Call] = ()) -> Iterator[ImposedCodes]:
    """Within the block, every activation quantizer of ``form`` outputs the recorded codes in place of its own.

    Those that the other program has ``after_relu`` may have their ReLU after them here: what it will take away stays.
    """
    outcome = ImposedCodes(tolerance)
    calls: Counter[str] = Counter()

    def hook(name: str) -> object:
        def impose(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            assert isinstance(module, ActivationQDQ)
            call = Call(name, calls[name])
            calls[name] += 1
            if name not in codes:
                outcome.missing += [name] if call.number == 0 else []
                return output
            # Calls with one and the same input may be one in the other program.
            given = torch.from_numpy(codes[name][min(call.number, len(codes[name]) - 1)])
            return _impose(module, args[0], output, given, outcome, name, call in after_relu)

        return impose

    handles = [
        module.register_forward_hook(hook(name))  # type: ignore[arg-type]
        for name, module in form.named_modules()
        if isinstance(module, ActivationQDQ)
    ]
    try:
        yield outcome
    finally:
        for handle in handles:
            handle.remove()


def _impose(
    module: ActivationQDQ,
    x: Tensor,
    output: Tensor,
    given: Tensor,
    outcome: ImposedCodes,
    name: str,
    after_relu: bool,
) -> Tensor:
    """What the module shall output for ``x`` in the place of its own ``output``: the codes that were ``given``."""
    own = output.div_(module.scale).round_()  # in place: nobody else has what the module just computed
    if given.shape != own.shape:
        outcome.differs(name, f"codes of shape {tuple(given.shape)} and {tuple(own.shape)}")
        return own.mul_(module.scale)
    # The codes that the ReLU of the other program took away: should there be none here, all that follows would differ.
    given = torch.where((given == 0) & (own < 0), own, given) if after_relu else given
    outcome.compared += own.numel()
    differ = own != given
    mine, others = own[differ], given[differ]
    if count := len(mine):
        distance = float((x[differ] / module.scale - (mine + others) / 2).abs().max())
        steps = float((mine - others).abs().max())
        if not (steps <= 1 and distance <= outcome.tolerance):
            outcome.differs(
                name,
                f"{count} of {own.numel()} codes differ, by up to {steps:.0f} steps, "
                f"{distance:.2g} steps away from a rounding tie",
            )
        outcome.ties += count
    return torch.mul(given, module.scale, out=own)
