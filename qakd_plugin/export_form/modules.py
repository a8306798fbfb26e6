"""The modules an export form is made of: a plain model in which every quantizer is explicit.

An adapter turns a prepared model into this form (:meth:`~qakd_plugin.toolkits.Adapter.export_form`): weights are stored as
integer codes with their scale, activations pass through explicit quantize-dequantize pairs, everything else is the user's own
float module. Nothing of the toolkit is left in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import ExportError, UnsupportedQuantizerError
from ..quantizers.qparams import QParams
from .ops import dq, qdq

_GRID_TOLERANCE = 1e-3
"""How far, in steps, a fake-quantized weight may lie from the grid: float32 rounding leaves about 1e-5."""

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class ActivationQDQ(nn.Module):
    """An activation quantizer: per tensor, static.

    Args:
        qparams: its numbers.
        source: dotted name of the quantizer in the prepared model.

    Raises:
        UnsupportedQuantizerError: the quantizer is not per tensor.
        ExportError: its scale is not finite and positive.
    """

    scale: Tensor

    def __init__(self, qparams: QParams, source: str) -> None:
        super().__init__()
        if qparams.scale.numel() != 1:
            raise UnsupportedQuantizerError(
                f"{source}: activations are quantized with {qparams.scale.numel()} scales; every target needs one per tensor. "
                "Prepare the model with per-tensor activations (axis=None)."
            )
        value = float(qparams.scale)
        if not 0 < value < float("inf"):
            raise ExportError(
                f"{source}: the activation scale must be finite and positive, got {value:.3g}. Calibrate on real batches again."
            )
        self.source = source
        self.name = ""
        self.zero_point = int(qparams.zero_point)
        self.quant_min = qparams.quant_min
        self.quant_max = qparams.quant_max
        self.register_buffer("scale", qparams.scale.detach().clone().float().reshape(()))

    def forward(self, x: Tensor) -> Tensor:
        return qdq(x, self.scale, self.zero_point, self.quant_min, self.quant_max, self.name)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"codes {self.quant_min}..{self.quant_max}, scale {float(self.scale):.6g}"


class StoredWeight(nn.Module):
    """Integer codes of a weight, and the scale they are multiplied with.

    Forwards of Hugging Face and timm ask a layer's weight for its dtype, device and shape: it answers as the weight would.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, qparams: QParams) -> None:
        super().__init__()
        self.axis = 0 if qparams.axis is None else qparams.axis
        self.block = qparams.block or 0
        self.bits = qparams.bits
        self.name = ""
        self.register_buffer("codes", codes)
        self.register_buffer("scale", qparams.scale.detach().clone().float())

    def forward(self) -> Tensor:
        return dq(self.codes, self.scale, self.axis, self.block, self.name)  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that the codes stand for."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Likewise."""
        return self.codes.device

    @property
    def shape(self) -> torch.Size:
        """Likewise; a linear layer's may have further columns, which fill the last block."""
        return self.codes.shape

    def extra_repr(self) -> str:
        return f"{self.bits} bits, shape {tuple(self.codes.shape)}"


class QuantizedLayer(nn.Module):
    """A convolution, linear layer or embedding whose weight is stored as integers, with the quantizers around it.

    Args:
        layer: the float layer: any ``nn.Conv*d``, ``nn.ConvTranspose*d``, ``nn.Linear`` or ``nn.Embedding``; its weight is not
            used.
        weight: stored codes in the layout of ``layer.weight``; a linear layer's may have further columns of zeros, which fill
            the last block.
        bias: float32 (out_channels,) or None.
        relu: whether a ReLU after the layer was fused with it.
        own_forward: run the forward of ``layer``'s own class, for a class that is not PyTorch's.
        input_qdq: quantizer of the input, if the toolkit keeps it in the layer.
        output_qdq: quantizer of the output, likewise.
        input_factor: what the input is multiplied with ahead of everything else, as AWQ and SmoothQuant do; it broadcasts.
    """

    bias: Tensor | None
    input_factor: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        weight: StoredWeight,
        bias: Tensor | None,
        *,
        relu: bool = False,
        own_forward: bool = False,
        input_qdq: ActivationQDQ | None = None,
        output_qdq: ActivationQDQ | None = None,
        input_factor: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.apply_layer = _OwnForward(layer) if own_forward else _functional(layer)
        self.weight = weight
        self.columns_of_zeros = weight.codes.shape[1] - layer.in_features if isinstance(layer, nn.Linear) else 0
        self.register_buffer("bias", None if bias is None else bias.detach().clone().float())
        self.register_buffer("input_factor", None if input_factor is None else input_factor.detach().clone().float())
        self.relu = relu
        self.input_qdq = input_qdq
        self.output_qdq = output_qdq
        for setting in set(getattr(layer, "__constants__", ())) - {"bias"}:  # networks may read a stride when they call it
            if hasattr(layer, setting):
                setattr(self, setting, getattr(layer, setting))

    def forward(self, x: Tensor) -> Tensor:
        if self.input_factor is not None:
            x = x * self.input_factor
        if self.input_qdq is not None:
            x = self.input_qdq(x)
        if self.columns_of_zeros:
            x = F.pad(x, (0, self.columns_of_zeros))
        x = self.apply_layer(x, self.weight(), self.bias)
        if self.relu:
            x = F.relu(x)
        return x if self.output_qdq is None else self.output_qdq(x)


