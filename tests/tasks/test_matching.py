"""What goes in, what comes out, and what is compared."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from qakd_plugin.errors import QakdError
from qakd_plugin.tasks.inputs import call, first_samples, named_tensors, require_known, sample_count, to_device
from qakd_plugin.tasks.matchers import KL, L2, BinaryKL, Cosine, SmoothL1, with_temperature
from qakd_plugin.tasks.matching import check_match, default_match, mask_of, matched_losses
from qakd_plugin.tasks.output_table import outputs_of
from qakd_plugin.tasks.outputs import named_outputs
from qakd_plugin.tasks.task_loss import with_targets

X = torch.randn(4, 3)
IDS = {"input_ids": torch.ones(4, 6, dtype=torch.long)}
Heads = namedtuple("Heads", "classes boxes")


@dataclass
class Record:
    logits: torch.Tensor
    cache: object = None


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (X, ["logits"]),
        ((X, X), ["0", "1"]),
        ({"out": X, "aux": X}, ["out", "aux"]),
        (OrderedDict(boxes={"p3": X, "p4": [X, X]}), ["boxes.p3", "boxes.p4.0", "boxes.p4.1"]),
        (Heads(X, X), ["classes", "boxes"]),
        (Record(X, object()), ["logits"]),
        ({"logits": X, "loss": None, "step": 3}, ["logits"]),
        ([], []),
    ],
)
def test_outputs_are_named_by_their_path(output, names):
    assert list(named_outputs(output)) == names


def test_outputs_of_hugging_face_are_named_by_their_fields():
    from transformers.modeling_outputs import ImageClassifierOutput

    assert list(named_outputs(ImageClassifierOutput(logits=X, hidden_states=(X, X)))) == [
        "logits",
        "hidden_states.0",
        "hidden_states.1",
    ]


@pytest.mark.parametrize(
    ("shape", "inputs", "expected"),
    [
        ((4, 10), X, KL(dim=1)),
        ((4, 10, 8, 8), X, KL(dim=1)),
        ((4, 6, 10), IDS, KL(dim=-1)),
        ((4,), X, BinaryKL()),
        ((4, 1), X, BinaryKL()),
    ],
)
def test_one_output_is_read_by_its_shape(shape, inputs, expected):
    assert default_match({"logits": torch.zeros(shape)}, inputs) == {"logits": expected}


def test_a_field_of_logits_is_taken_among_others():
    outputs = {"logits": torch.zeros(4, 10), "hidden_states.0": torch.zeros(4, 6, 8), "ids": torch.zeros(4, dtype=torch.long)}
    assert default_match(outputs, X) == {"logits": KL(dim=1)}


@pytest.mark.parametrize(
    "outputs",
    [
        {"0": torch.zeros(4, 10), "1": torch.zeros(4, 4)},
        {"out": torch.zeros(4, 10, 8, 8), "aux": torch.zeros(4, 10, 8, 8)},
        {"logits": torch.zeros(4, 6, 10)},  # (N, T, C) or (N, C, L)?
        {"logits": torch.zeros(4, 1, 8, 8)},  # depth, or one class?
        {},
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_with_the_line_to_write(outputs):
    with pytest.raises(QakdError, match=r"method=qakd.SQAKD\(match=") as caught:
        default_match(outputs, X)
    for name, tensor in outputs.items():
        assert f"{name!r} {tuple(tensor.shape)}" in str(caught.value)


def test_a_matcher_without_a_temperature_takes_the_methods():
    match = with_temperature({"a": KL(), "b": BinaryKL(temperature=1.0), "c": L2()}, 4.0)
    assert match == {"a": KL(temperature=4.0), "b": BinaryKL(temperature=1.0), "c": L2()}


@pytest.mark.parametrize(
    ("match", "student", "teacher", "message"),
    [
        ({"boxes": L2()}, {"logits": X}, {"boxes": X}, "structures differ between training and eval mode"),
        ({"nope": L2()}, {"logits": X}, {"logits": X}, r"'nope'.*'logits' \(4, 3\)"),
        ({"logits": KL()}, {"logits": X}, {"logits": torch.randn(4, 5)}, r"\(4, 5\).*\(4, 3\)"),
        ({"logits": KL()}, {"logits": torch.randn(4, 1)}, {"logits": torch.randn(4, 1)}, "BinaryKL"),
        ({"logits": KL()}, {"logits": X}, {"logits": X.softmax(1)}, "teacher outputs.*probabilities"),
        ({"logits": KL()}, {"logits": X.softmax(1)}, {"logits": X.softmax(1)}, "student and the teacher"),
        ({"m": BinaryKL()}, {"m": torch.randn(4, 9)}, {"m": torch.rand(4, 9)}, "probabilities"),
        ({"logits": KL(where="mask")}, {"logits": X}, {"logits": X + 1}, "mask.*there are input"),
        ({"logits": KL(where=lambda *_: [1])}, {"logits": X}, {"logits": X + 1}, "returned list"),
        ({"logits": KL(where=lambda *_: torch.ones(5))}, {"logits": X}, {"logits": X + 1}, "mask of shape"),
    ],
)
def test_what_would_compare_the_wrong_things_is_refused_at_the_first_batch(match, student, teacher, message):
    with pytest.raises(QakdError, match=message):
        check_match(with_temperature(match, 4.0), student, teacher, X, None)


def test_a_loss_that_nothing_can_change_is_refused():
    class Constant(L2):
        def loss(self, student, teacher, where):
            return (student - student.detach()).flatten(1).sum(1) * 0

    with pytest.raises(QakdError, match="the same whatever the student outputs"):
        check_match({"logits": Constant()}, {"logits": X}, {"logits": X}, X, None)


def test_equal_networks_are_no_reason_to_refuse():
    for matcher in (KL(temperature=4.0), L2(), SmoothL1(), Cosine()):
        check_match({"logits": matcher}, {"logits": X}, {"logits": X.clone()}, X, None)


def test_masks_come_from_inputs_targets_or_a_callable():
    inputs, targets = {"x": X, "attention_mask": torch.ones(4, 6)}, {"valid": torch.zeros(4)}
    outputs = {"logits": X}
    assert mask_of("logits", KL(), outputs, outputs, inputs, targets) is None
    assert mask_of("logits", KL(where="attention_mask"), outputs, outputs, inputs, targets) is inputs["attention_mask"]
    assert mask_of("logits", KL(where="valid"), outputs, outputs, inputs, targets) is targets["valid"]
    own = KL(where=lambda inputs, student, teacher: student["logits"][:, 0] > 0)
    assert torch.equal(mask_of("logits", own, outputs, outputs, inputs, targets), X[:, 0] > 0)


def test_every_matched_output_has_its_loss():
    student, teacher = {"a": X, "b": X}, {"a": X + 1, "b": X}
    found = matched_losses({"a": L2(), "b": L2()}, student, teacher, X, None)
    torch.testing.assert_close(found, {"a": torch.ones(4), "b": torch.zeros(4)})


@pytest.mark.parametrize("matcher", [lambda: KL(temperature=0), lambda: SmoothL1(beta=-1), lambda: L2(weight=0)])
def test_matchers_check_themselves(matcher):
    with pytest.raises(QakdError, match="must be positive"):
        matcher()


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.classes, self.boxes = nn.Linear(3, 5), nn.Linear(3, 4)

    def forward(self, x, scale=1.0, *, mask=None):
        return {"classes": self.classes(x) * scale, "boxes": self.boxes(x)}


def test_outputs_of_prints_names_shapes_and_the_line_to_write():
    text = str(outputs_of(TwoHeads(), X))
    assert "classes  (4, 5)" in text
    assert 'match={"classes": qakd.KL(dim=1), "boxes": qakd.KL(dim=1)}' in text
    one = outputs_of(nn.Linear(3, 5), X)
    assert one.hint is None
    assert one[0].matched == KL(dim=1)


def test_networks_are_called_as_their_inputs_say():
    network = TwoHeads()
    expected = network(X, 2.0)["classes"]
    for inputs in ((X, 2.0), {"x": X, "scale": 2.0}):
        assert torch.equal(call(network, inputs)["classes"], expected)
    assert torch.equal(call(network, X)["classes"], network(X)["classes"])


@pytest.mark.parametrize("inputs", [{"y": X}, (X, X, X, X), ()])
def test_inputs_that_forward_does_not_know_are_named(inputs):
    with pytest.raises(QakdError, match="its forward takes x, scale, mask"):
        require_known(TwoHeads(), inputs, "prepared_model")


def test_samples_are_counted_and_cut_in_any_structure():
    for inputs in (X, (X, 1), {"a": X, "b": torch.tensor(3)}, [X[0], X[1], X[2], X[3]]):
        assert sample_count(inputs) == 4
        assert sample_count(first_samples(inputs, 2)) == 2
    with pytest.raises(QakdError, match="batch dimension"):
        sample_count({"a": 3})


def test_tensors_among_inputs_are_named():
    assert list(named_tensors((X, {"mask": X}))) == ["0", "1.mask"]
    assert list(named_tensors({"ids": X, "flag": True})) == ["ids"]


def test_mappings_that_are_no_dict_are_opened():
    tokens = UserDict(input_ids=X, attention_mask=X)  # as tokenizers return them
    assert sample_count(first_samples(tokens, 2)) == 2
    assert {tensor.dtype for tensor in named_tensors(to_device(tokens, torch.device("meta"))).values()} == {X.dtype}
    assert all(tensor.is_meta for tensor in to_device(tokens, torch.device("meta")).values())

    class Wrapper(torch.nn.Module):
        def forward(self, **inputs):
            return inputs

    assert with_targets(Wrapper(), tokens, X).keys() == {"input_ids", "attention_mask", "labels"}
