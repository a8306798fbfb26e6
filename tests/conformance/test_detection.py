"""Detectors: torchvision's one-stage ones and a small YOLO of our own, from images to the raw outputs of their heads."""

import importlib.util
import logging
import runpy
from collections import OrderedDict
from pathlib import Path

import onnx
import pytest
import torch
from reference_networks import Yolo
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import FrozenBatchNorm2d

import qakd_plugin as qakd
from qakd_plugin.placement.placement import place_quantizers
from qakd_plugin.toolkits import adapter_for

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "by_feature" / "detection.py"
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LOADER = [X[:2], X[2:]]
pytestmark = pytest.mark.filterwarnings("ignore")


class Backbone(nn.Module):
    """Two levels, with BatchNorms that are frozen, as detectors are fine-tuned."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1, bias=False), FrozenBatchNorm2d(16), nn.ReLU())
        self.fine = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), FrozenBatchNorm2d(32), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1, bias=False), FrozenBatchNorm2d(32), nn.ReLU())
        for norm in (self.stem[1], self.fine[1], self.coarse[1]):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        fine = self.fine(self.stem(x))
        return OrderedDict(fine=fine, coarse=self.coarse(fine))


class Heads(nn.Module):
    """From images to the outputs of the heads."""

    def __init__(self, detector):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images):
        return self.head(list(self.backbone(images).values()))


def _ssdlite():
    norm = lambda channels: nn.BatchNorm2d(channels, eps=0.001)  # noqa: E731
    anchors = DefaultBoxGenerator([[2], [2]])
    head = SSDLiteHead([32, 32], anchors.num_anchors_per_location(), 5, norm)
    return SSD(Backbone(), anchors, (32, 32), 5, head=head)


def _anchors():
    return AnchorGenerator(sizes=((8,), (16,)), aspect_ratios=((1.0,), (1.0,)))


DETECTORS = {
    "ssdlite": (_ssdlite, {"module_list.0.1", "module_list.1.1"}),
    "fcos": (lambda: FCOS(Backbone(), 5, anchor_generator=_anchors()), {"cls_logits", "bbox_reg", "bbox_ctrness"}),
    "retinanet": (lambda: RetinaNet(Backbone(), 5, anchor_generator=_anchors()), {"cls_logits", "bbox_reg"}),
}
MATCH = {"cls_logits": qakd.BinaryKL(), "bbox_regression": qakd.SmoothL1(beta=0.1)}


def _quantized_layers(student):
    return {name for q in adapter_for(student).quantizers(student) if q.role == "weight" for name in q.layers}


@pytest.mark.parametrize(
    ("name", "toolkit"),
    [
        ("ssdlite", "modelopt"),
        ("fcos", "modelopt"),
        ("retinanet", "modelopt"),
        ("retinanet", "pt2e"),
        ("retinanet", "torch_ao"),
    ],
)
def test_detectors_of_torchvision_learn_from_what_their_heads_output(name, toolkit, caplog):
    torch.manual_seed(0)
    make, last = DETECTORS[name]
    network = Heads(make()).eval()
    student = qakd.prepare(network, LOADER, toolkit)
    layers = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    heads = layers - _quantized_layers(student)
    assert heads
    assert all(name.startswith("head.") and any(name.endswith(end) for end in last) for name in heads)
    assert all(name in caplog.text for name in heads)
    result = qakd.distill(student, network, LOADER, method=qakd.SQAKD(match=MATCH), epochs=1, seed=0, lr=1e-3)
    (row,) = result.history
    assert row["kl"] == pytest.approx(row["kl_cls_logits"] + row["kl_bbox_regression"], rel=1e-5)
    assert row["kl"] > 0


def test_keep_of_nothing_quantizes_the_heads_as_well_and_says_so(caplog):
    network = Heads(DETECTORS["retinanet"][0]()).eval()
    student = qakd.prepare(network, LOADER, keep=())
    assert "its heads are quantized: head.classification_head.cls_logits, head.regression_head.bbox_reg" in caplog.text
    assert _quantized_layers(student) == {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}


def test_both_networks_learn_from_a_detectors_own_loss_and_from_each_other():
    torch.manual_seed(0)
    wrapper = runpy.run_path(str(EXAMPLE))["RawHeads"]
    teacher = wrapper(DETECTORS["retinanet"][0]()).eval()
    boxes = [{"boxes": torch.tensor([[4.0, 4.0, 20.0, 20.0]]), "labels": torch.tensor([1])} for _ in X]
    loader = [(X[:2], boxes[:2]), (X[2:], boxes[2:])]
    student = qakd.prepare(teacher, LOADER)  # torch.fx cannot trace it: the targets steer it
    result = qakd.distill(student, teacher, loader, method=qakd.QKD(1, 1, 1, match=MATCH), task_loss="model", epochs=3, seed=0)
    alone, together, tutored = result.history
    expected = teacher(*loader[0])["loss"]
    assert 0 < alone["ce"] < 10 * float(expected)
    assert together["teacher_ce"] > 0
    assert tutored["kl_cls_logits"] > 0


def test_a_small_yolo_keeps_its_heads_and_its_dfl_in_floating_point_and_learns(tmp_path):
    torch.manual_seed(0)
    network = Yolo(3).eval()
    student = qakd.prepare(network, LOADER)
    assert network.shape is None  # looking at the graph leaves nothing in the network
    layers = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    assert layers - _quantized_layers(student) == {"boxes.0.1", "boxes.1.1", "classes.0.1", "classes.1.1", "dfl.conv"}
    placement = place_quantizers(network, (), X)
    assert {output.name for output in placement.outputs} >= {"fine.1", "coarse.1"}  # the SiLU reads them
    match = {"sides": qakd.KL(dim=1), "scores": qakd.BinaryKL()}
    result = qakd.distill(student, network, LOADER, method=qakd.SQAKD(match=match), epochs=1, seed=0)
    assert result.history[0]["kl"] > 0
    file = qakd.export_onnx(result.model, X, tmp_path / "yolo.onnx", target="onnxruntime")
    assert file.parity.toolkit_deviation < 1e-4


def test_a_whole_detector_with_its_post_processing_is_told_layer_by_layer(caplog):
    detector = DETECTORS["retinanet"][0]().eval()
    with caplog.at_level(logging.WARNING):
        placement = place_quantizers(detector, None, [X[0], X[1]])
    assert not placement.outputs
    assert "RetinaNet cannot be traced by torch.fx" in caplog.text
    assert "nor by torch.export" in caplog.text
    assert "is a detector, but which layers are its heads cannot be told" in caplog.text
    assert "in front of each layer only: backbone.stem.0, backbone.fine.0" in caplog.text


ULTRALYTICS = pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="Ultralytics is not installed")


def _ultralytics(name):
    """Images, and one of its networks with statistics of some: a fresh one lets nothing through to its last layers."""
    wrapper = runpy.run_path(str(EXAMPLE.with_name("ultralytics_yolo.py")))["Heads"]
    torch.manual_seed(0)
    network, images = wrapper(name).train(), torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        for _ in range(20):
            network(torch.rand(8, 3, 64, 64))
    return images, network.eval()


@ULTRALYTICS
@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"])
def test_ultralytics_are_quantized_but_for_bare_layers_learn_and_are_exported_for_any_batch(name, tmp_path, caplog):
    images, network = _ultralytics(name)
    network(images)  # keeps anchors for this batch
    student = qakd.prepare(network, [images])
    assert "in front of" not in caplog.text  # every quantizer is placed by the graph
    layers = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    bare = {name for name in layers if not name.endswith(".conv") or ".dfl." in name}
    assert layers - _quantized_layers(student) == bare
    outputs = [q.fqn for q in adapter_for(student).quantizers(student) if q.fqn.endswith("output_quantizer")]
    assert len(outputs) > 5  # after activations and sums: in front of layers only, there were none

    criterion = network.detector.init_criterion()
    boxes = {"cls": torch.ones(4, 1), "bboxes": torch.full((4, 4), 0.5), "batch_idx": torch.arange(4.0)}
    match = {f"{head}.scores": qakd.BinaryKL() for head in network(images)}
    with qakd.attach(student, network, method=qakd.SQAKD(match=match)) as kd:
        kd.train()
        own, _ = criterion(student(images)["raw"], boxes)
        taught = kd.loss()
        (own.sum() / len(images) + taught).backward()
        kd.eval()
    assert 0 < taught.item() < own.sum().item()
    before_head = student.detector.model[:-1]  # in the head, a box that no anchor is responsible for teaches nothing
    assert all(bool(p.grad.any()) for name, p in before_head.named_parameters() if name.endswith("conv.weight"))

    student.detector.model[-1].fuse()
    with caplog.at_level(logging.WARNING, "qakd_plugin"):
        file = qakd.export_onnx(student, images, tmp_path / "yolo.onnx", target="onnxruntime")
    assert "is fixed" not in caplog.text
    assert [value.name for value in onnx.load(file.path).graph.output] == ["one2many.scores", "one2many.distances"]
    assert file.parity.toolkit_deviation < 1e-4


@ULTRALYTICS
def test_ultralytics_are_prepared_by_pt2e_after_a_call_that_kept_anchors():
    images, network = _ultralytics("yolov8n.yaml")
    network(images)
    student = qakd.prepare(network, [images], "pt2e")
    assert student(images[:3])["one2many"]["scores"].shape == (3, 10, 84)
