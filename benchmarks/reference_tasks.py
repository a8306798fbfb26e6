"""Reference tasks: a network, its data, what is matched, what is learned from labels and what is counted, for each."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import reference_networks as networks
import torch
import torch.nn.functional as F
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

import qakd_plugin as qakd
from qakd_plugin.demo.net import DigitNet
from qakd_plugin.tasks.batches import batch_splitter, default_batch
from qakd_plugin.tasks.inputs import call
from qakd_plugin.tasks.task_loss import with_targets
from qakd_plugin.training.methods import Supervision, total_loss


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
        dynamic: dimensions of the file that are open beside the batch.
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
    dynamic: Mapping[str, Mapping[int, str]] | None = None
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


def trained(task: Task) -> nn.Module:
    """The float network after a few steps on its task: its statistics and weights are those of a network that has seen data."""
    torch.manual_seed(0)
    network = task.network().train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5  # a few steps are to be enough for its statistics
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    split = batch_splitter(default_batch, network)
    batches = task.batches()
    supervision = (Supervision(task_loss=task.task_loss),)
    for step in range(task.steps):
        inputs, targets = split(batches[step % len(batches)])
        given = with_targets(network, inputs, targets) if task.task_loss == "model" else inputs
        loss, _ = total_loss(supervision, call(network, given), None, targets, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


@functools.cache
def _post_processing(network: Callable[[], nn.Module]) -> Any:
    """What turns raw outputs into boxes, whoever computed them: of the network it needs the anchors alone."""
    return network().eval()


def _detection(name: str, network: Callable[[], nn.Module], background: int, **more: Any) -> Task:
    """One of torchvision's detectors.

    Args:
        background: classes that are none of the data's; the first ones.
        more: outputs that are matched besides.
    """

    def batches() -> list[Any]:
        return [
            (images, [{**target, "labels": target["labels"] + background} for target in targets])
            for images, targets in networks.scenes_with_places()
        ]

    classes = qakd.KL(dim=2) if background else qakd.BinaryKL()
    return Task(
        name,
        network,
        batches,
        lambda: MeanAveragePrecision(backend="pycocotools"),
        match={"cls_logits": classes, "bbox_regression": qakd.SmoothL1(beta=0.1), **more},
        task_loss="model",
        metric_fn=lambda outputs, targets: (_post_processing(network).detections(outputs), targets),
        options={"monitor": "map"},
    )


def _detr_boxes(outputs: Mapping[str, Tensor], targets: list[dict[str, Tensor]]) -> tuple[list[Any], list[Any]]:
    scores, labels = outputs["logits"].softmax(-1)[..., :-1].max(-1)
    found = zip(outputs["pred_boxes"], scores, labels, strict=True)
    return [{"boxes": boxes, "scores": s, "labels": n} for boxes, s, n in found], [
        {"boxes": target["boxes"], "labels": target["class_labels"]} for target in targets
    ]


def _same_digit_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    return (networks.similarity(embeddings) - (labels == labels.roll(1, 0)).float()).square()


def _similarities(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine of neighbours against the distance of their digits."""
    return networks.similarity(embeddings), -(labels - labels.roll(1, 0)).abs().float()


TOKENS = {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}

EMBEDDINGS = Task(
    "embeddings, BERT",
    networks.small_embedder,
    networks.texts,
    SpearmanCorrCoef,
    match={"logits": qakd.Cosine()},
    task_loss=_same_digit_loss,
    metric_fn=_similarities,
    dynamic=TOKENS,
)
MINILM = replace(
    EMBEDDINGS,
    name="embeddings, MiniLM with its weights",
    network=networks.minilm,
    batches=networks.sentences,
    task_loss=lambda embeddings, expected: (networks.similarity(embeddings) - expected).square(),
    metric_fn=lambda embeddings, expected: (networks.similarity(embeddings), expected),
    steps=0,
)

