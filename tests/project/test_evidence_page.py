"""The page of the evidence: words follow from the figures, the drawing shows them all, and nothing else is written."""

import copy
import json
import sys
from dataclasses import replace
from xml.etree import ElementTree

import evidence
import evidence_figure
import evidence_page
import numpy as np
import page_tables
import paired
import pytest
from evidence_drawing import SVG, bars, places_of
from scipy import stats


@pytest.fixture(scope="module")
def document():
    """Of five made-up seeds: SQAKD is ahead by two points at 2 bits, and by nothing at 8."""
    draw = np.random.default_rng(0)
    found = {}
    for cell in evidence.cells(evidence.SMALL):
        accuracy = 0.8 + 0.01 * cell.bits + 0.02 * (cell.method != "QAT") * (cell.bits == 2) + draw.normal(0, 0.002)
        run = {"before": 0.3, "accuracy": accuracy, "deployed": accuracy}
        found.setdefault((cell.quantizer, cell.bits, cell.method, cell.labels), []).append(run)
    environment = {"cpu": "a processor", "cpu_flags": ["one", "two"], "versions": {"torch": "2"}}
    rows = evidence.summary(found)
    rates = [
        {"lr": lr, "bits": bits, "method": method, "held_out": 0.8 + lr}
        for lr in evidence.RATES
        for bits in (2, 4)
        for method in ("QAT", "SQAKD")
    ]
    found = {"environment": environment, "size": vars(evidence.SMALL), "teacher": 0.9, "hours": 2.0}
    return found | {"rates": rates, "rows": rows}


@pytest.fixture(scope="module")
def study():
    return json.loads(evidence_page.augmentation_study.RESULTS.read_text())


@pytest.fixture(scope="module")
def fashion():
    """Of four seeds: SQAKD is a point ahead in the residual network, and as good in the other."""
    draw = np.random.default_rng(1)
    rows = []
    for network, gain in ((evidence_page.fashion_study.RESNET, 0.01), (evidence_page.fashion_study.MOBILENET, 0.0)):
        for bits in (2, 3):
            for method in ("QAT", "SQAKD"):
                shares = 0.8 + gain * (method == "SQAKD") + draw.normal(0, 0.001, 4)
                accuracies = {str(seed): share for seed, share in enumerate(shares)}
                rows.append({"network": network, "quantizer": "LSQ", "bits": bits, "method": method, "accuracies": accuracies})
    return {"rows": rows}


@pytest.fixture(scope="module")
def studies(document, study, fashion):
    return evidence_page.Studies(document, study, fashion, evidence_page.augmentation_study.fashion_committed())


def row_of(document, quantizer, bits, method):
    key = quantizer, bits, method, 1.0
    return next(row for row in document["rows"] if (row["quantizer"], row["bits"], row["method"], row["labels"]) == key)


def test_a_comparison_is_scipys_paired_test(document):
    first = evidence_page.claims(document)[0].single[0]
    sqakd, qat = (row_of(document, "LSQ", 2, method) for method in ("SQAKD", "QAT"))
    assert first.estimate == pytest.approx(sqakd["over_qat"])
    assert first.p == pytest.approx(stats.ttest_rel(sqakd["accuracies"], qat["accuracies"]).pvalue)


@pytest.mark.parametrize("differences", [[0.1], [0.0, 0.0, 0.0]])
def test_one_seed_or_no_difference_shows_nothing(differences):
    assert evidence_page.compare(differences).p == 1.0


def test_holm_rejects_what_the_step_down_procedure_rejects():
    draw = np.random.default_rng(0)
    for _ in range(200):
        p_values = draw.beta(0.2, 2.0, size=12)
        rejected = set()
        for rank, index in enumerate(np.argsort(p_values)):
            if p_values[index] * (len(p_values) - rank) >= 0.05:
                break
            rejected.add(index)
        assert {index for index, p in enumerate(evidence_page.holm(p_values)) if p < 0.05} == rejected


