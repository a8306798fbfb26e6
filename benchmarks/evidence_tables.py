"""The tables of the evidence, in Markdown, from the figures of evidence.py."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
import page_tables
from paired import compare

CHOICES = {"QAT": "QAT", "KD, T=4, labels": "KD", "QKD": "QKD", "SQAKD": "SQAKD"}
"""Methods among which users choose, and what the package calls them."""

WORTH = 0.002
"""Accuracy that training must gain over calibration to be worth it."""

BARS = {4: 0.005, 3: 0.015}
"""Bits: largest loss of accuracy against full precision that the project aims at."""


def make_table(document: dict[str, Any]) -> str:
    """Markdown: SQAKD against QAT for every quantizer and width."""
    by_key = {(row["quantizer"], row["bits"], row["method"], row["labels"]): row for row in document["rows"]}
    rows = []
    for quantizer in _quantizers(document):
        for bits in (2, 3, 4, 8):
            qat, sqakd = by_key[quantizer, bits, "QAT", 1.0], by_key[quantizer, bits, "SQAKD", 1.0]
            rows.append(
                [
                    f"{quantizer} W{bits}A{bits}",
                    _percent(qat["before"]),
                    _percent(qat["accuracy"], qat["interval"]),
                    _percent(sqakd["accuracy"], sqakd["interval"]),
                    f"{100 * sqakd['over_qat']:+.2f} (p {_p(sqakd['p'])})",
                    _percent(sqakd["deployed"]),
                ]
            )
    header = ["student", "calibrated only", "QAT", "SQAKD, no labels", "SQAKD over QAT, points", "SQAKD, deployed file"]
    return page_tables.markdown(header, rows)


def make_controls_table(document: dict[str, Any]) -> str:
    """Markdown: LSQ under every method, against QAT with all labels."""
    rows = []
    for row in document["rows"]:
        if row["quantizer"] != "LSQ" or row["bits"] == 8:
            continue
        labels = "" if row["labels"] == 1 else f", {_share(row['labels'])}"
        against = f"{100 * row['over_qat']:+.2f} (p {_p(row['p'])})" if "over_qat" in row else ""
        rows.append(
            [f"W{row['bits']}A{row['bits']}", row["method"] + labels, _percent(row["accuracy"], row["interval"]), against]
        )
    rows.sort(key=lambda row: row[0])
    return page_tables.markdown(["student", "method", "accuracy", "over QAT, points"], rows)


def make_rates_table(document: dict[str, Any]) -> str:
    """Markdown: accuracy on held-out images by rate, mean over quantizers."""
    columns = list(dict.fromkeys((row["bits"], row["method"]) for row in document["rates"]))
    shares = {(row["lr"], row["bits"], row["method"]): row["held_out"] for row in document["rates"]}
    rows = []
    for lr in dict.fromkeys(row["lr"] for row in document["rates"]):
        found = [shares[lr, *column] for column in columns]
        rows.append([f"{lr:g}", *map(_percent, found), _percent(fmean(found))])
    return page_tables.markdown(["rate", *(f"W{bits}A{bits}, {method}" for bits, method in columns), "mean"], rows)


def verdicts(document: dict[str, Any]) -> list[str]:
    """The project's aims, and whether they are met."""
    lines = []
    for row in document["rows"]:
        if row["method"] == "SQAKD" and row["bits"] < 8 and row["labels"] == 1:
            ahead = row["over_qat"] > 0 and row["p"] is not None and row["p"] < 0.05
            name = f"{row['quantizer']} W{row['bits']}A{row['bits']}"
            lines.append(
                f"{name}: SQAKD over QAT {100 * row['over_qat']:+.2f} (p {_p(row['p'])}): {'met' if ahead else 'MISSED'}"
            )
            if row["bits"] in BARS:
                loss = document["teacher"] - row["accuracy"]
                met = loss <= BARS[row["bits"]]
                lines.append(f"{name}: {100 * loss:.2f} points below full precision: {'met' if met else 'MISSED'}")
    return lines