TASKS = (
    Task(
        "classification",
        lambda: DigitNet(width=8),
        lambda: networks.cut(*networks.digits()),
        lambda: MulticlassAccuracy(10, average="micro"),
    ),
    Task(
        "binary, one logit",
        networks.binary_network,
        lambda: networks.cut(networks.digits()[0], networks.digits()[1] % 2),
        lambda: MetricCollection([BinaryAccuracy(), BinaryAUROC()]),
        task_loss=lambda logits, labels: F.binary_cross_entropy_with_logits(logits[:, 0], labels.float()),
        metric_fn=lambda logits, labels: (logits[:, 0].sigmoid(), labels),
        options={"monitor": "binary_auroc"},
    ),
    Task(
        "multi-label",
        networks.multi_label_network,
        networks.pairs_of_digits,
        lambda: MultilabelAveragePrecision(10),
        match={"logits": qakd.BinaryKL()},
        task_loss=nn.BCEWithLogitsLoss(),
        metric_fn=lambda logits, present: (logits.sigmoid(), present.long()),
    ),
    Task(
        "depth map, U-Net",
        networks.UNet,
        networks.depths,
        lambda: MeanSquaredError(squared=False),
        match={"logits": qakd.L2()},
        task_loss=nn.MSELoss(),
        dynamic={"input": {2: "height", 3: "width"}},
    ),
    Task(
        "segmentation, LRASPP",
        networks.lraspp,
        networks.scenes,
        lambda: MulticlassJaccardIndex(11),
        match={"out": qakd.KL(dim=1)},
    ),
    Task(
        "segmentation, DeepLabV3",
        networks.deeplab,
        networks.scenes,
        lambda: MulticlassJaccardIndex(11),
        match={"out": qakd.KL(dim=1)},
    ),
    _detection("detection, RetinaNet", networks.retinanet, 0),
    _detection("detection, FCOS", networks.fcos, 0, bbox_ctrness=qakd.BinaryKL()),
    _detection("detection, SSDLite", networks.ssdlite, 1),
    Task(
        "detection, YOLO-like with DFL",
        lambda: networks.Yolo(10),
        networks.scenes_with_classes,
        lambda: MultilabelAveragePrecision(10),
        match={"sides": qakd.KL(dim=1), "scores": qakd.BinaryKL()},
        task_loss=lambda outputs, present: F.binary_cross_entropy_with_logits(outputs["scores"], present),
        metric_fn=lambda outputs, present: (outputs["scores"].sigmoid().amax(2), present.amax(2).long()),
    ),
    Task(
        "detection, DETR",
        networks.detr,
        networks.scenes_for_detr,
        lambda: MeanAveragePrecision("cxcywh", backend="pycocotools"),
        match={"logits": qakd.KL(dim=2), "pred_boxes": qakd.L1()},
        task_loss="model",
        metric_fn=_detr_boxes,
        options={"monitor": "map"},
    ),
    Task(
        "segmentation, SegFormer",
        networks.segformer,
        networks.scene_batches,
        lambda: MulticlassJaccardIndex(11),
        task_loss="model",
        metric_fn=lambda logits, masks: (F.interpolate(logits, masks.shape[-2:], mode="bilinear"), masks),
    ),
    Task(
        "image classification, ViT",
        networks.vit,
        networks.image_batches,
        lambda: MulticlassAccuracy(10, average="micro"),
        task_loss="model",
    ),
    Task(
        "text classification, BERT",
        networks.bert,
        networks.texts,
        lambda: MulticlassF1Score(10),
        task_loss="model",
        dynamic=TOKENS,
    ),
    EMBEDDINGS,
    *([MINILM] if importlib.util.find_spec(networks.MINILM) else []),
    Task(
        "causal language model, Llama",
        networks.llama,
        networks.next_tokens,
        Perplexity,
        task_loss="model",
        metric_fn=lambda logits, labels: (logits[:, :-1], labels[:, 1:]),
        dynamic={"input_ids": {1: "sequence"}},
    ),
    Task(
        "keyword spotting, Conv1d + GRU",
        networks.KeywordSpotter,
        networks.waves,
        lambda: MulticlassAccuracy(10, average="micro"),
    ),
)
