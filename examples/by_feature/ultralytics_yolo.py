"""A YOLO of Ultralytics learns from labels, from a teacher and under quantization at once, in a loop of your own.

Ultralytics is installed by you; its licence is AGPL-3.0, which covers what you build with it.

    pip install ultralytics
    python examples/by_feature/ultralytics_yolo.py --model yolov8n.yaml     # or yolo11n.yaml, yolo26n.yaml

Scenes with one digit each. The last layers of the heads stay in floating point, and so does DFL. Exported is the part from
images to scores and distances; anchors, decoding and non-maximum suppression stay outside.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xywh2xyxy, xyxy2xywh

import qakd_plugin as qakd
from qakd_plugin.demo.data import load

SIZE = 64


class Heads(nn.Module):
    """From images to what each head says, by names that are the same in training and in eval mode, as Ultralytics' are not.

    YOLO26 has a second head, "one2one", which learns without touching the layers before it.
    """

    def __init__(self, config: str, weights: str | None = None) -> None:
        super().__init__()
        self.detector = DetectionModel(config, nc=10, verbose=False)
        if weights is not None:
            self.detector.load(load_checkpoint(weights)[0])
        self.detector.args = get_cfg()  # its loss reads the weights of its terms there

    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """Logits (N, classes, anchors) under "scores", (N, 4, anchors) in strides under "distances"; in training "raw", too."""
        outputs = self.detector(images)
        raw = outputs[1] if isinstance(outputs, tuple) else outputs
        heads = raw if "one2many" in raw else {"one2many": raw}
        dfl = self.detector.model[-1].dfl
        found = {name: {"scores": head["scores"], "distances": dfl(head["boxes"])} for name, head in heads.items()}
        return {**found, "raw": raw} if self.training else found

    @torch.no_grad()
    def detections(self, outputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels of each image, of the outputs of any such network, by path."""
        scores, distances = outputs["one2many.scores"], outputs["one2many.distances"]
        self(scores.new_zeros(1, 3, SIZE, SIZE))  # makes the anchors of this size
        head = self.detector.model[-1]
        boxes = head.decode_bboxes(distances, head.anchors[None]) * head.strides
        kept = non_max_suppression(torch.cat([boxes, scores.sigmoid()], 1), conf_thres=0.01, iou_thres=0.7)
        return [{"boxes": one[:, :4], "scores": one[:, 4], "labels": one[:, 5].long()} for one in kept]


def scenes(images: Tensor, labels: Tensor, seed: int) -> list[dict[str, Tensor]]:
    """Batches as Ultralytics has them: images (N, 3, 64, 64) with a digit of 32x32 somewhere, boxes in shares of their size."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for digits, classes in zip(images.split(32), labels.split(32), strict=True):
        corners = torch.randint(0, SIZE - 32, (len(digits), 2), generator=generator)
        canvas = torch.zeros(len(digits), 3, SIZE, SIZE)
        for image, digit, (x, y) in zip(canvas, digits, corners.tolist(), strict=True):
            image[:, y : y + 32, x : x + 32] = digit
        boxes = xyxy2xywh(torch.cat([corners, corners + 32], 1) / SIZE)
        index = torch.arange(float(len(digits)))  # which image a box is in
        batches.append({"img": canvas, "cls": classes[:, None].float(), "bboxes": boxes, "batch_idx": index})
    return batches


def targets(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What torchmetrics compares detections with."""
    pairs = zip(xywh2xyxy(batch["bboxes"]) * SIZE, batch["cls"].long(), strict=True)
    return [{"boxes": box[None], "labels": label} for box, label in pairs]


def train(network: Heads, data: list[dict[str, Tensor]], epochs: int, lr: float, kd: Any = None) -> Heads:
    """The loop: Ultralytics' own loss, and what ``attach`` adds to it."""
    criterion = network.detector.init_criterion()
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    for epoch in range(epochs):
        (kd or network).train()
        for batch in data:
            own, _ = criterion(network(batch["img"])["raw"], batch)
            loss = own.sum() / len(batch["img"])
            if kd is not None:
                loss = loss + kd.loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        (kd or network).eval()  # of kd: ranges frozen
        print(f"epoch {epoch}: loss {loss.item():.3f}", f"from the teacher {kd.parts['kl'].item():.3f}" if kd else "")
    return network


def main(
    model: str = "yolov8n.yaml",
    teacher: str | None = None,
    weights: str | None = None,
    *,
    epochs: int = 2,
    teacher_epochs: int = 12,
    images: int | None = None,
) -> tuple[float, float, float]:
    """Run the example; returns mAP of the teacher, of the student, and of its file in ONNX Runtime."""
    torch.manual_seed(0)
    digits = load()
    data = scenes(*(part[:images] for part in digits.train), seed=0)
    held_out = [(batch["img"], targets(batch)) for batch in scenes(*(part[:64] for part in digits.validation), seed=1)]

    network = train(Heads(model, weights), data, teacher_epochs, lr=2e-3)
    tutor = network if teacher is None else train(Heads(teacher), data, teacher_epochs, lr=2e-3)
    student = qakd.prepare(network, [batch["img"] for batch in data[:4]])

    foreground = lambda _, own, other: (other["one2many.scores"].sigmoid().amax(1, keepdim=True) > 0.1).expand(-1, 4, -1)  # noqa: E731
    match: dict[str, Any] = {}
    for head in tutor(held_out[0][0]):
        match[f"{head}.scores"] = qakd.BinaryKL(weight=10.0)  # most of them are of background
        match[f"{head}.distances"] = qakd.SmoothL1(beta=0.1, where=foreground)
    with qakd.attach(student, tutor, method=qakd.SQAKD(match=match)) as kd:
        train(student, data, epochs, 1e-4, kd)

    metric, detect = MeanAveragePrecision(), lambda outputs, boxes: (network.detections(outputs), boxes)
    maps = qakd.evaluate(
        student, tutor, held_out, qakd.default_batch, torch.device("cpu"), match=match, metric=metric, metric_fn=detect
    )
    student.detector.model[-1].fuse()  # Ultralytics': drops the head of YOLO26 that is not deployed
    with tempfile.TemporaryDirectory() as folder:
        sample = held_out[0][0][:8]
        qakd.export_onnx(student, sample, Path(folder) / "tensorrt.onnx", target="tensorrt")
        file = qakd.export_onnx(student, sample, Path(folder) / "student.onnx", target="onnxruntime")
        (row,) = qakd.benchmark([file], held_out, calls=20, metric=metric, metric_fn=detect)
    Console().print(qakd.console_table([row]))
    return maps["val_teacher_map"], maps["val_map"], row.metrics[0].value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="yolov8n.yaml")
    parser.add_argument("--teacher", help="another model, such as yolov8s.yaml; the float model itself by default")
    parser.add_argument("--weights", help="a .pt file to start from, read by Ultralytics")
    options = parser.parse_args()
    main(options.model, options.teacher, options.weights)
