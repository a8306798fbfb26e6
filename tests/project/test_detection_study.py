"""The study of detectors: canvases hold what is said of them, places learn the right boxes, and figures are counted rightly."""

import canvases
import detection_study
import detector
import pytest
import torch
from torchvision.ops import box_iou

import qakd_plugin as qakd


@pytest.fixture(scope="module")
def pasted():
    """Canvases of white squares of 20 pixels in black garments of 28: the box is of what is white."""
    garments = torch.zeros(30, 1, 28, 28)
    garments[:, :, 4:24, 4:24] = 1
    return canvases.paste(garments, torch.arange(30) % 10, 40, seed=0)


def test_a_box_is_what_is_not_black_and_hardly_covers_another(pasted):
    assert len(pasted) == 40
    for target in canvases.targets_of(pasted.boxes, pasted.labels):
        boxes = target["boxes"]
        assert 1 <= len(boxes) <= canvases.OBJECTS
        sizes = boxes[:, 2:] - boxes[:, :2]
        # bilinear edges may add a pixel on each side
        low, high = (side * 20 / 28 for side in (canvases.MIN_SIDE, canvases.MAX_SIDE))
        assert bool((sizes >= low - 1).all())
        assert bool((sizes <= high + 3).all())
        assert bool((boxes >= 0).all())
        assert bool((boxes <= canvases.SIDE).all())
        assert float(box_iou(boxes, boxes).fill_diagonal_(0).max()) <= canvases.OVERLAP


def test_a_canvas_is_the_same_for_the_same_seed_and_another_for_another(pasted):
    garments = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    first, again, other = (canvases.paste(garments, torch.arange(30) % 10, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.boxes, again.boxes)
    assert not torch.equal(first.images, other.images)


def test_outputs_that_are_what_places_learn_are_decoded_to_the_boxes_again(pasted):
    """The mAP of a network that outputs just what it is asked to is whole, and its boxes cost nothing."""
    label, box, centredness = detector.assigned(pasted.boxes, pasted.labels)
    found = label != canvases.NOTHING
    middles = detector.places()
    corners = torch.cat([middles - box[..., :2], box[..., 2:] - middles], -1) / detector.STRIDE
    outputs = {
        "classes": torch.where(torch.nn.functional.one_hot(label.clamp(min=0), 10).bool() & found[..., None], 20.0, -20.0),
        "sides": corners,
        "centres": torch.logit(centredness, eps=1e-6),
    }
    assert torch.allclose(detector.boxes_of(corners)[found], box[found], atol=1e-4)
    precision = detection_study.mean_precision(lambda images: outputs, pasted)
    assert precision["map"] == pytest.approx(1, abs=1e-6)
    worse = outputs | {"sides": corners + 1.0}
    targets = {"boxes": pasted.boxes, "labels": pasted.labels}
    assert detector.loss(outputs, targets) < detector.loss(worse, targets) - 0.1
    assert detection_study.mean_precision(lambda images: worse, pasted)["map"] < 0.9


def test_every_box_is_learned_at_places_near_its_own_middle(pasted):
    label, box, _ = detector.assigned(pasted.boxes, pasted.labels)
    middles = detector.places()
    for index, target in enumerate(canvases.targets_of(pasted.boxes, pasted.labels)):
        learned = label[index] != canvases.NOTHING
        assert {tuple(row) for row in box[index][learned].tolist()} == {tuple(row) for row in target["boxes"].tolist()}
        inside = (middles > box[index][:, :2]).all(1) & (middles < box[index][:, 2:]).all(1)
        assert bool(inside[learned].all())
    nothing = torch.full_like(pasted.labels, canvases.NOTHING)
    assert bool((detector.assigned(pasted.boxes, nothing)[0] == canvases.NOTHING).all())


def test_only_the_last_layers_of_a_prepared_detector_stay_in_floating_point(pasted):
    network = detector.Detector(width=4).eval()
    batches = canvases.normalized(pasted.images).split(20)
    prepared = qakd.prepare(network, batches, weight_bits=4, activation_bits=4, keep=detector.HEADS)
    convolutions = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)}
    described = qakd.describe(prepared).quantizers
    quantized = {quantizer.name.rpartition(".")[0] for quantizer in described if quantizer.role == "weight"}
    assert convolutions - quantized == set(detector.HEADS)


@pytest.mark.parametrize("method", [detection_study.PTQ, *detection_study.TRAINED])
def test_a_student_is_trained_and_its_file_finds_the_same(garments, tmp_path, method):
    study = detection_study.Study(detection_study.TINY, tmp_path, garments, "cpu")
    found = study.run(detection_study.Cell(8, method, 1, 1e-3))
    assert found.keys() == {"map", "map_50", "deployed"}
    assert 0 <= found["map"] <= found["map_50"] <= 1
    assert found["deployed"] == pytest.approx(found["map"], abs=0.02)
    rate = study.run(detection_study.Cell(8, method, detection_study.RATES_SEED, 1e-3))
    assert rate.keys() == {"held_out"}


def test_canvases_that_judge_hold_no_garment_that_is_learned_from(garments, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(canvases, "paste", lambda images, kinds, count, seed: seen.append(images) or _Counted())
    detection_study.Study(detection_study.TINY, tmp_path, garments, "cpu")
    rows = [{tuple(image.flatten().tolist()) for image in part} for part in seen]
    assert len(rows) == 3
    assert all(rows)
    assert len(rows[0] | rows[1] | rows[2]) == sum(map(len, rows))


class _Counted:
    def __getitem__(self, rows):
        return self


def test_a_rate_is_chosen_where_all_of_its_grid_were_tried_and_cells_have_files_of_their_own():
    grid = detection_study.RATES[4]
    rows = [{"bits": 4, "method": "QAT", "lr": lr, "held_out": 0.5 + 0.1 * (lr == grid[1])} for lr in grid]
    assert detection_study.chosen(rows) == {(4, "QAT"): grid[1]}
    assert detection_study.chosen(rows[:2]) == {}
    table = detection_study.make_rates_table({"rates": rows}).splitlines()
    assert f"| **{grid[1]:g}: 60.00** |" in table[4]
    assert len({line.count("|") for line in table}) == 1
    every = detection_study.rate_cells() + detection_study.cells(detection_study.SMALL, {(4, "QAT"): grid[1]})
    assert len({cell.slug for cell in every}) == len(every)
    assert {cell.lr for cell in every if cell.method == "QAT" and cell.seed > 0} == {grid[1]}


def test_differences_are_taken_over_seeds_that_both_have():
    def row(method, values):
        runs = {seed: {"map": value, "map_50": value, "deployed": value} for seed, value in values.items()}
        return {"bits": 4, "method": method, "lr": 0.0, "runs": runs}

    rows = [row("PTQ", {"1": 0.2, "2": 0.3}), row("QAT", {"1": 0.5, "2": 0.5}), row("SQAKD", {"2": 0.55, "3": 0.9})]
    document = {"rows": rows, "teacher": {"map": 0.6, "map_50": 0.8}}
    found = detection_study.comparisons(document)
    assert found[4, "SQAKD", "QAT"] == [pytest.approx(0.05)]
    assert found[4, "QAT", "PTQ"] == [pytest.approx(0.3), pytest.approx(0.2)]
    last = detection_study.make_tests_table(document).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == ["W4A4", "SQAKD over QAT", "1", "+5.00", "-", "-"]
    lines = detection_study.make_table(document).splitlines()
    assert lines[2].startswith("| full precision |  |  |  | 60.00 | 80.00 |")
    assert lines[3].endswith("| -35.00 |")
