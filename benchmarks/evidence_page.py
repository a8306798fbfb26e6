"""The figure and the page of the evidence, made from the committed figures.

    python benchmarks/evidence_page.py                                        # docs/evidence.svg, docs/evidence.md
    python benchmarks/evidence_page.py --in runs/full.json --out runs/full    # a study of your own: nothing else is touched

Nothing is trained here. What a paper claims is put as comparisons of students, and the word beside it follows from them: from
their mean, tested over seeds, and corrected by Holm for the number of claims.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import augmentation_study
import evidence
import evidence_figure
import evidence_tables as tables
import fashion_study
import numpy as np
import page_tables
from numpy.typing import NDArray
from paired import Comparison, compare, holm

from qakd_plugin._common.files import write_atomic

DOCS = page_tables.ROOT / "docs"
PAGE, FIGURE = "evidence.md", "evidence.svg"
CHOICE = DOCS / "choosing.md"
SIGNIFICANT = 0.05
DRAWN, GARMENTS = "glyphs, digits", "Fashion-MNIST"


@dataclass(frozen=True)
class Studies:
    """The figures that the page is made of.

    Attributes:
        glyphs: of evidence.py.
        augmentation: of augmentation_study.py.
        fashion: of fashion_study.py.
        fashion_augmentation: of augmentation_study.py --fashion.
    """

    glyphs: dict[str, Any]
    augmentation: dict[str, Any]
    fashion: dict[str, Any]
    fashion_augmentation: dict[str, Any]


def committed(glyphs: Path = evidence.RESULTS) -> Studies:
    """Those in benchmarks/results, or others of evidence.py."""
    of_glyphs, augmentation = (json.loads(path.read_text()) for path in (glyphs, augmentation_study.RESULTS))
    return Studies(of_glyphs, augmentation, fashion_study.committed(), augmentation_study.fashion_committed())


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the comparisons made of it here.

    Attributes:
        text: the claim.
        source: who makes it, and the published size where one is known.
        mean: of all comparisons.
        single: each of them; each should come out positive.
        correlation: whether estimates are Spearman correlations; differences of accuracies otherwise.
        data: that students were trained on.
    """

    text: str
    source: str
    mean: Comparison
    single: tuple[Comparison, ...]
    correlation: bool = False
    data: str = "glyphs"


def claims(document: dict[str, Any]) -> list[Claim]:
    """Of the papers, on the students of evidence.py."""
    runs = {
        (row["quantizer"], row["bits"], row["method"], row["labels"]): np.asarray(row["accuracies"]) for row in document["rows"]
    }
    quantizers = list(dict.fromkeys(row["quantizer"] for row in document["rows"]))
    shares = sorted({row["labels"] for row in document["rows"]})

    def over(control: str, method: str, bits: int = 2, quantizer: str = "LSQ") -> NDArray[np.float64]:
        return runs[quantizer, bits, method, 1.0] - runs[quantizer, bits, control, 1.0]

    def claim(text: str, source: str, *differences: NDArray[np.float64]) -> Claim:
        return Claim(text, source, compare(np.mean(differences, axis=0)), tuple(compare(found) for found in differences))

    found = [
        claim(
            "SQAKD without labels beats QAT with them",
            "SQAKD; published +0.4 to +3.3 (W8 to W3)",
            *(over("QAT", "SQAKD", bits, name) for name in quantizers for bits in (2, 3, 4, 8)),
        ),
        claim(
            "its gain over QAT grows as bits get fewer: 3 against 8",
            "SQAKD's table; published +0.5 to +2.4",
            *(over("QAT", "SQAKD", 3, name) - over("QAT", "SQAKD", 8, name) for name in quantizers),
        ),
        claim(
            "SQAKD beats distillation that reads labels, from the same fixed teacher",
            "SQAKD",
            *(over(control, "SQAKD", b) for b in (2, 3, 4) for control in ("KD, T=4, labels", "KD, T=1, labels")),
        ),
        claim(
            "temperature 4 beats temperature 1, without labels",
            "SQAKD's setting",
            *(over("KD, T=1, no labels", "SQAKD", bits) for bits in (2, 3, 4)),
        ),
        claim(
            "labels and a teacher at temperature 1 beat labels alone",
            "LSQ; published +0.3 to +1.1 (W2 to W4)",
            *(over("QAT", "KD, T=1, labels", bits) for bits in (2, 3, 4)),
        ),
        claim("QKD beats QAT", "QKD", over("QAT", "QKD")),
        claim(
            "QKD's teacher, which learns, beats a fixed one",
            "QKD; others saw no gain",
            *(over(control, "QKD") for control in ("SQAKD", "KD, T=4, labels", "KD, T=1, labels")),
        ),
        claim(
            "each of QKD's phases adds: all three against two",
            "QKD",
            *(over(name, "QKD") for name in evidence.METHODS if name.startswith("QKD without")),
        ),
        claim(
            "a teacher and no labels beat few labels and no teacher",
            "asked here",
            *(runs["LSQ", 2, "SQAKD", 1.0] - runs["LSQ", 2, "QAT", share] for share in shares if share < 1),
        ),
    ]
    for share in (share for share in shares if share > 1):
        pairs = [(runs["LSQ", bits, "SQAKD", share], runs["LSQ", bits, "QAT", share]) for bits in (2, 3, 4)]
        text = "SQAKD beats QAT also where both see all images that the teacher learned from"
        found.append(claim(text, "asked here", *(sqakd - qat for sqakd, qat in pairs)))
    return found