def make_choice_table(document: dict[str, Any]) -> str:
    """Markdown: by bits, what is left to full precision with LSQ, and what follows from it with labels and without.

    Without labels there are calibration and SQAKD; with them the best of all, and what it is not significantly better than (in
    pairs over seeds, p < 0.05, uncorrected). Training is left out where it gains less than WORTH.
    """
    runs = {(row["bits"], row["method"]): row for row in document["rows"] if row["quantizer"] == "LSQ" and row["labels"] == 1}
    lines = []
    for bits in sorted({bits for bits, _ in runs}, reverse=True):
        found = {name: runs[bits, name]["accuracies"] for name in CHOICES if (bits, name) in runs}
        before, means = runs[bits, "QAT"]["before"], {name: fmean(values) for name, values in found.items()}
        best = max(means, key=means.__getitem__)
        level = [name for name in found if name == best or compare(np.subtract(found[best], found[name])).p >= 0.05]
        trained = max(means.values()) - before >= WORTH
        lines.append(
            [
                f"W{bits}A{bits}",
                _percent(before - document["teacher"], sign="+"),
                *(_percent(means[name] - document["teacher"], sign="+") if name in means else "" for name in CHOICES),
                "SQAKD" if means["SQAKD"] - before >= WORTH else "calibration alone",
                " or ".join(CHOICES[name] for name in level) if trained else "calibration alone",
            ]
        )
    header = ["bits", "calibrated only", *CHOICES.values(), "take without labels", "take with labels"]
    return page_tables.markdown(header, lines)


def make_setup_table(document: dict[str, Any]) -> str:
    """Markdown: size, teacher, machine and versions."""
    facts = {name.replace("_", " "): value for name, value in document["size"].items()}
    facts |= {"seeds that are whole": document["rows"][0]["seeds"], "teacher, %": _percent(document["teacher"])}
    facts["hours of one core, students"] = f"{document['hours']:.2f}"
    found = dict(document["environment"])
    versions = found.pop("versions")
    facts |= {name.replace("_", " "): value for name, value in found.items()} | versions
    rows = [[name, ", ".join(value) if isinstance(value, list) else str(value)] for name, value in facts.items()]
    return page_tables.markdown(["what", "value"], rows)


def make_steps_table(document: dict[str, Any]) -> str:
    """Markdown: from calibration over QAT and SQAKD to the files that are deployed."""
    by_method = {
        (row["quantizer"], row["bits"], row["method"]): row
        for row in document["rows"]
        if row["labels"] == 1 and row["method"] in ("QAT", "SQAKD")
    }
    quantizers, rows = _quantizers(document), []
    for quantizer, bits, method in sorted(by_method, key=lambda key: (quantizers.index(key[0]), key[1])):
        if method != "SQAKD":
            continue
        sqakd, qat = by_method[quantizer, bits, "SQAKD"], by_method[quantizer, bits, "QAT"]
        shares = [sqakd["before"], qat["accuracy"], qat["deployed"], sqakd["accuracy"], sqakd["deployed"]]
        below = _percent(sqakd["deployed"] - document["teacher"], sign="+")
        rows.append([f"{quantizer} W{bits}A{bits}", *map(_percent, shares), below])
    header = ["student", "calibrated only", "QAT", "its file", "SQAKD", "its file", "file over full precision, points"]
    return page_tables.markdown(header, rows)


def make_aims_table(document: dict[str, Any]) -> str:
    """Markdown: the project's aims, met or missed."""
    lines = [line.split(": ") for line in verdicts(document)]
    return page_tables.markdown(["student", "found", "aim"], lines)


def make_rows_table(document: dict[str, Any]) -> str:
    """Markdown: every combination."""
    quantizers, rows = _quantizers(document), []
    for row in sorted(document["rows"], key=lambda row: (quantizers.index(row["quantizer"]), row["bits"])):
        student = f"{row['quantizer']} W{row['bits']}A{row['bits']}"
        against = ["", ""]
        if "over_qat" in row:
            against = [_percent(row["over_qat"], row["over_qat_interval"], "+"), "-" if row["p"] is None else f"{row['p']:.4f}"]
        shares = [_percent(row["before"]), _percent(row["accuracy"], row["interval"]), _percent(row["deployed"])]
        rows.append([student, row["method"], f"{100 * row['labels']:g} %", *shares, *against])
    header = ["student", "method", "images", "calibrated only", "trained", "its file", "over QAT, points", "p"]
    return page_tables.markdown(header, rows)


def _quantizers(document: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["quantizer"] for row in document["rows"]))


def _share(labels: float) -> str:
    return f"{100 * labels:g} % of the labels" if labels < 1 else f"{labels:g} times the images, all that the teacher saw"


def _percent(share: float, half_width: float | None = None, sign: str = "") -> str:
    return f"{100 * share:{sign}.2f}" + ("" if half_width is None else f" ± {100 * half_width:.2f}")


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