@pytest.mark.parametrize(
    ("mean", "single", "words"),
    [
        ((0.1, 0.01), [(0.1, 0.01), (0.1, 0.01)], "holds"),
        ((0.1, 0.01), [(0.2, 0.01), (0.0, 0.30)], "holds on average"),
        ((0.1, 0.01), [(0.3, 0.01), (-0.1, 0.01)], "holds on average, the reverse in 1 of 2"),
        ((-0.1, 0.01), [(-0.1, 0.01), (-0.1, 0.30)], "does not hold: the reverse does"),
        ((0.1, 0.06), [(0.1, 0.01), (0.1, 0.30)], "cannot be told here"),
    ],
)
def test_the_verdict_follows_from_what_is_significant(mean, single, words):
    comparisons = [evidence_page.Comparison(*found) for found in (mean, *single)]
    claim = evidence_page.Claim("", "", comparisons[0], tuple(comparisons[1:]))
    assert evidence_page.verdict(claim, comparisons[0].p) == words


def test_a_claim_that_the_students_contradict_is_said_not_to_hold(document, studies):
    assert "| **holds on average" in evidence_page.make_claims_table(studies).splitlines()[2]
    rows = [row | {"accuracies": [1 - accuracy for accuracy in row["accuracies"]]} for row in document["rows"]]
    line = evidence_page.make_claims_table(replace(studies, glyphs=document | {"rows": rows})).splitlines()[2]
    assert "| **does not hold: the reverse does** |" in line


def test_candidates_are_compared_with_no_augmentation_and_with_one_at_random(study):
    table = evidence_page.augmentation_study.make_candidates_table(study).splitlines()
    names = [name.strip() for name in table[0].split("|")[2:-1]]
    at_random = [line.split("|")[7].strip() for line in evidence_page.augmentation_study.make_table(study).splitlines()[2:]]
    for found, line, drawn in zip(study["rows"], table[2:], at_random[:-1], strict=True):
        means = {name: np.mean(accuracies) for name, accuracies in found["accuracies"].items()}
        cells = dict(zip(names, line.split("|")[2:-1], strict=True))
        for name, mean in means.items():
            assert float(cells[name]) == pytest.approx(100 * (mean - means["none"]), abs=0.0051)
        assert float(drawn) == pytest.approx(100 * (np.mean(list(means.values())) - means["none"]), abs=0.0051)


def test_every_comparison_is_counted(document, studies):
    claims = evidence_page.all_claims(studies)
    table = evidence_page.make_tests_table(studies)
    counted = [int(line.split("|")[2]) for line in table.splitlines()[2:]]
    single = sum(len(claim.single) for claim in claims)
    assert counted == [len(claims), single, sum("over_qat" in row for row in document["rows"])]


def test_the_mean_of_a_claim_is_tested_over_seeds(document):
    claim = evidence_page.claims(document)[0]
    by_seed = np.mean([np.subtract(*pair) for pair in _pairs(document)], axis=0)
    assert claim.mean.p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)
    low, high = stats.t.interval(0.95, len(by_seed) - 1, loc=by_seed.mean(), scale=stats.sem(by_seed))
    assert claim.mean.half_width == pytest.approx((high - low) / 2)


def test_a_claim_on_fashion_is_tested_over_the_seeds_that_all_its_students_have(fashion):
    residual, depthwise = evidence_page.fashion_claims(fashion)
    by_key = {(row["network"], row["bits"], row["method"]): list(row["accuracies"].values()) for row in fashion["rows"]}
    name = evidence_page.fashion_study.RESNET
    gains = [np.subtract(by_key[name, bits, "SQAKD"], by_key[name, bits, "QAT"]) for bits in (2, 3)]
    assert residual.mean.p == pytest.approx(stats.ttest_1samp(np.mean(gains, axis=0), 0).pvalue)
    assert residual.mean.p < 0.01
    assert depthwise.mean.estimate == pytest.approx(0, abs=0.002)
    rows = [row | {"accuracies": {"0": 0.5, "9": 0.5}} if row["method"] == "QAT" else row for row in fashion["rows"]]
    assert evidence_page.fashion_claims({"rows": rows}) == [], "one seed in common tells nothing"


def test_a_difference_of_the_size_that_is_said_to_be_found_is_found_as_often():
    draw = np.random.default_rng(2)
    spread = draw.normal(0, 1, 5)
    size = paired.detectable(spread)
    samples = draw.normal(size, np.std(spread, ddof=1), (4000, 5))
    found = stats.ttest_1samp(samples, 0, axis=1)
    assert np.mean((found.pvalue < 0.05) & (samples.mean(1) > 0)) == pytest.approx(0.8, abs=0.02)


