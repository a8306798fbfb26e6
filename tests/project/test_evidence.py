"""The study of accuracy: its cells repeat, its statistics are scipy's, a run that was stopped leaves no half seed."""

import json

import evidence
import evidence_tables
import glyphs
import pytest
import students
import torch
from agreement import tolerated_sqnr_db
from scipy import stats
from torch import nn

from qakd_plugin.demo.net import DigitNet
from qakd_plugin.deploy.parity.report import agreement

TINY = evidence.Size(images=256, epochs=1, seeds=2, teacher_images=512, teacher_epochs=1, test_images=100)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """With few images, and a teacher that is not trained."""
    splits = {seed: glyphs.render(count, seed) for seed, count in ((0, 1512), (2, 100))}
    splits = {
        seed: (torch.from_numpy(images)[:, None] / 255, torch.from_numpy(labels)) for seed, (images, labels) in splits.items()
    }
    monkeypatch.setattr(glyphs, "load", lambda count, seed: splits[seed])
    torch.manual_seed(0)
    network = DigitNet(width=8)
    network.head = nn.Linear(32, len(glyphs.CLASSES))
    torch.save(network.state_dict(), tmp_path / "teacher-glyphs.pt")
    return evidence.Study(TINY, tmp_path)


@pytest.mark.parametrize(("method", "share"), [("SQAKD", 2.0), pytest.param("QAT", 0.1, marks=pytest.mark.matrix)])
def test_a_cell_gives_the_same_numbers_again(method, share, study):
    cell = evidence.Cell("LSQ", 4, method, share, seed=3)
    assert study.run(cell) == study.run(cell)


def test_a_student_that_chooses_the_rate_sees_no_test_image(study, monkeypatch):
    monkeypatch.setattr(evidence, "open_study", lambda size, folder: study)
    found = evidence.train(TINY, study.folder, evidence.Cell("LSQ", 4, "SQAKD", 1.0, evidence.FIRST_SEED))
    assert found.keys() == {"before", "held_out", "accuracy", "deployed"}
    monkeypatch.setattr(study, "test", None)
    assert evidence.train(TINY, study.folder, evidence.rate_cells()[0]).keys() == {"held_out"}


def test_what_is_deployed_is_what_was_trained(study, monkeypatch):
    """By their logits: the labels of so little training are a matter of chance where codes lie on rounding ties."""
    cell, answers, make = evidence.Cell("LSQ", 4, "SQAKD", 1.0, seed=3), [], evidence.make_runner

    def recorded(*args):
        runner = make(*args)
        run = runner.run
        monkeypatch.setattr(runner, "run", lambda x: answers.append(run(x)) or answers[-1])
        return runner

    monkeypatch.setattr(evidence, "make_runner", recorded)
    student = study.trained(cell)
    deployed = study._deployed(student)
    images, labels = study.test
    logits = torch.cat([torch.from_numpy(part["logits"]) for part in answers])
    assert deployed == int((logits.argmax(1) == labels).sum()) / len(labels)
    with torch.no_grad():
        assert agreement(student(images).numpy(), logits.numpy()).sqnr_db > tolerated_sqnr_db(student, images)


@pytest.mark.matrix
def test_the_teachers_cached_answers_change_no_number(study, monkeypatch):
    cell = evidence.Cell("LSQ", 4, "SQAKD", 1.0, seed=3)
    cached = study.run(cell)
    without = evidence.distill
    monkeypatch.setattr(evidence, "distill", lambda *args, cache_teacher, **options: without(*args, **options))
    assert study.run(cell) == cached


@pytest.mark.matrix
def test_students_that_are_there_are_kept_and_the_others_are_trained_by_several_processes(tmp_path, capsys):
    (tmp_path / "a.json").write_text("kept")
    wanted = {tmp_path / f"{name}.json": ({"accuracy": share},) for name, share in (("a", 0.1), ("b", 0.2), ("c", 0.3))}
    students.train_missing(dict, wanted, processes=2, minutes=0)
    assert "b: left for later" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    students.train_missing(dict, wanted, processes=2, minutes=1)
    assert (tmp_path / "a.json").read_text() == "kept"
    assert json.loads((tmp_path / "c.json").read_text()).keys() == {"accuracy", "seconds"}
    assert "b: accuracy 0.2000" in capsys.readouterr().out


