"""The engine benchmark writes failures down, and says what was missed."""

import copy
import json
import os

import engines
import pytest
from zoo import Net

from qakd_plugin.errors import ExportError


def refuse(reason):
    raise ExportError(reason)


@pytest.mark.parametrize(
    ("step", "argument", "problem"), [(refuse, "too\nlarge", "too large"), (os._exit, 3, "the process was killed, or crashed.")]
)
def test_a_step_that_fails_or_dies_leaves_its_reason(step, argument, problem):
    assert engines.in_child(step, argument) == {"problem": problem}


def test_engines_that_were_not_built_are_not_run(tmp_path):
    cells = {
        "a": {"export": {"problem": "no"}},
        "b": {"export": {"problem": None}, "build": {"problem": "SM90 is not supported"}},
    }
    assert engines.run_engines({"a": tmp_path, "b": tmp_path}, cells) == {}
    table = engines.make_table({"gpu": {"gpu": {"name": "X", "capability": "SM90"}, "cells": cells}})
    assert "| b | - | - | - | SM90 is not supported |" in table


@pytest.mark.parametrize("name", [net.name for net in engines.NETS])
def test_every_network_of_the_committed_figures_computes_in_integers(name):
    cells = json.loads(engines.RESULTS.read_text())["builds"]["cells"]
    net = next(net for net in engines.NETS if net.name == name)
    assert {f"{name} {form.name}" for form in engines.forms_of(net)} <= set(cells)
    for form in engines.forms_of(net):
        build = cells[f"{name} {form.name}"]["build"]
        if form.bits is not None:
            assert build["with_weights_in_float"] == []
        if form.bits == (4, 8):
            assert build["int4_layers"] == build["with_weights"] - 2, "all but the first and the last layer"


def test_what_is_missed_is_said():
    cells = json.loads(engines.RESULTS.read_text())["builds"]["cells"]
    slow = copy.deepcopy(cells["resnet50 INT8"])
    slow["export"]["seconds"], slow["build"]["seconds"] = 31.0, 11.0
    slow["build"]["with_weights_in_float"] = ["conv1/Conv"]
    lines = engines.verdicts({"builds": {"cells": {"resnet50 INT8": slow}}})
    assert sum("MISSED" in line for line in lines) == 3
    assert "conv1/Conv" in lines[-1]


def test_the_cifar_network_is_the_other_benchmarks_own():
    net = next(net for net in engines.NETS if net.name == "resnet20")
    assert isinstance(net, Net)
    assert sum(parameter.numel() for parameter in net.make().parameters()) == pytest.approx(2.72e5, rel=0.01)