def test_what_to_choose_follows_from_the_figures(document):
    lines = [line.split("|")[1:-1] for line in evidence_page.tables.make_choice_table(document).splitlines()[2:]]
    assert [line[0].strip() for line in lines] == ["W8A8", "W4A4", "W3A3", "W2A2"]
    two = lines[-1]
    assert float(two[1]) == pytest.approx(100 * (0.3 - document["teacher"]), abs=0.006)
    assert float(two[2]) == pytest.approx(100 * (row_of(document, "LSQ", 2, "QAT")["accuracy"] - 0.9), abs=0.006)
    assert two[-2].strip() == "SQAKD"
    assert "QAT" not in two[-1], "it is two points behind"
    near = [row | {"before": row["accuracy"] - 0.001} for row in document["rows"]]
    eight = evidence_page.tables.make_choice_table(document | {"rows": near}).splitlines()[2].split("|")
    assert [cell.strip() for cell in eight[-3:-1]] == ["calibration alone"] * 2


def _pairs(document):
    for quantizer in evidence.QUANTIZERS:
        for bits in (2, 3, 4, 8):
            yield [row_of(document, quantizer, bits, method)["accuracies"] for method in ("SQAKD", "QAT")]


def test_the_drawing_shows_every_student_at_its_accuracy(document):
    """Heights are the figures, on one scale for all quantizers: read from the file's groups, by their names."""
    drawing = places_of(evidence_figure.draw(document))
    assert (drawing.keys() & {"LSQ-teacher", "LSQ-zero"}) == {"LSQ-teacher", "LSQ-zero"}
    accuracies, differences = [], []
    for quantizer in evidence.QUANTIZERS:
        accuracies += [(drawing[f"{quantizer}-teacher"][0][1], 100 * document["teacher"])]
        differences += [(drawing[f"{quantizer}-zero"][0][1], 0.0)]
        for method in ("QAT", "SQAKD"):
            rows = [row_of(document, quantizer, bits, method) for bits in (2, 3, 4, 8)]
            marks = drawing[f"{quantizer}-{method}"]
            assert [x for x, _ in marks] == sorted({x for x, _ in marks})
            accuracies += [(y, 100 * row["accuracy"]) for (_, y), row in zip(marks, rows, strict=True)]
            accuracies += [end for row, bar in zip(rows, bars(drawing, f"{quantizer}-{method}"), strict=True)
                           for end in ends(bar, row["accuracy"], row["interval"])]  # fmt: skip
        for row, bar in zip(rows, bars(drawing, f"{quantizer}-difference"), strict=True):
            ((_, y),) = drawing[f"{quantizer}-difference-W{row['bits']}A{row['bits']}"]
            differences += [(y, 100 * row["over_qat"]), *ends(bar, row["over_qat"], row["over_qat_interval"])]
    for shown in (accuracies, differences):
        heights, values = np.array(shown).T
        slope, start = np.polyfit(values, heights, 1)
        assert slope < 0, "upwards is more"
        np.testing.assert_allclose(start + slope * values, heights, atol=0.01)


def ends(bar, share, half_width):
    return zip(bar, (100 * (share - half_width), 100 * (share + half_width)), strict=True)


def test_the_drawing_is_the_same_again_says_what_it_shows_and_stays_within_its_frame(document):
    drawing = evidence_figure.draw(document)
    assert drawing == evidence_figure.draw(json.loads(json.dumps(document)))
    root = ElementTree.fromstring(drawing)
    (description,) = root.iter("{http://purl.org/dc/elements/1.1/}description")
    for quantizer in evidence.QUANTIZERS:
        assert f"{quantizer} W2A2: SQAKD {100 * row_of(document, quantizer, 2, 'SQAKD')['accuracy']:.2f} %" in description.text
    _, _, width, height = map(float, root.get("viewBox").split())
    for x, y in (place for places in places_of(drawing).values() for place in places):
        assert 0 < x < width
        assert 0 < y < height


def test_a_difference_whose_interval_contains_0_is_hollow(document):
    rows = copy.deepcopy(document["rows"])
    for row in rows:
        if "over_qat" in row:
            row |= {"over_qat": 0.01 if row["bits"] == 8 else -0.02, "over_qat_interval": 0.011}
    root = ElementTree.fromstring(evidence_figure.draw(document | {"rows": rows}))
    for bits, hollow in ((8, True), (2, False)):
        (mark,) = root.find(f".//*[@id='LSQ-difference-W{bits}A{bits}']").iter(f"{SVG}use")
        assert ("fill: #ffffff" in mark.get("style")) == hollow


