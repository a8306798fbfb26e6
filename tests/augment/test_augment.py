"""Choosing an augmentation: candidates, ranking, races, the selector inside a run."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from interruption import Stop, StopAt
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from qakd_plugin import (
    KD,
    QAT,
    QKD,
    SQAKD,
    CMISelector,
    LabelsRequiredError,
    NotPreparedError,
    QakdError,
    cmi_score,
    distill,
    rank_augmentations,
    write_report,
)
from qakd_plugin.augment import Candidate, Search, default_candidates
from qakd_plugin.augment.compositions import OPERATIONS, Composition

FEW = ("none", "cutmix", "randomerasing", "autoaugment-svhn+cutmix")


def _scores(ranking):
    return {record.name: record for record in ranking}


# -- candidates


def test_the_default_candidates_are_the_sixteen_of_the_paper():
    names = [candidate.name for candidate in default_candidates()]
    assert len(set(names)) == 16
    assert sum(candidate.mix == "cutmix" for candidate in default_candidates()) == 8


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("candidate", default_candidates(), ids=lambda candidate: candidate.name)
def test_a_candidate_keeps_float_images_grey_or_colour_in_range(candidate, channels):
    images = torch.rand(24, channels, 20, 16)
    augmented, labels = candidate(images, torch.arange(24) % 5, num_classes=5)
    assert augmented.shape == images.shape
    assert augmented.dtype == images.dtype
    assert 0 <= augmented.min() <= augmented.max() <= 1
    if candidate.mix:
        torch.testing.assert_close(labels.sum(1), torch.ones(24))
    else:
        assert torch.equal(labels, torch.arange(24) % 5)


@pytest.mark.parametrize("candidate", default_candidates()[1:], ids=lambda candidate: candidate.name)
def test_each_image_gets_its_own_draw(candidate):
    """Forty copies of one image: one draw for the whole batch would leave them equal. (CutMix needs another to mix with.)"""
    image = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    images = torch.stack([image, 1 - image] * 20)
    augmented, _ = candidate(images, seeds=list(range(40)))
    assert len({row.numpy().tobytes() for row in augmented[::2]}) > 5


@pytest.mark.parametrize("candidate", default_candidates(), ids=lambda candidate: candidate.name)
def test_equal_seeds_make_equal_draws_whatever_the_rest_of_the_batch(candidate):
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    whole, _ = candidate(images, seeds=list(range(12)))
    part, _ = candidate(images[4:8], seeds=list(range(4, 8)))
    rows = slice(1, None) if candidate.mix else slice(None)  # the partner of the first is another image
    assert torch.equal(part[rows], whole[4:8][rows])


def test_cutmix_labels_are_the_shares_of_the_area():
    images = torch.cat([torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)]).repeat(20, 1, 1, 1)
    mixed, labels = Candidate("cutmix", mix="cutmix")(images, torch.arange(40) % 2, num_classes=2)
    torch.testing.assert_close(labels[:, 1], mixed.mean((1, 2, 3)), rtol=0, atol=1e-6)
    assert labels[:, 1].std() > 0.05


def test_torchvision_transforms_draw_per_image_and_other_callables_get_the_batch(teacher, digits):
    shapes = []

    def whole(x):
        shapes.append(tuple(x.shape))
        return x

    class Spy(v2.Transform):
        def transform(self, inpt, params):
            shapes.append(tuple(inpt.shape))
            return inpt

    rank_augmentations(teacher, digits.loader("train"), {"whole": whole, "spy": Spy()}, max_samples=40)
    assert set(shapes) == {(40, 1, 32, 32), (1, 32, 32)}


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda x: x[..., :16], "'bad' must keep shape and dtype: it made"),
        (lambda x: x.double(), "'bad' must keep shape and dtype"),
        (lambda x: 2 * x, r"'bad' must keep images in \[0, 1\]: it made values from 0 to 2"),
        (lambda x: x * float("nan"), r"'bad' must keep images in \[0, 1\]"),
        (lambda x: x @ torch.zeros(3), "'bad' failed on images"),
        (lambda x: None, "'bad' must keep shape and dtype: it made NoneType"),
    ],
)
def test_a_candidate_that_breaks_the_contract_is_named(teacher, digits, transform, message):
    with pytest.raises(QakdError, match=message):
        rank_augmentations(teacher, digits.loader("train"), {"none": None, "bad": transform}, max_samples=40)


def test_overshoot_by_rounding_is_clamped():
    images, _ = Candidate("over", lambda x: x + 5e-4, per_image=False)(torch.ones(2, 1, 4, 4))
    assert images.max() == 1


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "empty"),
        (["none", "none"], "more than once"),
        (["augmx"], "unknown"),
        ("none", "dict of callables"),
        ({"a": 3}, "callable"),
    ],
)
def test_candidates_that_are_none_are_named(candidates, message):
    with pytest.raises(QakdError, match=message):
        CMISelector(candidates=candidates)


# -- ranking


def test_scores_equal_those_of_the_augmented_images(teacher, digits):
    """Flipping is deterministic, so the whole data can be augmented by hand."""
    images, labels = digits.train
    ranking = rank_augmentations(teacher, digits.loader("train"), {"none": None, "flip": lambda x: x.flip(-1)}, race=False)
    for name, x in (("none", images), ("flip", images.flip(-1))):
        with torch.no_grad():
            expected = cmi_score(teacher(x), labels)
        found = _scores(ranking)[name]
        assert found.num_samples == len(images)
        for part in ("score", "cmi", "centroid_divergence", "cross_entropy", "variance"):
            assert getattr(found, part) == pytest.approx(getattr(expected, part), abs=1e-5)
    assert ranking[0].score >= ranking[1].score


def test_data_of_any_kind_hold_the_same_images(teacher, digits):
    images, labels = digits.train[0][:100], digits.train[1][:100]
    data = TensorDataset(images, labels)
    batches = [(images[:30], labels[:30]), (images[30:], labels[30:])]
    kinds = [data, DataLoader(data, 16, shuffle=True), batches, iter(batches)]
    found = [rank_augmentations(teacher, kind, ["none"])[0] for kind in kinds]
    for record in found:
        assert record.num_samples == 100
        assert record.score == pytest.approx(found[0].score, abs=1e-6)


def test_equal_seeds_rank_equally_and_other_seeds_draw_anew(teacher, digits):
    first, again, other = (
        rank_augmentations(teacher, digits.loader("train", shuffle=True), FEW, max_samples=80, seed=seed) for seed in (0, 0, 1)
    )
    assert first.records == again.records
    assert _scores(first)["cutmix"].score != _scores(other)["cutmix"].score


def test_a_candidate_has_the_same_draws_in_any_company(teacher, digits):
    alone = rank_augmentations(teacher, digits.loader("train"), ["randomerasing"], max_samples=120)
    among = rank_augmentations(teacher, digits.loader("train"), FEW, max_samples=120, race=False)
    assert alone[0].cmi == _scores(among)["randomerasing"].cmi


def test_normalised_images_rank_as_those_in_the_unit_range(teacher, digits):
    images, labels = digits.train[0][:120], digits.train[1][:120]
    mean, std = [0.3], [0.4]

    class Normalised(nn.Module):
        def forward(self, x):
            return teacher(x * std[0] + mean[0])

    plain = rank_augmentations(teacher, TensorDataset(images, labels), FEW)
    normalised = TensorDataset((images - mean[0]) / std[0], labels)
    with pytest.raises(QakdError, match="input_stats"):
        rank_augmentations(Normalised(), normalised, FEW)
    found = rank_augmentations(Normalised(), normalised, FEW, input_stats=(mean, std))
    assert [record.name for record in found] == [record.name for record in plain]
    for one, two in zip(found, plain, strict=True):
        assert one.score == pytest.approx(two.score, abs=1e-3)


def test_without_labels_the_teacher_answers(teacher, digits):
    images, labels = digits.train[0][:200], digits.train[1][:200]
    with pytest.raises(LabelsRequiredError, match='labels="teacher"'):
        rank_augmentations(teacher, [images], FEW)
    with torch.no_grad():
        answers = teacher(images).argmax(1)
    assert not torch.equal(answers, (answers + 1) % 10)
    found = rank_augmentations(teacher, [images], FEW, labels="teacher")
    expected = rank_augmentations(teacher, [(images, answers)], FEW)
    assert found.records == expected.records
    assert labels.shape == answers.shape


def test_the_teacher_and_all_generators_are_left_as_they_were(teacher, digits):
    teacher.train()
    teacher.stem.eval()
    modes = [module.training for module in teacher.modules()]
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    loader = digits.loader("train", shuffle=True)
    states = torch.get_rng_state(), loader.generator.get_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    eager = rank_augmentations(teacher, loader, FEW, max_samples=80)
    assert [module.training for module in teacher.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], loader.generator.get_state())
    assert states[2] == random.getstate()
    assert (states[3] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert eager.records == rank_augmentations(teacher.eval(), loader, FEW, max_samples=80).records


def test_labels_out_of_range_are_named(teacher, digits):
    images = digits.train[0][:40]
    for candidates in (["none"], ["cutmix"]):
        with pytest.raises(QakdError, match=r"label 10 .*out of range"):
            rank_augmentations(teacher, [(images, torch.full((40,), 10))], candidates)


def test_fewer_images_than_classes_are_warned_about(teacher, digits, caplog):
    rank_augmentations(teacher, digits.loader("train"), ["none"], max_samples=6)
    assert "6 images of 10 classes" in caplog.text


def test_a_teacher_whose_answers_are_not_finite_is_named(digits):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), float("nan"))

    with pytest.raises(QakdError, match=r"'none'.*not finite"):
        rank_augmentations(Broken(), digits.loader("train"), ["none"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "mine"}, "labels"),
        ({"confidence": 1.0}, "confidence"),
        ({"max_samples": 0}, "max_samples"),
        ({"form": "x"}, "form"),
    ],
)
def test_bad_arguments_are_named(teacher, digits, options, message):
    with pytest.raises(QakdError, match=message):
        rank_augmentations(teacher, digits.loader("train"), ["none"], **options)


def test_the_pair_form_asks_the_student_on_the_same_images_and_leaves_it_as_prepared(teacher, make_student, digits):
    student, names = make_student(), ["none", "cutmix"]
    state = {name: value.clone() for name, value in student.state_dict().items()}
    options = {"max_samples": 80, "race": False, "seed": 3}
    ranking = rank_augmentations(teacher, digits.loader("train"), names, form="pair", student=student, **options)
    alone = _scores(rank_augmentations(teacher, digits.loader("train"), names, **options))
    seen = []
    handle = teacher.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    rank_augmentations(teacher, digits.loader("train"), ["cutmix"], **options)
    handle.remove()
    batches = seen[1:]  # the first images, as they are, say how many classes there are
    with torch.no_grad():
        apart = [
            nn.functional.kl_div(student(x).log_softmax(1), z.log_softmax(1), log_target=True, reduction="sum")
            for x, z in batches
        ]
    expected = float(sum(apart)) / sum(len(x) for x, _ in batches)
    assert _scores(ranking)["cutmix"].student_divergence == pytest.approx(expected, rel=1e-4)
    for record in ranking:
        assert record.cmi == alone[record.name].cmi
        assert record.score == pytest.approx(record.cmi - record.student_divergence)
    assert "student's divergence" in ranking.explanation
    assert not student.training
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())


def test_the_pair_form_and_a_student_go_together(teacher, make_student, digits):
    with pytest.raises(QakdError, match=r'form="pair" compares a student with the teacher: pass student=prepared'):
        rank_augmentations(teacher, digits.loader("train"), ["none"], form="pair")
    with pytest.raises(QakdError, match=r'student= is asked with form="pair" alone'):
        rank_augmentations(teacher, digits.loader("train"), ["none"], student=make_student())
    with pytest.raises(NotPreparedError):
        rank_augmentations(teacher, digits.loader("train"), ["none"], form="pair", student=teacher)


# -- races and ties


def test_equal_candidates_are_tied_and_neither_is_given_up(teacher, digits):
    ranking = rank_augmentations(teacher, digits.loader("train"), {"one": None, "two": v2.Identity(), "far": lambda x: 1 - x})
    assert [record.tied_with_best for record in ranking] == [False, True, False]
    assert [record.dropped for record in ranking] == [False, False, True]
    assert "tied with" in ranking.explanation


def test_a_race_finds_the_winner_of_the_exhaustive_ranking_with_a_fraction_of_the_work(teacher, digits):
    whole = rank_augmentations(teacher, digits.loader("train"), FEW, race=False)
    race = rank_augmentations(teacher, digits.loader("train"), FEW)
    assert race[0].name == whole[0].name
    assert whole.teacher_forwards == 4 * len(digits.train[0])
    assert race.teacher_forwards < whole.teacher_forwards / 3
    lost = [record for record in race if record.dropped]
    assert lost
    assert all(record.num_samples < race[0].num_samples or not record.tied_with_best for record in lost)


def test_max_samples_bounds_a_race(teacher, digits):
    ranking = rank_augmentations(teacher, digits.loader("train"), {"one": None, "two": v2.Identity()}, max_samples=90)
    assert {record.num_samples for record in ranking} == {90}


def test_the_clean_pass_is_shared(teacher, digits):
    ranking = rank_augmentations(
        teacher, digits.loader("train"), ["none", "cutmix"], max_samples=80, race=False, labels="teacher"
    )
    assert ranking.teacher_forwards == 2 * 80


# -- search


def test_a_search_scores_its_budget_and_mixes_the_best(teacher, digits):
    search = Search(budget=6, keep=2)
    ranking = rank_augmentations(teacher, digits.loader("train"), ["none"], max_samples=160, search=search)
    names = {candidate.name for candidate in search.candidates(0)}
    assert len(names) == 6
    assert names < {record.name for record in ranking}
    (mixed,) = [record for record in ranking if record.name.startswith("mixture of ")]
    composed = [record.name for record in ranking if record.name in names]
    assert mixed.name == f"mixture of {composed[0]} | {composed[1]}"
    assert mixed.num_samples == max(record.num_samples for record in ranking)


def test_a_search_refuses_data_that_can_be_read_once(teacher, digits):
    with pytest.raises(QakdError, match="reads the data twice"):
        rank_augmentations(teacher, iter(digits.loader("train")), ["none"], search=Search())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_changes_images_more_with_its_magnitude(name, channels):
    images = torch.rand(16, channels, 20, 20, generator=torch.Generator().manual_seed(0))
    change = []
    for magnitude in (0.0, 0.2, 0.9):
        augmented, _ = Candidate(name, Composition(((name, magnitude),)))(images, seeds=list(range(16)))
        change.append(float((augmented - images).abs().mean()))
    if (name, channels) == ("saturation", 1):
        assert change == [0, 0, 0]  # grey has none
    else:
        assert change[0] <= change[1] <= change[2] > change[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Search(budget=0), "budget"),
        (lambda: Search(budget=2, keep=3), "keep"),
        (lambda: Search(magnitudes=(2.0,)), "magnitudes"),
        (lambda: Search(budget=10**6), "compositions there are"),
        (lambda: Composition((("rotte", 0.5),)), "rotte"),
        (lambda: Composition((("rotate", 5.0),)), "magnitude 5.0"),
        (lambda: Candidate("a", mix="cut"), "mix='cut'"),
    ],
)
def test_a_search_that_cannot_be_is_named(make, message):
    with pytest.raises(QakdError, match=message):
        make()


# -- the selector


@pytest.fixture
def loader(digits):
    images, labels = digits.train[0][:192], digits.train[1][:192]
    return DataLoader(TensorDataset(images, labels), 32, shuffle=True, generator=torch.Generator().manual_seed(0))


def test_the_selector_trains_with_what_ranks_first_and_says_so(make_student, teacher, loader, caplog):
    caplog.set_level("INFO")
    result = distill(make_student(), teacher, loader, epochs=2, augment=CMISelector(FEW, max_samples=120), seed=0)
    best = rank_augmentations(teacher, loader, FEW, max_samples=120, labels="teacher")[0]
    assert [row["augmentation"] for row in result.history] == [best.name] * 2
    assert result.history[0]["augmentation_score"] == pytest.approx(best.score)
    assert set(result.history[0]["augmentation_scores"]) == set(FEW)
    for record in result.history[0]["augmentation_ranking"]:
        assert record["score"] == result.history[0]["augmentation_scores"][record["name"]]
        part = "cross_entropy" if record["form"] == "ce" else "centroid_divergence"
        assert record["score"] == pytest.approx(record["cmi"] - record[part])
    assert "augmentation_scores" not in result.history[1]
    assert f"mutual information: {best.name}: score" in caplog.text
    assert "Trust this to reject" in caplog.text


def test_the_chosen_augmentation_by_hand_trains_the_same_student(make_student, teacher, loader, digits):
    """The ranking draws nothing from training: the run goes as if the user had named the winner."""
    state = loader.generator.get_state()
    chosen = distill(
        make_student(), teacher, loader, epochs=1, lr=1e-3, augment=CMISelector(["randomerasing"], max_samples=40), seed=0
    )
    loader.generator.set_state(state)
    (candidate,) = (candidate for candidate in default_candidates() if candidate.name == "randomerasing")
    named = distill(make_student(), teacher, loader, epochs=1, lr=1e-3, augment=lambda x: candidate(x)[0], seed=0)
    for one, two in zip(chosen.model.state_dict().values(), named.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("method", [KD(), QAT(), QKD(1, 1, 1), SQAKD()], ids=lambda method: type(method).__name__)
def test_mixed_labels_reach_every_method(make_student, teacher, loader, method):
    epochs = 3 if isinstance(method, QKD) else 1
    result = distill(
        make_student(), teacher, loader, method=method, epochs=epochs, augment=CMISelector(["cutmix"], max_samples=40)
    )
    assert all(np.isfinite(row["loss"]) for row in result.history)
    assert {row["augmentation"] for row in result.history} == {"cutmix"}


def _learns(module):
    """Else it is only looked at, before the first step."""
    return module.training and torch.is_grad_enabled()


def test_teacher_and_student_see_the_same_batch(make_student, teacher, loader):
    student, seen = make_student(), {"student": [], "teacher": []}
    student.register_forward_pre_hook(lambda module, args: seen["student"].append(args[0].clone()) if _learns(module) else None)
    teacher.register_forward_pre_hook(lambda _, args: seen["teacher"].append(args[0].clone()))
    distill(student, teacher, loader, epochs=1, augment=CMISelector(["trivialaugment+cutmix"], max_samples=40), lr=1e-3)
    steps = len(loader)
    assert len(seen["student"]) == steps
    for one, two in zip(seen["student"], seen["teacher"][-steps:], strict=True):
        assert torch.equal(one, two)


def test_the_report_shows_what_was_chosen_and_all_scores(tmp_path):
    history = [
        {"epoch": 0, "phase": "distill", "loss": 1.0, "augmentation": "b", "augmentation_scores": {"a": -0.5, "b": 0.25}}
    ]
    html = write_report([], tmp_path / "report.html", training=[{"name": "student", "history": history}]).read_text()
    assert "augmentation <b>b</b>" in html
    assert "b 0.250, a -0.500." in html


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_the_pair_form_in_a_run_ranks_with_the_student_and_training_goes_on_as_if_named(
    make_student, teacher, loader, toolkit, caplog
):
    caplog.set_level("INFO")
    state = loader.generator.get_state()
    augment = CMISelector(["randomerasing"], max_samples=40, form="pair")
    chosen = distill(make_student(toolkit), teacher, loader, epochs=1, lr=1e-3, augment=augment, seed=0)
    loader.generator.set_state(state)
    (candidate,) = (candidate for candidate in default_candidates() if candidate.name == "randomerasing")
    named = distill(make_student(toolkit), teacher, loader, epochs=1, lr=1e-3, augment=lambda x: candidate(x)[0], seed=0)
    (record,) = chosen.history[0]["augmentation_ranking"]
    assert record["score"] == pytest.approx(record["cmi"] - record["student_divergence"])
    assert "put what trained worst first" in caplog.text
    for one, two in zip(chosen.model.state_dict().values(), named.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_it_ranks_again_every_so_many_epochs_on_other_images(make_student, teacher, loader):
    result = distill(make_student(), teacher, loader, epochs=4, augment=CMISelector(FEW, max_samples=80, every=2))
    scores = [row.get("augmentation_scores") for row in result.history]
    assert [found is not None for found in scores] == [True, False, True, False]
    assert scores[0] != scores[2]


@pytest.mark.parametrize("stop", [pytest.param(4, marks=pytest.mark.matrix), 9])
@pytest.mark.parametrize("search", [None, Search(budget=3, keep=2)], ids=["list", "search"])
def test_a_stopped_run_goes_on_bit_identically(make_student, teacher, loader, tmp_path, stop, search):
    augment = CMISelector(
        ["randomerasing", "cutmix"] if search is None else ["autoaugment-svhn+cutmix"], 80, every=2, search=search
    )
    start = loader.generator.get_state()
    options = {"epochs": 3, "augment": augment, "seed": 0, "lr": 1e-3}
    whole = distill(make_student(), teacher, loader, **options)
    loader.generator.set_state(start)
    with pytest.raises(Stop):
        distill(
            make_student(), teacher, loader, checkpoint_dir=tmp_path, checkpoint_every=2, callbacks=[StopAt(stop)], **options
        )
    loader.generator.manual_seed(99)
    resumed = distill(make_student(), teacher, loader, checkpoint_dir=tmp_path, resume=True, **options)
    assert [row["augmentation"] for row in resumed.history] == [row["augmentation"] for row in whole.history]
    for one, two in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_selector_needs_a_teacher_and_refuses_cached_logits(make_student, teacher, loader, tmp_path):
    with pytest.raises(QakdError, match="pass a teacher"):
        distill(make_student(), None, loader, method=QAT(), epochs=1, augment=CMISelector())
    with pytest.raises(QakdError, match="cache_teacher"):
        distill(make_student(), teacher, loader, epochs=1, augment=CMISelector(), cache_teacher=tmp_path / "cache")


@pytest.mark.parametrize("options", [{"form": "x"}, {"labels": "x"}, {"every": 0}, {"max_samples": -1}, {"confidence": 2}])
def test_a_selector_checks_itself(options):
    with pytest.raises(QakdError, match=next(iter(options))):
        CMISelector(**options)
    assert dataclasses.is_dataclass(CMISelector)