def augmentation_claims(study: dict[str, Any], data: str) -> list[Claim]:
    """Of Kur and Zhao, on the students of augmentation_study.py; means are over its regimes, two at least.

    Args:
        study: with its rows.
        data: that its students were trained on.
    """
    rows = [row["metrics"] for row in study["rows"]]
    if len(rows) < 2:
        return []

    def predicts(text: str, source: str, metric: str) -> Claim:
        single = tuple(Comparison(row[metric]["spearman"], row[metric]["spearman_p"]) for row in rows)
        return Claim(text, source, compare([found.estimate for found in single]), single, True, data)

    gains = [[row[metric]["over_none"] for row in rows] for metric in ("CMI - CE", "CMI - centroid")]
    return [
        predicts("CMI minus cross-entropy predicts which augmentation makes the better student", "Kur and Zhao", "CMI - CE"),
        predicts("CMI minus centroid divergence predicts it", "Kur and Zhao, the other form in their code", "CMI - centroid"),
        Claim(
            "the augmentation so chosen beats none, by either form",
            "Kur and Zhao; published +1.0 to +5.9 over SQAKD",
            compare(np.mean(gains, axis=0)),
            tuple(compare(found) for found in gains),
            data=data,
        ),
    ]


def fashion_claims(document: dict[str, Any]) -> list[Claim]:
    """Of SQAKD's paper, on the students of fashion_study.py: a claim per network, over the seeds that all its students have."""
    found: dict[str, list[dict[str, float]]] = {}
    for (network, quantizer, bits, method), differences in fashion_study.over_qat(document).items():
        if (quantizer, method) == ("LSQ", "SQAKD") and bits in (2, 3):
            found.setdefault(network, []).append(differences)
    claims = []
    for network, single in found.items():
        seeds = sorted(set.intersection(*(set(differences) for differences in single)))
        if len(seeds) > 1:
            values = [np.array([differences[seed] for seed in seeds]) for differences in single]
            text = f"SQAKD without labels beats QAT with them at 2 and 3 bits, {network}"
            source = "SQAKD; published +0.4 to +3.3"
            claims.append(Claim(text, source, compare(np.mean(values, axis=0)), tuple(map(compare, values)), data=GARMENTS))
    return claims


def verdict(claim: Claim, adjusted: float) -> str:
    """In words: what the mean says after correction, and which of the single comparisons go against it.

    Args:
        claim: with its comparisons.
        adjusted: p of the mean, corrected for all claims.
    """
    ahead, behind = _significant(claim.single)
    if adjusted >= SIGNIFICANT:
        return "cannot be told here"
    if claim.mean.estimate < 0:
        return "does not hold: the reverse does"
    if behind:
        return f"holds on average, the reverse in {behind} of {len(claim.single)}"
    return "holds" if ahead == len(claim.single) else "holds on average"


def all_claims(studies: Studies) -> list[Claim]:
    """In the order of the page; p-values are corrected for the number of these."""
    of_augmentation = augmentation_claims(studies.augmentation, DRAWN)
    of_augmentation += augmentation_claims(studies.fashion_augmentation, GARMENTS)
    return claims(studies.glyphs) + of_augmentation + fashion_claims(studies.fashion)