def test_one_seed_is_drawn_without_intervals(document, studies):
    rows = [row | {"interval": None, "over_qat_interval": None, "p": None} for row in document["rows"]]
    single = document | {"rows": [row | {"accuracies": row["accuracies"][:1], "seeds": 1} for row in rows]}
    assert any(name.endswith("-interval") for name in places_of(evidence_figure.draw(document)))
    assert not any(name.endswith("-interval") for name in places_of(evidence_figure.draw(single)))
    assert "cannot be told here" in evidence_page.page_tables_of(replace(studies, glyphs=single))["evidence_claims"]


def test_a_study_of_ones_own_gets_a_page_and_leaves_docs_alone(document, tmp_path, monkeypatch):
    committed = (evidence_page.DOCS / evidence_page.PAGE).read_text()
    (tmp_path / "own.json").write_text(json.dumps(document))
    monkeypatch.setattr(sys, "argv", ["evidence_page.py", "--in", str(tmp_path / "own.json"), "--out", str(tmp_path / "page")])
    evidence_page.main()
    for name, table in evidence_page.page_tables_of(evidence_page.committed(tmp_path / "own.json")).items():
        assert page_tables.read_table(name, tmp_path / "page" / evidence_page.PAGE) == table
    assert (tmp_path / "page" / evidence_page.FIGURE).read_text() == evidence_figure.draw(document)
    assert committed == (evidence_page.DOCS / evidence_page.PAGE).read_text()


def test_docs_show_committed_figures_only(document, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.json").write_text(json.dumps(document))
    monkeypatch.setattr(sys, "argv", ["evidence_page.py", "--in", str(tmp_path / "own.json")])
    with pytest.raises(SystemExit):
        evidence_page.main()
    assert "pass --out" in capsys.readouterr().err


def test_the_interval_of_a_rank_correlation_covers_it_as_often_as_it_says():
    """Normal pairs, whose true rank correlation is known: 6/pi asin(rho / 2)."""
    draws, truth = np.random.default_rng(0), 6 / np.pi * np.arcsin(0.7 / 2)
    pairs = draws.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], size=(400, 16))
    found = [stats.spearmanr(pair[:, 0], pair[:, 1]).statistic for pair in pairs]
    intervals = [evidence_page.augmentation_study.spearman_interval(rho, 16) for rho in found]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.99


def test_students_whose_accuracy_follows_the_pair_form_correlate_with_it(tmp_path, monkeypatch):
    script, names = evidence_page.augmentation_study, ["none", "a", "b", "c", "d"]
    regime = script.FASHION_REGIMES[0]
    parts = ("cmi", "centroid_divergence", "cross_entropy", "variance", "student_cmi", "student_cross_entropy")
    records = {name: dict.fromkeys(parts, 0.1) | {"student_divergence": index / 10} for index, name in enumerate(names)}
    for name, place in zip(names, (3, 1, 4, 2, 5), strict=True):  # the other figures say little
        records[name] |= {"variance": place, "cross_entropy": place, "centroid_divergence": place, "cmi": place / 1000}
    (tmp_path / f"metrics-{regime.slug}.json").write_text(json.dumps(records))
    for index, name in enumerate(names):
        (tmp_path / f"{regime.slug}-{name}-0.json").write_text(json.dumps({"accuracy": 0.9 - index / 100}))
    monkeypatch.setattr(script, "regime_teacher", lambda regime, folder: None)
    monkeypatch.setattr(script, "regime_data", lambda regime, folder: (None, (None, None)))
    monkeypatch.setattr(script, "accuracy", lambda *_: 0.95)
    found = script.evaluate(regime, names, 1, tmp_path)
    assert found["metrics"]["CMI - student's divergence"]["spearman"] == pytest.approx(1)
    assert found["metrics"]["CMI - student's divergence"]["pick"] == "none"
    assert found["metrics"]["- variance"]["spearman"] == pytest.approx(0.5)
    header, _, row, mean = script.make_fashion_table({"rows": [found]}).splitlines()
    assert "1.00 (1.00 to 1.00)" in row
    assert header.count("|") == row.count("|") == mean.count("|")
