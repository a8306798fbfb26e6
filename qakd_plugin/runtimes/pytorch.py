"""PyTorch as a yardstick: a float module, eager or compiled. Imported only where a module is measured."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import QakdError

Array = npt.NDArray[Any]


class TorchRunner:
    """A copy of a module in eval mode, on the CPU. Fits :class:`qakd_plugin.runtimes.base.Runner`.

    Args:
        module: takes float32 (N, ...), returns logits. It is not changed.
        threads: of all of PyTorch, until :meth:`close`.
        precision: "float32" or "bfloat16": of weights and activations.
        compiled: compile it with inductor, once for each batch size, on the first call with it.
    """

    load_ms: float | None = None

    def __init__(self, module: nn.Module, threads: int, precision: str, *, compiled: bool) -> None:
        self.runtime, self.precision = "torch.compile" if compiled else "torch", precision
        self._dtype = getattr(torch, precision)
        model = copy.deepcopy(module).cpu().eval().to(self._dtype)
        self._model: Any = torch.compile(model, dynamic=False) if compiled else model
        self._threads = torch.get_num_threads()
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(self, images: Array) -> Array:
        """One call; conversion to and from bfloat16 counts."""
        try:
            logits = self._model(torch.from_numpy(images).to(self._dtype))
        except Exception as error:  # user code, or inductor, which needs a C++ compiler
            raise QakdError(f"{self.runtime}, {self.precision}: the module cannot run: {str(error)[:300]}") from error
        if not isinstance(logits, torch.Tensor):
            raise QakdError(f"{self.runtime}: the module must return logits, got {type(logits).__name__}.")
        return np.asarray(logits.float().numpy())

    def close(self) -> None:
        """Give PyTorch the threads that it had before."""
        torch.set_num_threads(self._threads)
