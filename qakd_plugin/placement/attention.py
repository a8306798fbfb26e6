"""Attention whose projections are layers.

``nn.MultiheadAttention`` reads the weights of its projections without calling a module for them, so no toolkit can put a
quantizer there. :func:`open_attention` replaces it by a module that computes the same through four linear layers.
"""

from __future__ import annotations

import copy
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_log = logging.getLogger(__name__)


class OpenAttention(nn.Module):
    """``nn.MultiheadAttention`` as three input projections, scaled dot products, and an output projection.

    Args:
        closed: the module to take the weights of; without ``add_bias_kv`` and ``add_zero_attn``.

    Attributes:
        products: computes the scaled dot products in the place of PyTorch's operator, where they are to be quantized:
            :class:`.attention_products.AttentionProducts`.
    """

    in_proj_bias = None
    """Together with the next, tells ``nn.TransformerEncoderLayer`` not to compute everything in one kernel, on raw weights."""
    _qkv_same_embed_dim = False

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = closed.embed_dim, closed.num_heads, closed.head_dim
        self.batch_first, self.dropout = closed.batch_first, closed.dropout
        self.products: nn.Module | None = None
        if closed._qkv_same_embed_dim:
            weights = closed.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(weight.detach() for weight in (closed.q_proj_weight, closed.k_proj_weight, closed.v_proj_weight))
        biases = (None, None, None) if closed.in_proj_bias is None else closed.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        out = closed.out_proj
        self.out_proj = _linear(out.weight.detach(), None if out.bias is None else out.bias.detach())
        self.train(closed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``; ``is_causal`` is a hint there beside ``attn_mask``, and is not needed."""
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if self.products is not None:
            mixed, weights = self.products(q, k, v, mask, dropout)
        elif need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        if not need_weights:
            weights = None
        elif average_attn_weights and weights is not None:
            weights = weights.mean(dim=-3)
        joined = mixed.transpose(-3, -2) if self.batch_first else mixed.movedim(-2, 0)
        return self.out_proj(joined.flatten(-2)), weights

    def _split(self, x: Tensor) -> Tensor:
        """(N, L, E), (L, N, E) or, without a batch, (L, E) to (..., heads, L, E / heads)."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))  # type: ignore[no-untyped-call]
        return heads.transpose(-3, -2) if self.batch_first else heads.movedim(0, -2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores."""
        if attn_mask is not None:
            attn_mask = additive(attn_mask, q.dtype)
            if attn_mask.ndim == 3 and q.ndim == 4:  # (N * heads, L, S)
                attn_mask = attn_mask.reshape(-1, self.num_heads, *attn_mask.shape[1:])
        if key_padding_mask is None:
            return attn_mask
        padding = additive(key_padding_mask, q.dtype)[..., None, None, :]  # (N, S) to (N, heads, L, S)
        return padding if attn_mask is None else attn_mask + padding

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, heads={self.num_heads}, batch_first={self.batch_first}"


def open_attention(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with every ``nn.MultiheadAttention`` as :class:`OpenAttention`; ``model`` itself where it has none.

    One with ``add_bias_kv`` or ``add_zero_attn`` stays as it is, with a warning: its projections cannot be quantized.
    """
    found = {name for name, module in model.named_modules() if type(module) is nn.MultiheadAttention}
    if not found:
        return model
    model = copy.deepcopy(model)
    made: dict[nn.Module, OpenAttention] = {}
    # remove_duplicate=False: a module shared by several names stays shared.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.MultiheadAttention:
            continue
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            _log.warning("%s: add_bias_kv or add_zero_attn: its projections stay in floating point.", name or "(root)")
            continue
        opened = made.setdefault(module, OpenAttention(module))
        if not name:
            return opened
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, opened)
    return model


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans, True where nothing may pass, as one of numbers."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask.to(dtype)
