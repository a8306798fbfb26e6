"""Attention as two matrix products whose operands have places for quantizers.

``F.scaled_dot_product_attention`` is one operator, and what its two products multiply is seen by nobody. :func:`open_products`
lets the modules that call it compute the same with :class:`AttentionProducts`, a child of theirs.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._common.module_mode import eval_mode
from ..errors import QakdError
from ..tasks.inputs import Inputs, call
from .attention import OpenAttention, additive
from .layer_names import within

_log = logging.getLogger(__name__)

PRODUCTS = "products"
"""Name of the child that computes a module's products."""


class ProductOperand(nn.Module):
    """What a product multiplies, as it is: a quantizer on its input is one of the product's."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.alias(x)  # type: ignore[no-any-return]  # an operator of its own, which graphs show by this module


class AttentionProducts(nn.Module):
    """Scaled dot-product attention, Vaswani et al. 2017, in the operators that a runtime has integer kernels for.

    ``P = softmax(scale * Q K^T + mask)`` and ``P V``, each operand of both products in a module of its own: ``q_bmm``,
    ``k_bmm``, ``p_bmm`` (before dropout, in [0, 1]) and ``v_bmm``, as ModelOpt calls their quantizers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q_bmm, self.k_bmm, self.p_bmm, self.v_bmm = (ProductOperand() for _ in range(4))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As ``F.scaled_dot_product_attention``, argument by argument.

        Args:
            query: float (..., heads, L, E).
            key: float (..., heads, S, E); with ``enable_gqa`` fewer heads, each for several of the query.
            value: float (..., heads, S, E_v); likewise.
            attn_mask: broadcasts to (..., heads, L, S); bool, True where something passes, or float, added to the scores. Where
                nothing passes, the row of the result is 0.
            dropout_p: share of P that is dropped.
            is_causal: position i sees positions up to i.
            scale: of the scores; None for 1 / sqrt(E).
            enable_gqa: repeat the heads of key and value.

        Returns:
            The result, float (..., heads, L, E_v), and P as it was multiplied, float (..., heads, L, S).

        Raises:
            QakdError: both a mask and ``is_causal`` were given.
        """
        if is_causal and attn_mask is not None:
            raise QakdError(
                "attn_mask and is_causal=True: F.scaled_dot_product_attention takes one of them. Pass the mask alone."
            )
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        # Scaled after the product: a factor in front of a quantizer costs ONNX Runtime more, though the query is smaller.
        scores = self.q_bmm(query) @ self.k_bmm(key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~seen, float("-inf"))
        if attn_mask is None:
            weights = torch.softmax(scores, -1)
        else:
            bias = additive(~attn_mask, scores.dtype) if attn_mask.dtype == torch.bool else attn_mask
            blind = (bias == float("-inf")).all(-1, keepdim=True)
            # A row of infinities would have a softmax, and gradients, that are no numbers.
            weights = torch.softmax(scores + bias.masked_fill(blind, 0), -1).masked_fill(blind, 0)
        weights = self.p_bmm(weights)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
        return weights @ self.v_bmm(value), weights


@dataclass(frozen=True)
class Operand:
    """Something that a product of attention multiplies.

    Attributes:
        name: dotted, of a :class:`ProductOperand`.
        unsigned: it cannot be negative.
    """

    name: str
    unsigned: bool


def operands(model: nn.Module, keep: Sequence[str]) -> tuple[Operand, ...]:
    """Of all :class:`AttentionProducts` of a network, but for those that a pattern of ``keep`` matches."""
    return tuple(
        Operand(name, name.endswith(".p_bmm"))
        for name, module in model.named_modules()
        if isinstance(module, ProductOperand) and not any(within(name, pattern) for pattern in keep)
    )


def open_products(model: nn.Module, inputs: Inputs, keep: Sequence[str] = ()) -> nn.Module:
    """A copy of a network whose attention is computed by :class:`AttentionProducts`, and computes the same.

    Of every :class:`.attention.OpenAttention`, and of every module that calls ``F.scaled_dot_product_attention`` itself, once
    in its forward pass. Others that compute attention stay as they are, with a warning that says why.

    Args:
        model: the float model; it is not changed.
        inputs: a batch of it, with which it is run.
        keep: names or patterns of modules that stay as they are.

    Raises:
        QakdError: there is no attention that can be computed so.
    """
    found, left = _attention(copy.deepcopy(model), inputs)
    wanted = [name for name in found if not any(within(name, pattern) for pattern in keep)]
    if not wanted:
        among = f"keep={list(keep)} leaves all of it" if found else "; ".join(f"{', '.join(left[why])}: {why}" for why in left)
        raise QakdError(
            f"quantize_attention=True: {type(model).__name__} holds no attention to quantize"
            f"{f' ({among})' if among else ''}. Leave quantize_attention out."
        )
    for reason, names in left.items():
        _log.warning("%s: products of attention stay in floating point: %s.", ", ".join(names), reason)
    opened = copy.deepcopy(model)
    insert_products(opened, wanted)
    return opened


def insert_products(model: nn.Module, names: Iterable[str]) -> None:
    """Let modules of these names compute their attention by :class:`AttentionProducts`, in place."""
    for module in [model.get_submodule(name) for name in names]:
        setattr(module, PRODUCTS, AttentionProducts().train(module.training))
        if not isinstance(module, OpenAttention):
            kind: Any = type(module)
            module.__class__ = _redirected(kind)


class _ToProducts(TorchFunctionMode):
    """Within the block ``F.scaled_dot_product_attention`` is computed by a module."""

    def __init__(self, products: nn.Module) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.products(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


@functools.cache
def _redirected(kind: Any) -> Any:
    """A class of modules that is like ``kind``, and computes attention by its child."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _ToProducts(getattr(self, PRODUCTS)):
            return kind.forward(self, *args, **kwargs)

    # Of the same name and home: toolkits and transformers look classes up by these.
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