def make_claims_table(studies: Studies) -> str:
    """Markdown: each claim, what was found, and the word that follows from it."""
    every = all_claims(studies)
    rows = []
    for claim, adjusted in zip(every, holm([claim.mean.p for claim in every]), strict=True):
        scale, unit = (1, "Spearman ") if claim.correlation else (100, "")
        mean, spread, power = scale * claim.mean.estimate, claim.mean.half_width, claim.mean.detectable
        ends = dict.fromkeys(f"{scale * at(found.estimate for found in claim.single):+.2f}" for at in (min, max))
        ahead, behind = _significant(claim.single)
        rows.append(
            [
                claim.text,
                claim.data,
                f"**{verdict(claim, adjusted)}**",
                f"{unit}{mean:+.2f}" + ("" if spread is None else f" ± {scale * spread:.2f}"),
                "< 0.001" if adjusted < 0.001 else f"{adjusted:.3f}",
                "-" if power is None else f"{scale * power:.2f}",
                " to ".join(ends),
                f"{ahead} / {behind} of {len(claim.single)}",
                claim.source,
            ]
        )
    header = ["claim", "data", "verdict", "mean, points", "p, after Holm", "found with 80 % power", "single comparisons"]
    return page_tables.markdown([*header, "for / against, each alone", "source"], rows)


def make_tests_table(studies: Studies) -> str:
    """Markdown: how many tests were made, and what is left of those that look significant."""
    every = all_claims(studies)
    families = {
        "claims": [claim.mean.p for claim in every],
        "their single comparisons": [found.p for claim in every for found in claim.single],
        "students against QAT, in the tables": [row["p"] for row in studies.glyphs["rows"] if row.get("p") is not None],
    }
    rows = [
        [
            name,
            str(len(p_values)),
            str(sum(p < SIGNIFICANT for p in p_values)),
            f"{SIGNIFICANT * len(p_values):.1f}",
            str(sum(p < SIGNIFICANT for p in holm(p_values))),
        ]
        for name, p_values in families.items()
    ]
    header = ["tests", "number", f"p < {SIGNIFICANT}, each alone", "as many by chance, without any effect", "after Holm"]
    return page_tables.markdown(header, rows)


def page_tables_of(studies: Studies) -> dict[str, str]:
    """The page's tables, by the names of their markers."""
    document, study = studies.glyphs, studies.augmentation
    plain, fixed = ("QAT", "SQAKD"), [method for method in evidence.METHODS if method.startswith("KD")]

    def controls(chosen: Callable[[dict[str, Any]], bool]) -> str:
        return tables.make_controls_table(document | {"rows": [row for row in document["rows"] if chosen(row)]})

    return {
        "evidence_claims": make_claims_table(studies),
        "evidence_tests": make_tests_table(studies),
        "evidence": tables.make_table(document),
        "evidence_kd": controls(lambda row: row["labels"] == 1 and row["method"] in (*plain, *fixed)),
        "evidence_qkd": controls(lambda row: row["labels"] == 1 and row["bits"] == 2),
        "evidence_labels": controls(lambda row: row["labels"] <= 1 and row["bits"] == 2 and row["method"] in plain),
        "evidence_images": controls(lambda row: row["labels"] >= 1 and row["method"] in (*plain, evidence.EVERYTHING)),
        "augmentation_study": augmentation_study.make_table(study),
        "augmentation_candidates": augmentation_study.make_candidates_table(study),
        "evidence_rates": tables.make_rates_table(document),
        "evidence_steps": tables.make_steps_table(document),
        "evidence_aims": tables.make_aims_table(document),
        "evidence_rows": tables.make_rows_table(document),
        "evidence_setup": tables.make_setup_table(document),
    }


def write(studies: Studies, page: Path) -> None:
    """Draw the figure beside the page, and put every table of the page in its place.

    Args:
        studies: that the page is made of.
        page: with its markers.
    """
    write_atomic(page.with_name(FIGURE), evidence_figure.draw(studies.glyphs))
    for name, table in page_tables_of(studies).items():
        page_tables.write_table(name, table, page)


def _significant(comparisons: Sequence[Comparison]) -> tuple[int, int]:
    signs = [found.estimate > 0 for found in comparisons if found.p < SIGNIFICANT]
    return sum(signs), len(signs) - sum(signs)


def main() -> None:
    """Read the figures, write figure and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in", dest="source", type=Path, default=evidence.RESULTS, help="JSON file of evidence.py")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of page and figure (docs); elsewhere a copy is made")
    options = parser.parse_args()
    in_docs = options.out.resolve() == DOCS
    if in_docs and options.source.resolve() != evidence.RESULTS:
        parser.error("docs/ shows the committed figures only: pass --out FOLDER.")
    studies = committed(options.source)
    page = options.out / PAGE
    if not in_docs:
        options.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DOCS / PAGE, page)
    write(studies, page)
    if in_docs:
        page_tables.write_table("evidence_choice", tables.make_choice_table(studies.glyphs), CHOICE)
    print(page, page.with_name(FIGURE), sep="\n")


if __name__ == "__main__":
    main()
