"""PyTorch as a yardstick: a float module, eager or compiled. Imported only where a module is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._common.module_copy import copied
from ..errors import QakdError
from ..tasks.inputs import forward_names
from ..tasks.outputs import named_outputs
from .base import OTHER_INPUTS, Array, Input


class TorchRunner:
    """A copy of a module in eval mode, on the CPU. Fits :class:`qakd_plugin.runtimes.base.Runner`.

    Args:
        module: returns any tree of tensors, which are named by their paths. It is not changed.
        threads: of all of PyTorch, until :meth:`close`.
        precision: "float32" or "bfloat16": of weights, activations, and inputs that are floats.
        compiled: compile it with inductor, once for each batch size, on the first call with it.
    """

    load_ms: float | None = None
    outputs: tuple[str, ...] | None = None

    def __init__(self, module: nn.Module, threads: int, precision: str, *, compiled: bool) -> None:
        self.runtime, self.precision = "torch.compile" if compiled else "torch", precision
        self.inputs = {name: Input(None, None) for name in forward_names(module)[0]}
        self._dtype = getattr(torch, precision)
        model = copied(module).cpu().eval().to(self._dtype)
        self._model: Any = torch.compile(model, dynamic=False) if compiled else model
        self._threads = torch.get_num_threads()
        torch.set_num_threads(threads)

    def fit(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As they are: a module says neither shapes nor types."""
        return dict(inputs)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One call; conversion to and from bfloat16 counts.

        Args:
            inputs: by the names of forward's arguments, or by position: {"0": ..}.
        """
        tensors = {name: self._tensor(array) for name, array in inputs.items()}
        positional = [tensor for name, tensor in tensors.items() if name.isdecimal()]
        try:
            output = self._model(*positional, **{name: t for name, t in tensors.items() if not name.isdecimal()})
        except Exception as error:  # user code, or inductor, which needs a C++ compiler
            raise QakdError(
                f"{self.runtime}, {self.precision}: the module cannot run: {str(error)[:300]}. {OTHER_INPUTS}"
            ) from error
        found = named_outputs(output)
        if not found:
            raise QakdError(f"{self.runtime}: the module must return tensors, got {type(output).__name__}.")
        return {name: _array(tensor) for name, tensor in found.items()}

    def close(self) -> None:
        """Give PyTorch the threads that it had before."""
        torch.set_num_threads(self._threads)

    def _tensor(self, array: Array) -> Tensor:
        """Floats in the precision of the module, and bytes too: they are pixels, wider integers are ids."""
        tensor = torch.from_numpy(array)
        return tensor.to(self._dtype) if tensor.is_floating_point() or tensor.dtype == torch.uint8 else tensor


def _array(tensor: Tensor) -> Array:
    return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