@dataclass
class _Call:
    """One call of a module.

    Attributes:
        name: of the module.
        attention: how often it called ``F.scaled_dot_product_attention`` itself.
        within: how often modules that it called did.
        softmax: how often it called a softmax, or modules that it called did.
        products: how often it multiplied matrices.
    """

    name: str
    attention: int = 0
    within: int = 0
    softmax: int = 0
    products: int = 0


class _Calls(TorchFunctionMode):
    """Within the block the calls of a network's modules are counted; hooks open and close them."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[_Call] = []
        self.running: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self.running:
            self.running[-1].attention += func is F.scaled_dot_product_attention
            self.running[-1].softmax += func in _SOFTMAX
            self.running[-1].products += func in _PRODUCTS
        return func(*args, **(kwargs or {}))

    def close(self) -> None:
        """The innermost call has ended."""
        ended = self.running.pop()
        self.done.append(ended)
        if self.running:
            self.running[-1].within += ended.attention + ended.within
            self.running[-1].softmax += ended.softmax


_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}

_TWICE = "call F.scaled_dot_product_attention once in a module's forward, and write another module for another call"
_OCCUPIED = f"they have an attribute {PRODUCTS!r}, or a forward that their class does not have"
_BY_HAND = (
    "they multiply matrices themselves. Where they can, let them call F.scaled_dot_product_attention (transformers: "
    'attn_implementation="sdpa", timm: fused_attn=True)'
)


@torch.no_grad()
def _attention(model: nn.Module, inputs: Inputs) -> tuple[list[str], dict[str, list[str]]]:
    """Names of modules whose attention can be computed by :class:`AttentionProducts`, and of others, by the reason.

    Args:
        model: a copy, which is consumed.
        inputs: a batch of it.
    """
    calls = _Calls()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.running.append(_Call(name)))
        module.register_forward_hook(lambda *_: calls.close(), always_call=True)
    with eval_mode(model), calls:
        call(model, inputs)
    problems: dict[str, str] = {}
    found: dict[str, None] = {}
    for ended in calls.done:
        problem = _problem(ended, model.get_submodule(ended.name))
        if problem is not None:
            problems[ended.name] = problem
        elif ended.attention or isinstance(model.get_submodule(ended.name), OpenAttention):
            found[ended.name] = None
    left: dict[str, list[str]] = {}
    for name, problem in problems.items():
        left.setdefault(problem, []).append(name or "(root)")
    return [name for name in found if name not in problems], left


def _problem(ended: _Call, module: nn.Module) -> str | None:
    """Why :class:`AttentionProducts` cannot compute the attention of a module; None where it can, or there is none."""
    if isinstance(module, OpenAttention):
        return None
    if ended.attention and ended.attention + ended.within > 1:
        return _TWICE
    if ended.attention and (hasattr(module, PRODUCTS) or "forward" in vars(module)):
        return _OCCUPIED
    return _BY_HAND if ended.products > 1 and ended.softmax and not ended.attention + ended.within else None