class QuantizedModule(nn.Module):
    """Any other module with quantizers on its first input or its output.

    What a network asks it for, such as a weight's dtype, it answers as that module would.
    """

    def __init__(self, inner: nn.Module, input_qdq: ActivationQDQ | None, output_qdq: ActivationQDQ | None) -> None:
        super().__init__()
        self.inner = inner
        self.input_qdq = input_qdq
        self.output_qdq = output_qdq

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.input_qdq is not None:
            x = self.input_qdq(x)
        out: Tensor = self.inner(x, *args, **kwargs)
        return out if self.output_qdq is None else self.output_qdq(out)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def quantize_output(module: nn.Module, quantizer: ActivationQDQ) -> nn.Module:
    """Put a quantizer on the output of a module with children: they keep their names, which :class:`QuantizedModule` changes.

    Args:
        module: it gets the quantizer as a child, and runs it ahead of all other hooks.
        quantizer: of its only output.

    Returns:
        ``module``.
    """
    module.output_qdq = quantizer
    module.register_forward_hook(_through_output_qdq, prepend=True)
    return module


def _through_output_qdq(module: nn.Module, args: object, output: Tensor) -> Tensor:
    quantized: Tensor = module.output_qdq(output)  # type: ignore[operator]
    return quantized


class _Functional:
    """A layer without its parameters: ``(x, weight, bias) -> y``."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(layer, nn.Embedding):
            return F.embedding(x, weight, layer.padding_idx)
        if isinstance(layer, _ConvTransposeNd):
            function = _TRANSPOSED[len(layer.kernel_size)]
            return function(x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        assert isinstance(layer, _ConvNd)
        return layer._conv_forward(x, weight, bias)  # type: ignore[no-any-return, operator]


class _OwnForward:
    """A layer that computes as its own class says, with another weight and bias: ``(x, weight, bias) -> y``."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(self.layer, parameters, (x,))  # type: ignore[no-any-return]


def _functional(layer: nn.Module) -> _Functional:
    if not isinstance(layer, nn.Linear | nn.Embedding | _ConvNd):
        raise UnsupportedQuantizerError(
            f"a quantized {type(layer).__name__} has no export form: weights of convolutions, linear layers and embeddings can "
            "be exported. Exclude this layer from quantization (keep=...)."
        )
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise UnsupportedQuantizerError(
            "a quantized nn.Embedding with max_norm has no export form: its forward pass changes the weight. Set max_norm to "
            "None, or disable its quantizer."
        )
    return _Functional(layer)


def store_weight(fake_quantized: Tensor, qparams: QParams, name: str) -> StoredWeight:
    """Turn a fake-quantized weight into integer codes, and make sure that nothing is lost.

    Args:
        fake_quantized: float, the weight as the forward pass of the prepared model sees it.
        qparams: the numbers of its quantizer.
        name: dotted name of the layer, for messages.

    Raises:
        ExportError: the weight does not lie on the quantizer's grid, or the scale is not finite and positive.
        UnsupportedQuantizerError: the quantizer is asymmetric.
    """
    if not qparams.symmetric:
        raise UnsupportedQuantizerError(
            f"{name}: the weight quantizer is asymmetric (zero point {_first_nonzero(qparams.zero_point)}). No target takes an "
            "asymmetric weight: prepare the model with symmetric weights (zero_point 0)."
        )
    scale = qparams.scale.detach().float()
    if not bool(torch.all(torch.isfinite(scale) & (scale > 0))):
        raise ExportError(
            f"{name}: the weight scale must be finite and positive, got a minimum of {float(scale.min()):.3g}. "
            "Lower the learning rate of the quantizer parameters or calibrate again."
        )
    step = dq(torch.ones_like(fake_quantized, dtype=torch.int8), scale, qparams.axis or 0, qparams.block or 0, name)
    grid = fake_quantized.detach().float() / step
    codes = torch.round(grid)
    off_grid = float((grid - codes).abs().max())
    if not off_grid <= _GRID_TOLERANCE:
        raise ExportError(
            f"{name}: the fake-quantized weight lies {off_grid:.3g} steps off its own grid, so integer codes would change the "
            "model. Its quantizer's scale is stale: run one forward pass after the last optimizer step and export again."
        )
    low, high = float(codes.min()), float(codes.max())
    if low < qparams.quant_min or high > qparams.quant_max:
        raise ExportError(
            f"{name}: weight codes {low:.0f}..{high:.0f} leave the quantizer's range {qparams.quant_min}..{qparams.quant_max}. "
            "Run one forward pass and export again."
        )
    return StoredWeight(codes.to(torch.int8), qparams)


def replace_modules(root: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Put modules in the places named by their dotted names, and return ``root`` (or the replacement of "").

    Quantizers and stored weights learn their own names, under which the exported file knows them.
    """
    for name, module in replacements.items():
        if not name:
            root = module
            break
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, module)
    for name, module in root.named_modules():
        if isinstance(module, ActivationQDQ | StoredWeight):
            module.name = name
    return root


def _first_nonzero(values: Tensor) -> int:
    flat = values.flatten()
    return int(flat[flat != 0][0])
