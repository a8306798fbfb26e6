"""Networks of the transformers library, prepared: ``from_pretrained`` must not take them for float ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..toolkits.adapter import loaded_class

MARK = {"qakd_plugin": "from_pretrained does not restore its quantizers: qakd_plugin.save and qakd_plugin.load do"}
"""In the place of a quantization_config. It names no method, which is what ``from_pretrained`` refuses: a method that it does
not know it only warns of, and then loads the network without its quantizers."""


def mark_pretrained(model: nn.Module) -> None:
    """Let the config.json that ``save_pretrained`` writes say that the network is quantized.

    Not where ModelOpt's ``enable_huggingface_checkpointing`` saves and restores the quantizers beside it.

    Args:
        model: prepared; its networks of transformers, itself or within, are marked.
    """
    kind = loaded_class("transformers.modeling_utils", "PreTrainedModel")
    if kind is None or hasattr(kind, "_modelopt_cache"):
        return
    for module in model.modules():
        config: Any = module.config if isinstance(module, kind) else None
        if config is not None and getattr(config, "quantization_config", None) is None:
            config.quantization_config = dict(MARK)
