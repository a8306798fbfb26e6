"""The networks of the zoo: the smallest of every family of timm, torchvision's classifiers, detectors and segmenters, and
models of Hugging Face from small configurations. Weights are random."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import page_tables
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qakd_plugin.tasks.inputs import Inputs, call

FAMILIES = page_tables.ROOT / "benchmarks" / "zoo_timm.json"
"""Of each family of timm: its smallest network, the size of its images, and what makes it smaller still."""


@dataclass(frozen=True)
class Net:
    """A network, the library it is from, and the input that it is run with.

    Attributes:
        name: in its library; of Hugging Face the model type.
        library: "torchvision", "timm" or "transformers".
        size: of the images, in pixels; of texts the number of tokens.
        samples: in a batch.
        options: what makes it smaller than its name says.
        family: of timm; empty for what is not there as one.
    """

    name: str
    library: str = "torchvision"
    size: int = 64
    samples: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"

    def make(self) -> nn.Module:
        """The float network, in training mode."""
        if self.library == "timm":
            import timm

            model: nn.Module = timm.create_model(self.name, num_classes=10, **self.options)
            return model
        if self.library == "transformers":
            return _TRANSFORMERS[self.name][0]()
        if "rcnn" in self.name or self.name.startswith(("retinanet", "fcos", "ssd")):
            return RawDetector(_torchvision(self.name))
        return _torchvision(self.name)

    def inputs(self) -> Inputs:
        """A batch."""
        if self.library == "transformers":
            return _TRANSFORMERS[self.name][1](self.samples, self.size)
        return torch.randn(self.samples, 3, self.size, self.size)


def _torchvision(name: str) -> nn.Module:
    backbone = {} if name in torchvision.models.list_models(torchvision.models) else {"weights_backbone": None}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **backbone)


class RawDetector(nn.Module):
    """A detector of torchvision from images to what its convolutional heads output: anchors, boxes and NMS stay outside."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head if hasattr(detector, "head") else detector.rpn.head

    def forward(self, images: Tensor) -> Any:
        """Of one-stage detectors {"cls_logits", "bbox_regression", ...}; of two-stage ones (objectness, deltas) by level."""
        return self.head(list(self.backbone(images).values()))


def random_weights(net: Net) -> tuple[nn.Module, Inputs]:
    """The network with random weights, BatchNorm statistics that fit them, and a batch.

    What networks start with at zero, or next to it, is drawn too: heads, biases, layer scales. A residual branch times 1e-6, or
    a head of zeros, would hide any error.
    """
    torch.manual_seed(0)
    model, inputs = net.make().train(), net.inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.abs().max()) < 1e-4:
                parameter.normal_(std=0.1)
        for norm in _batch_norms(model):  # negative gammas flip the sign of folded codes
            norm.weight.uniform_(-1.5, 1.5)
    return settled(model, inputs), inputs


def as_made(net: Net) -> tuple[nn.Module, Inputs]:
    """The network as its library makes it, BatchNorm statistics that fit, and a batch."""
    torch.manual_seed(0)
    model, inputs = net.make().train(), net.inputs()
    return settled(model, inputs), inputs


def has_zero_branches(model: nn.Module) -> bool:
    """Whether a normalization multiplies by zero, or a residual branch is: what "zero-initialised" means."""
    return any(
        parameter.numel() and not bool(parameter.any()) and parameter.ndim <= 1 and not name.endswith("bias")
        for name, parameter in model.named_parameters()
    )