def test_a_student_that_fails_ends_the_run_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="dictionary update"):
        students.train_missing(dict, {tmp_path / "a.json": ("not pairs",)}, processes=1, minutes=1)
    assert list(tmp_path.iterdir()) == []


def test_only_whole_seeds_count(tmp_path):
    for cell in evidence.cells(TINY):
        (tmp_path / f"{cell.slug}.json").write_text(json.dumps({"before": 0.1, "accuracy": 0.5, "deployed": 0.5}))
    assert {len(runs) for runs in evidence.read(TINY, tmp_path).values()} == {2}
    (tmp_path / f"{evidence.cells(TINY)[-1].slug}.json").unlink()
    assert {len(runs) for runs in evidence.read(TINY, tmp_path).values()} == {1}


def test_the_rate_is_chosen_by_held_out_images_of_students_that_are_not_in_the_study(tmp_path):
    studied = {cell.slug for cell in evidence.cells(evidence.FULL)}
    for cell in evidence.rate_cells():
        assert cell.seed not in {other.seed for other in evidence.cells(evidence.FULL)}
        assert cell.slug not in studied
        share = 0.5 + 0.01 * list(evidence.QUANTIZERS).index(cell.quantizer) + cell.lr
        (tmp_path / f"{cell.slug}.json").write_text(json.dumps({"held_out": share, "accuracy": 0.0}))
    rows = evidence.read_rates(tmp_path)
    assert len(rows) == 2 * len(evidence.RATES) * 2
    assert all(row["held_out"] == pytest.approx(0.515 + row["lr"]) for row in rows)
    table = evidence_tables.make_rates_table({"rates": rows}).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [f"{lr:g}" for lr in evidence.RATES]
    means = [line.split("|")[-2].strip() for line in table[2:]]
    assert means == [f"{51.5 + 100 * lr:.2f}" for lr in evidence.RATES]
    (tmp_path / f"{evidence.rate_cells()[0].slug}.json").unlink()
    assert evidence.read_rates(tmp_path) == []


def test_intervals_and_p_values_are_scipys():
    runs = {"QAT": [0.80, 0.82, 0.81, 0.79], "SQAKD": [0.83, 0.84, 0.82, 0.83]}
    found = {
        ("LSQ", 2, method, 1.0): [{"before": 0.1, "accuracy": value, "deployed": value} for value in values]
        for method, values in runs.items()
    }
    qat, sqakd = evidence.summary(found)
    low, high = stats.t.interval(0.95, 3, loc=0.805, scale=stats.sem(runs["QAT"]))
    assert qat["interval"] == pytest.approx((high - low) / 2)
    assert sqakd["over_qat"] == pytest.approx(0.025)
    assert sqakd["p"] == pytest.approx(stats.ttest_rel(runs["SQAKD"], runs["QAT"]).pvalue)
    document = {"teacher": 0.85, "rows": [qat, sqakd]}
    assert [line.rpartition(": ")[2] for line in evidence_tables.verdicts(document)] == ["met"]
    assert "MISSED" in evidence_tables.verdicts({"teacher": 0.85, "rows": [sqakd | {"p": 0.2}]})[0]


def test_what_picks_the_best_epoch_was_learned_from_by_nobody(study):
    learned = {image.numpy().tobytes() for image in study.pool[0]}
    assert not learned & {image.numpy().tobytes() for image in (*study.validation[0], *study.test[0])}
    assert {image.numpy().tobytes() for image in study.train[0]} <= learned


def test_cells_have_names_of_their_own():
    slugs = [cell.slug for cell in evidence.cells(evidence.FULL)]
    assert len(slugs) == len(set(slugs))
