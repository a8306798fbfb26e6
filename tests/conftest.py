"""Shared: real digits, a small teacher trained on them once, prepared students."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, also for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from nets import Structures, trained
from torch import nn

from qakd_plugin import prepare, use_quantizers
from qakd_plugin.demo.data import Digits, load
from qakd_plugin.demo.net import DigitNet, train_float

os.environ.setdefault("COLUMNS", "160")
TOOLKITS = ("modelopt", "torch_ao")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    if "OMP_NUM_THREADS" not in os.environ:  # two threads waste most of their time where cores are shared
        torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def _operators_read_once() -> Iterator[None]:
    """The exporter parses the source of all its operators again for every export: half of what a tiny network's takes."""
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="session", autouse=True)
def _patterns_of_layers_that_are_there() -> Iterator[None]:
    """prepare_qat_pt2e traces three patterns for each kind of convolution, whether a network has any: most of what a tiny one's
    takes."""
    from torchao.quantization.pt2e import qat_utils

    whole = qat_utils._fuse_conv_bn_qat_helper

    def fuse(m: torch.fx.GraphModule, conv_fn: Any, *args: Any, **kwargs: Any) -> torch.fx.GraphModule:
        is_there = any(str(node.target).startswith(f"aten.{conv_fn.__name__}.") for node in m.graph.nodes)
        return whole(m, conv_fn, *args, **kwargs) if is_there else m

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat_utils, "_fuse_conv_bn_qat_helper", fuse)
        yield


@pytest.fixture(scope="session")
def digits() -> Digits:
    return load(seed=0)


@pytest.fixture(scope="session")
def _trained_teacher(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    return train_float(DigitNet(width=8), digits.loader("train", shuffle=True), epochs=15, lr=1e-2)


@pytest.fixture
def teacher(_trained_teacher: nn.Module) -> nn.Module:
    return copy.deepcopy(_trained_teacher)


@pytest.fixture(scope="session")
def calibration(digits: Digits) -> list[torch.Tensor]:
    return [digits.train[0][start : start + 64] for start in range(0, 256, 64)]


@pytest.fixture(scope="session")
def make_student(_trained_teacher: nn.Module, calibration: list[torch.Tensor]):
    """A prepared student of the teacher, each call another copy: ``make_student("modelopt", 8)``."""

    @functools.cache
    def made(toolkit: str, bits: int, options: tuple[tuple[str, object], ...]) -> nn.Module:
        return prepare(_trained_teacher, calibration, toolkit, weight_bits=bits, activation_bits=bits, **dict(options))

    def make(toolkit: str = "modelopt", bits: int = 8, **options) -> nn.Module:
        return copy.deepcopy(made(toolkit, bits, tuple(sorted(options.items()))))

    return make


@pytest.fixture
def batches(digits: Digits) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Six labelled batches of 32."""
    images, labels = digits.train
    return [(images[start : start + 32], labels[start : start + 32]) for start in range(0, 192, 32)]


@pytest.fixture(scope="session")
def network(digits):
    torch.manual_seed(0)
    return trained(Structures(functional=True), *digits.train, steps=30)


@pytest.fixture
def mentor(network):
    return copy.deepcopy(network)


@pytest.fixture(scope="session")
def prepared(network, digits):
    """One prepared student per toolkit; tests take copies."""
    made = {}

    def make(toolkit="modelopt", quantizers=None):
        if toolkit not in made:
            made[toolkit] = prepare(network, [digits.train[0][:64]], toolkit, weight_bits=8, activation_bits=8)
        student = copy.deepcopy(made[toolkit])
        return student if quantizers is None else use_quantizers(student, quantizers)

    return make
