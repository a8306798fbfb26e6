"""The HTML page: everything in one file, readable without JavaScript, and closed to everything else.

The content security policy names the digests of the page's own style and script. Nothing else can run or be loaded, not even
markup that found its way into a name.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..bench.rows import Row
from .charts import latency_bars, layer_table, training_run
from .document import rows_of
from .scatter import accuracy_latency_plot, pareto
from .tables import WHAT, Column, common_setting, family, run_names, short, shown_columns, side_by_side
from .templates import static, template
from .verdicts import verdicts

_AXES = {
    "p50_ms": "median latency, ms",
    "cpu_ms": "processor time, ms",
    "file_mib": "file, MiB",
    "peak_rss_mib": "peak memory, MiB",
}
_MEASURES = {"accuracy": "top-1 accuracy, %", "agreement": "agreement with the trained model, %", "sqnr_db": "SQNR, dB"}
_FAMILIES = {"float": "floating point", "ptq": "PTQ", "qat": "QAT", "distilled": "QAT with distillation"}
_MARKERS = {
    "onnxruntime": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
    "openvino": "M-4.5-4.5h9v9h-9Z",
    "tensorrt": "M0-5.5L5.5 4.5h-11Z",
    "torch": "M0-6L6 0L0 6L-6 0Z",
}
_NO_BASE_NO_FORM = "base-uri 'none'; form-action 'none'"
_PERCENT = {"accuracy", "agreement"}


def render(document: Mapping[str, Any]) -> str:
    """The page of a document that fits the schema."""
    rows = rows_of(document)
    columns, names, best = shown_columns(rows), run_names(document), pareto(rows)
    style, script = static("report.css"), static("report.js")
    return template("template.html").render(
        family=family,
        marker=marker,
        what=WHAT,
        document=document,
        rows=rows,
        runs=list(zip(names, document["runs"], strict=True)),
        several_runs=len(names) > 1,
        columns=[(column, column.is_numeric(rows)) for column in columns],
        best=best,
        common=common_setting(rows),
        verdicts=verdicts(rows),
        beside=side_by_side(rows),
        families={kind: text for kind, text in _FAMILIES.items() if any(family(row) == kind for row in rows)},
        markers={name: path for name, path in _MARKERS.items() if any(row.runtime.startswith(name) for row in rows)},
        plot=accuracy_latency_plot(rows),
        bars=latency_bars(rows),
        layers=[layer_table(row) for row in rows if row.layers],
        training=[training_run(entry) for entry in document.get("training", ())],
        environments=[_environment(run) for run in document["runs"]],
        data=embedded(_data(rows, columns, names, best)),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; {_NO_BASE_NO_FORM}",
    )


def embedded(data: object) -> Markup:
    """JSON that can stand in a script element: pure ASCII, and nothing in it ends the element or begins another."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _data(rows: Sequence[Row], columns: Sequence[Column], names: Sequence[str], best: Sequence[bool]) -> dict[str, Any]:
    """What the script needs: sort keys of every cell, filters, and coordinates."""
    return {
        "axes": {key: name for key, name in _AXES.items() if any(getattr(row, key) is not None for row in rows)},
        "measures": {key: name for key, name in _MEASURES.items() if any(getattr(row, key) is not None for row in rows)},
        "rows": [_entry(row, columns, names, pareto) for row, pareto in zip(rows, best, strict=True)],
    }


def _entry(row: Row, columns: Sequence[Column], names: Sequence[str], best: bool) -> dict[str, Any]:
    several = len(names) > 1
    keys = [short(value) if isinstance(value := column.value(row), str) else value for column in columns]
    keys[1:1] = [row.run] if several else []
    figures = {key: getattr(row, key) for key in (*_AXES, *_MEASURES, "accuracy_low", "accuracy_high")}
    percent = {*_PERCENT, "accuracy_low", "accuracy_high"}
    return {
        "label": short(row.name, 60),
        "family": family(row),
        "best": best,
        "marker": marker(row),
        "keys": keys,
        "setting": f"{row.run}/{row.batch}/{row.threads}/{short(row.model)}",
        "filters": {
            "machine": names[row.run] if several else "",
            "model": short(row.model, 60),
            "method": short(row.method, 60),
            "bits": "float" if row.is_float else f"W{row.weight_bits}A{row.activation_bits}",
            "runtime": short(row.runtime, 60),
            "precision": short(row.precision, 60),
            "batch": row.batch,
            "threads": row.threads,
        },
        **{key: value * 100 if key in percent and value is not None else value for key, value in figures.items()},
    }


def marker(row: Row) -> str:
    """The outline of a row's point: round in ONNX Runtime, square in OpenVINO, a triangle on a GPU, a diamond in torch."""
    return next((path for name, path in _MARKERS.items() if row.runtime.startswith(name)), _MARKERS["onnxruntime"])


def _environment(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [(short(key).replace("_", " "), _fact(value)) for key, value in run["environment"].items() if key != "versions"]
    facts += [(f"seed, {short(key)}", str(value)) for key, value in run.get("seeds", {}).items()]
    return facts + [(short(key), short(value)) for key, value in run["environment"].get("versions", {}).items()]


def _fact(value: object) -> str:
    if isinstance(value, list):
        return short(", ".join(map(str, value)), 400)
    return "unknown" if value is None else short(value, 400)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
