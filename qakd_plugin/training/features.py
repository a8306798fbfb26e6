"""Feature distillation: what named layers of both networks read is compared, beside their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QakdError, TrainingError
from ..quantizers.qparams import QParams
from ..toolkits import Adapter, Quantizer


@dataclass(frozen=True)
class Features:
    """Compare inputs of layers: ``||f_S - f_T||^2 / ||f_T||^2``, per sample, mean over layers.

    Dividing by the teacher's energy makes layers of any width and depth count alike, and ``weight`` means the same everywhere.

    Args:
        layers: dotted names of layers, the same in both networks, or a mapping from the student's names to the teacher's.
        weight: factor of this loss beside the method's own.
        through_quantizer: compare on the student's grid: its features after the quantizer that the layer reads, the teacher's
            rounded and clipped with the same numbers (SQuaT, arXiv 2608.10709). Where all of a sample's round to zero, as
            they may with few bits, the energy of one code stands for theirs. Else features are compared as they come.
    """

    layers: Sequence[str] | Mapping[str, str]
    weight: float = 1.0
    through_quantizer: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not self.layers:
            raise QakdError(f"Features: layers={self.layers!r} must be a sequence of layer names, or a mapping of them.")
        if not self.weight > 0:
            raise QakdError(f"Features: weight={self.weight} must be positive.")

    @property
    def pairs(self) -> dict[str, str]:
        """Names in the student, and in the teacher."""
        return dict(self.layers) if isinstance(self.layers, Mapping) else {name: name for name in self.layers}


class FeatureTaps:
    """Hooks that pick up features during forward passes.

    Args:
        adapter: of the toolkit that prepared ``student``.
        student: the prepared model.
        teacher: the other network.
        features: which layers.

    Raises:
        QakdError: a network has no such layer, or no quantizer is read by it; says what there is.
    """

    def __init__(self, adapter: Adapter, student: nn.Module, teacher: nn.Module, features: Features) -> None:
        self.features, self._adapter = features, adapter
        self._of_student: dict[str, Tensor] = {}
        self._of_teacher: dict[str, Tensor] = {}
        self._quantizers: dict[str, Quantizer] = {}
        taught = [(name, _layer(teacher, other, "the teacher")) for name, other in features.pairs.items()]
        if features.through_quantizer:
            self._quantizers = {name: _quantizer(adapter, student, name) for name in features.pairs}
        else:
            learned = [(name, _student_layer(adapter, student, name)) for name in features.pairs]
        self._handles = [layer.register_forward_pre_hook(_keep_input(self._of_teacher, name)) for name, layer in taught]
        if features.through_quantizer:
            self._handles += [
                q.module.register_forward_hook(_keep_output(self._of_student, n)) for n, q in self._quantizers.items()
            ]
        else:
            self._handles += [layer.register_forward_pre_hook(_keep_input(self._of_student, name)) for name, layer in learned]

    def loss(self) -> Tensor:
        """Of the batch that both networks have just seen: (N,), float32. The teacher's features are detached.

        Raises:
            TrainingError: a layer was not called, or shapes differ; names it.
        """
        losses = []
        for name, other in self.features.pairs.items():
            student, teacher = self._of_student.pop(name, None), self._of_teacher.pop(name, None)
            if student is None or teacher is None:
                who, layer = (self._adapter.name + " student", name) if student is None else ("teacher", other)
                raise TrainingError(
                    f"Features: the {who} does not call {layer!r} in its forward pass, so its input cannot be seen. Name a "
                    "layer that is called, or train without features."
                )
            if student.shape != teacher.shape:
                raise TrainingError(
                    f"Features: {name!r} reads {tuple(student.shape)} in the student, {other!r} reads {tuple(teacher.shape)} "
                    "in the teacher. Name layers that read the same shape."
                )
            teacher = teacher.detach().float()
            least: Tensor = teacher.new_tensor(torch.finfo(torch.float32).tiny)
            if name in self._quantizers:
                params = self._adapter.qparams(self._quantizers[name])
                teacher = _on_grid(teacher, params)
                # The energy of a single code: with few bits all of a sample's features may round to zero.
                least = params.scale.detach().reshape(()).float().square()
            error = (student.float() - teacher).flatten(1).square().sum(1)
            losses.append(error / teacher.flatten(1).square().sum(1).clamp_min(least))
        return torch.stack(losses).mean(0)

    def added(self, loss: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """``loss`` with the weighted mean over the batch; it is listed in ``parts`` as "features"."""
        distance = self.loss().mean()
        parts["features"] = distance.detach()
        return loss + self.features.weight * distance

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._of_student.clear()
        self._of_teacher.clear()


def _on_grid(x: Tensor, params: QParams) -> Tensor:
    """Round and clip as a quantizer with one scale does."""
    scale, zero_point = params.scale.reshape(()), params.zero_point.reshape(())
    codes = torch.clamp(torch.round(x / scale) + zero_point, params.quant_min, params.quant_max)
    return (codes - zero_point) * scale


def _layer(network: nn.Module, name: str, whose: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        some = [found for found, module in network.named_modules() if found and "weight" in module._parameters]
        raise QakdError(f"Features: {whose} has no layer {name!r}; name one of its layers, e.g., {some[:4]}.") from error


def _student_layer(adapter: Adapter, student: nn.Module, name: str) -> nn.Module:
    if adapter.name == "pt2e":
        raise QakdError(
            f"Features: {name!r} is not a module of a model that PT2E has captured: its graph calls operators, where no hook "
            "fires. Use Features(..., through_quantizer=True), which reads the quantizers, or another toolkit."
        )
    return _layer(student, name, f"the {adapter.name} student")


def _quantizer(adapter: Adapter, student: nn.Module, name: str) -> Quantizer:
    activations = [quantizer for quantizer in adapter.quantizers(student) if quantizer.role == "activation"]
    for quantizer in activations:
        if name in quantizer.layers:
            if adapter.qparams(quantizer).scale.numel() != 1:
                raise QakdError(f"Features: {quantizer.fqn} has a scale per channel; through_quantizer needs one per tensor.")
            return quantizer
    some = sorted({layer for quantizer in activations for layer in quantizer.layers})
    raise QakdError(f"Features: no activation quantizer is read by {name!r}; name a layer with one, e.g., {some[:4]}.")


def _keep_input(found: dict[str, Tensor], name: str) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found[name] = args[0]

    return hook


def _keep_output(found: dict[str, Tensor], name: str) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        found[name] = output

    return hook