@torch.no_grad()
def settled(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The network in eval mode, after forward passes that its BatchNorms took their statistics from."""
    for _ in range(8 if _batch_norms(model) else 0):
        call(model, inputs)
    return model.eval()


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]


# -- Hugging Face

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_VISION = {**_SMALL, "image_size": 32, "patch_size": 8}
_TEXT = {**_SMALL, "vocab_size": 64, "max_position_embeddings": 64}
_DECODER = {**_TEXT, "num_key_value_heads": 1, "head_dim": 16, "use_cache": False, "pad_token_id": 0}


def _pixels(samples: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(samples, 3, size, size)}


def _tokens(samples: int, size: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (samples, size)), "attention_mask": torch.ones(samples, size, dtype=torch.long)}


def _waves(samples: int, size: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(samples, 100 * size)}


def _classifier(kind: str, auto: str = "AutoModelForImageClassification", **config: Any) -> Callable[[], nn.Module]:
    """Makes a model of this type from a small configuration, with eager attention, which every exporter can write."""

    def make() -> nn.Module:
        import transformers

        settings = transformers.AutoConfig.for_model(kind, num_labels=10, **config)
        model: nn.Module = getattr(transformers, auto).from_config(settings)
        return model

    return make


def _text(kind: str, **config: Any) -> tuple[Callable[[], nn.Module], Callable[[int, int], dict[str, Tensor]]]:
    return _classifier(kind, "AutoModelForSequenceClassification", **config), _tokens


def _image(kind: str, **config: Any) -> tuple[Callable[[], nn.Module], Callable[[int, int], dict[str, Tensor]]]:
    return _classifier(kind, **config), _pixels


_STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32]}
_TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Any]]] = OrderedDict({
    "vit": _image("vit", **_VISION),
    "beit": _image("beit", **_VISION),
    "dinov2": _image("dinov2", **_VISION),
    "siglip": _image("siglip", vision_config=_VISION),
    "clip": _image("clip", vision_config={**_VISION, "projection_dim": 32}),
    "swin": _image("swin", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "swinv2": _image("swinv2", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "convnextv2": _image("convnextv2", num_stages=2, **_STAGES),
    "resnet": _image("resnet", embedding_size=16, layer_type="basic", **_STAGES),
    "regnet": _image("regnet", embedding_size=16, groups_width=8, **_STAGES),
    "mobilenet_v2": _image("mobilenet_v2", depth_multiplier=0.35),
    "mobilevit": _image(
        "mobilevit", image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 32],
        num_attention_heads=2
    ),
    "segformer": (
        _classifier(
            "segformer", "AutoModelForSemanticSegmentation", num_encoder_blocks=2, num_attention_heads=[1, 2],
            sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, **_STAGES
        ),
        _pixels,
    ),
    "yolos": (_classifier("yolos", "AutoModelForObjectDetection", **{**_VISION, "image_size": [32, 32]},
                          num_detection_tokens=4), _pixels),
    "bert": _text("bert", **_TEXT),
    "distilbert": _text("distilbert", vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64),
    "roberta": _text("roberta", **_TEXT),
    "electra": _text("electra", **_TEXT, embedding_size=16),
    "albert": _text("albert", **_TEXT, embedding_size=16),
    "deberta-v2": _text("deberta-v2", **_TEXT),
    "gpt2": _text("gpt2", vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, pad_token_id=0, use_cache=False),
    "llama": _text("llama", **_DECODER),
    "qwen3": _text("qwen3", **_DECODER),
    "wav2vec2": (
        _classifier(
            "wav2vec2", "AutoModelForAudioClassification", **_SMALL, conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 8],
            num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, classifier_proj_size=32,
            apply_spec_augment=False,
        ),
        _waves,
    ),
})  # fmt: skip

_SIZES = {
    "mobilevit": 64,
    "mobilenet_v2": 64,
    **dict.fromkeys((n for n, (_, made) in _TRANSFORMERS.items() if made is _tokens), 16),
}

TASKS = (
    "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)
"""Of torchvision, beside classifiers: one of each kind of network."""

CLASSIFIERS = (
    Net("resnet18"),
    Net("mobilenet_v2"),
    Net("mobilenet_v3_small"),
    Net("shufflenet_v2_x1_0"),
    Net("efficientnet_b0"),
    Net("vit_b_16", size=224, samples=2),
    Net("mobilenetv4_conv_small", "timm"),
    Net("convnext_atto", "timm"),
    Net("deit_tiny_patch16_224", "timm", size=224, samples=4),
)


def _families() -> tuple[Net, ...]:
    nets = []
    for family, described in json.loads(FAMILIES.read_text()).items():
        options = {
            name: tuple(value) if isinstance(value, list) else value for name, value in described.pop("options", {}).items()
        }
        nets.append(Net(family=family, library="timm", options=options, **described))
    return tuple(nets)


NETS = (
    *CLASSIFIERS,
    *(Net(name, size=96, samples=4) for name in TASKS),
    *_families(),
    *(Net(name, "transformers", size=_SIZES.get(name, 32), samples=4) for name in _TRANSFORMERS),
)
