"""The graph of torch.export read as one of torch.fx: one placement where both can trace, and one where only it can."""

import logging

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import Structures, Transformer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

import qakd_plugin as qakd
from qakd_plugin.placement import placement as module
from qakd_plugin.placement.placement import OutputQuantizer, place_quantizers

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


class Functions(nn.Module):
    """In-place operators, views, slices and ReLUs as functions, a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.b(x)
        y += x
        z = torch.relu_(y)
        left, right = z[:, :2], z[:, 2:]
        z = torch.cat([left, right.neg_()], 1)
        return self.head(self.c(self.b(z) * 2).mean((2, 3)))


def _by_export(model, inputs, monkeypatch):
    def refuse(*_):
        raise TypeError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(module._Tracer, "trace", refuse)
        return place_quantizers(model, (), inputs)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Structures, (1, 1, 32, 32)),
        (Transformer, (1, 1, 32, 32)),
        (Functions, (1, 4, 8, 8)),
        (torchvision.models.mobilenet_v3_small, (1, 3, 64, 64)),
        (torchvision.models.shufflenet_v2_x0_5, (1, 3, 64, 64)),
    ],
)
def test_both_graphs_of_a_network_give_one_placement(make, shape, monkeypatch):
    model = make().eval()
    assert _by_export(model, torch.randn(shape), monkeypatch) == place_quantizers(model, ())


def test_transformers_of_hugging_face_are_placed_by_their_graph(caplog):
    image = {"pixel_values": torch.rand(2, 3, 64, 64)}
    vit = place_quantizers(ViTForImageClassification(ViTConfig(image_size=64, patch_size=16, **SMALL)).eval(), None, image)
    assert vit.edges == {"vit.embeddings.patch_embeddings.projection", "classifier"}
    assert vit.outputs == (OutputQuantizer("vit.embeddings.patch_embeddings.projection", None),)
    words = {"input_ids": torch.randint(50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    bert = place_quantizers(BertForSequenceClassification(BertConfig(vocab_size=50, **SMALL)).eval(), None, words)
    assert bert.edges == {f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")} | {"classifier"}
    settings = {
        "depths": [1] * 4,
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
    }
    network = SegformerForSemanticSegmentation(SegformerConfig(**settings)).eval()
    segformer = place_quantizers(network, None, image)
    assert segformer.unsigned == {"decode_head.classifier"}  # which reads a ReLU
    convolutions = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    read_by_layers = {"decode_head.linear_fuse", "decode_head.classifier"}
    assert {output.name for output in segformer.outputs} == convolutions - read_by_layers
    assert "cannot be traced" not in caplog.text


class Looping(nn.Module):
    """Iterates over a tensor, which torch.fx cannot follow; a convolution feeds an add."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.kept = None

    def forward(self, x):
        x = self.stem(x)
        self.kept = x
        x = self.branch(x) + x
        return torch.stack([self.head(row.mean((1, 2))) for row in x])


def test_a_convolution_that_feeds_an_add_gets_its_quantizer_and_nothing_of_the_tracer_stays(caplog):
    model, images = Looping().eval(), [torch.randn(4, 3, 8, 8)]
    student = qakd.prepare(model, images)
    names = {quantizer.name for quantizer in qakd.describe(student).quantizers}
    assert {"stem.output_quantizer", "branch.output_quantizer"} <= names
    assert model.kept is None
    with caplog.at_level(logging.WARNING):
        qakd.configuration(model)
    assert "torch.export, which may, needs example inputs" in caplog.text
    assert "in front of each layer only: stem, branch, head" in caplog.text


def test_what_neither_can_read_is_told_with_both_reasons_and_layer_by_layer(caplog):
    class Unreadable(Looping):
        def forward(self, x):
            if float(x.mean()) > 1e9:
                raise ValueError("too bright")
            return super().forward(x)

    with caplog.at_level(logging.WARNING):
        placement = place_quantizers(Unreadable().eval(), None, torch.randn(4, 3, 8, 8))
    assert placement.layers == ("stem", "branch", "head")
    assert "by torch.fx (" in caplog.text
    assert "nor by torch.export (" in caplog.text
    assert "in front of each layer only: stem, branch, head" in caplog.text
