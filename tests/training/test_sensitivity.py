"""What each layer costs in integers, against the same sums written down by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import qakd_plugin as qakd
from qakd_plugin import QakdError
from qakd_plugin.toolkits import TOOLKITS, adapter_for
from qakd_plugin.training.sensitivity import _Switches

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [X[:16], X[16:]]


class Net(nn.Module):
    """A residual block between two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        nn.init.normal_(self.head.weight)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.left(x) + self.right(x)
        return self.head(x.mean((2, 3)))


OWN = {"stem": ("stem", "norm"), "left": ("left",), "right": ("right",), "head": ("head",)}
"""Layers, and the modules that hold their quantizers: the one after the first convolution stands after its BatchNorm."""


def _prepared(toolkit="modelopt", network=None, **options):
    return qakd.prepare(Net().eval() if network is None else network, BATCHES, toolkit, 4, 4, **options)


def _by_hand(student, network, modules):
    """KL to the float network, with the quantizers of these modules on and all others off, by ModelOpt's own switch."""
    copied = copy.deepcopy(student)
    for name, module in copied.named_modules():
        if name.endswith("_quantizer"):
            module.disable() if name.rpartition(".")[0] not in modules else None
    with torch.no_grad():
        own, other = copied(X).log_softmax(1), network(X).log_softmax(1)
    return float(F.kl_div(own, other, log_target=True, reduction="batchmean"))


def test_each_layer_alone_costs_what_a_loop_by_hand_finds():
    network = Net().eval()
    student = _prepared()
    found = qakd.sensitivity(student, network, BATCHES)
    assert {row.name for row in found.rows} == OWN.keys()
    for row in found.rows:
        assert row.loss == pytest.approx(_by_hand(student, network, OWN[row.name]), rel=1e-3, abs=1e-7)
        assert row.loss > 0
    assert [row.loss for row in found.rows] == sorted((row.loss for row in found.rows), reverse=True)
    every = {name for names in OWN.values() for name in names}
    assert found.loss == pytest.approx(_by_hand(student, network, every), rel=1e-3)
    assert found.keep is None
    assert "Pass budget=" in str(found)


def test_what_is_kept_meets_the_budget_and_a_layer_less_does_not():
    network = Net().eval()
    student = _prepared()
    found = qakd.sensitivity(student, network, BATCHES)
    budget = found.loss / 2
    told = qakd.sensitivity(student, network, BATCHES, budget)
    worst = [row.name for row in found.rows]
    assert list(told.keep) == worst[: len(told.keep)]

    def lost(kept):
        left = {name for layer, names in OWN.items() if layer not in kept for name in names}
        return _by_hand(student, network, left)

    assert told.kept_lost == pytest.approx(lost(told.keep), rel=1e-3)
    assert lost(told.keep) <= budget < lost(told.keep[:-1])
    assert told.kept_layers == len(told.keep)
    assert f"keep={list(told.keep)}: {len(told.keep)} of 4 quantized layers leave integer arithmetic" in str(told)
    nothing = qakd.sensitivity(student, network, BATCHES, budget=10 * found.loss)
    assert nothing.keep == ()
    assert nothing.kept_lost == pytest.approx(found.loss)
    assert qakd.sensitivity(student, network, BATCHES, budget=0.0).keep == tuple(worst)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_every_toolkit_names_layers_as_keep_takes_them_and_leaves_the_model_as_it_was(toolkit):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    student = _prepared(toolkit, network)
    adapter = adapter_for(student)
    adapter.set_mode(student, True)
    state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    found = qakd.sensitivity(student, network, BATCHES, budget=0.0)
    assert {row.name for row in found.rows} == ({"3", "5"} if toolkit == "torchao" else {"0", "3", "5"})
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.state_dict().items())
    assert set(found.keep) <= dict(network.named_modules()).keys()


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_what_an_add_reads_is_switched_with_the_convolution_before_it(toolkit):
    student = _prepared(toolkit)
    adapter = adapter_for(student)
    switches = _Switches(adapter, student, X)
    switches.only(frozenset({"left"}))

    def is_on(q):
        return q.module._if_quant if toolkit == "modelopt" else bool(q.module.fake_quant_enabled[0])

    own = {q.fqn: is_on(q) for q in adapter.quantizers(student) if q.fqn.split(".")[0] in OWN}
    assert {name for name, on in own.items() if on} == {name for name in own if name.startswith("left.")}
    assert any("left.output" in name for name in own)


def test_a_metric_orders_layers_by_what_it_loses_and_blocks_are_measured_together():
    network = Net().eval()
    student = _prepared()
    labels = network(X).argmax(1)
    metric = MulticlassAccuracy(5, average="micro")
    found = qakd.sensitivity(student, network, [(X, labels)], 0.0, ["left", "*"], metric=metric)
    assert {row.name: set(row.layers) for row in found.rows} == {"left": {"left"}, "*": {"stem", "right", "head"}}
    with torch.no_grad():
        expected = 1 - float((student(X).argmax(1) == labels).float().mean())
    assert found.metric == pytest.approx(expected)
    assert "multiclass_accuracy" in str(found)
    assert [row.metric for row in found.rows] == sorted((row.metric for row in found.rows), reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": -1.0}, "budget=-1.0 must be 0 or more"),
        ({"budget": float("nan")}, "budget=nan must be"),
        ({"batches": []}, "batches is empty"),
        ({"teacher": None}, "teacher=None: pass the float model"),
        ({"blocks": ["layer9.*"]}, "blocks: 'layer9.*' matches no quantized layer.*'stem'"),
        ({"match": {"boxes": qakd.L2()}}, "match names 'boxes'"),
        ({"prepared_model": Net()}, "looks like a float model"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    arguments = {"prepared_model": _prepared(), "teacher": Net().eval(), "batches": BATCHES}
    with pytest.raises(QakdError, match=message):
        qakd.sensitivity(**arguments | change)
