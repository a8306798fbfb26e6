"""The HTML page: everything in one file, readable without JavaScript, and closed to everything else.

The content security policy names the digests of the page's own style and script. Nothing else can run or be loaded, not even
markup that found its way into a name.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from markupsafe import Markup

from ..bench.rows import MetricValue, Row
from .charts import latency_bars, layer_table, training_run
from .document import rows_of
from .histories import proofs_of, trainings_of, tunings_of
from .scatter import accuracy_latency_plot, labels, metric_words, pareto, point_scales
from .tables import CONFIGURATION, Column, common_setting, families, family, run_names, short, shown_columns, side_by_side
from .templates import static, template
from .verdicts import RULE, recommendations, verdicts

_AXES = {
    "p50_ms": "median latency, ms",
    "cpu_ms": "processor time, ms",
    "file_mib": "file, MiB",
    "peak_rss_mib": "peak memory, MiB",
}
_AGREEMENTS = {"agreement": "agreement with the trained model, %", "sqnr_db": "SQNR, dB"}
_MARKERS = {
    "onnxruntime": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
    "openvino": "M-4.5-4.5h9v9h-9Z",
    "tensorrt": "M0-5.5L5.5 4.5h-11Z",
    "torch": "M0-6L6 0L0 6L-6 0Z",
}
_NO_BASE_NO_FORM = "base-uri 'none'; form-action 'none'"


def render(document: Mapping[str, Any]) -> str:
    """The page of a document that fits the schema."""
    rows = rows_of(document)
    columns, names, best = shown_columns(rows), run_names(document), pareto(rows)
    recommended = recommendations(rows)
    style, script = static("report.css"), static("report.js")
    return template("template.html").render(
        family=family,
        marker=marker,
        configuration=CONFIGURATION,
        document=document,
        rows=rows,
        runs=list(zip(names, document["runs"], strict=True)),
        several_runs=len(names) > 1,
        columns=[(column, column.is_numeric(rows)) for column in columns],
        best=best,
        common=common_setting(rows),
        recommendations=recommended,
        rule=RULE,
        picked={id(one.row) for one in recommended if one.row is not None},
        where=_where(rows),
        identity=id,
        verdicts=verdicts(rows),
        beside=side_by_side(rows),
        families=families(rows),
        markers={name: path for name, path in _MARKERS.items() if any(row.runtime.startswith(name) for row in rows)},
        plot=accuracy_latency_plot(rows),
        sizes=_sizes(rows),
        bars=latency_bars(rows),
        layers=[layer_table(row) for row in rows if row.layers],
        training=[training_run(entry) for entry in trainings_of(document, rows)],
        parity=proofs_of(document, rows),
        tuned=tunings_of(rows),
        when=_when,
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


@dataclass(frozen=True)
class _Measure:
    """What the plot may show upwards: accuracy, a number of a metric, agreement or SQNR.

    Attributes:
        key: of a row's entry.
        name: of the axis.
        lower: whether lower is better.
        ranked: whether better and worse are known.
        percent: whether values are shares, and end at 100.
        value: of a row, and the ends of its interval.
    """

    key: str
    name: str
    lower: bool
    ranked: bool
    percent: bool
    value: Callable[[Row], tuple[float | None, float | None, float | None]]

    def as_data(self) -> dict[str, Any]:
        return {"name": short(self.name, 80), "lower": self.lower, "ranked": self.ranked, "percent": self.percent}

    def figures(self, row: Row) -> dict[str, float | None]:
        factor = 100 if self.percent else 1
        keys = (self.key, f"{self.key}_low", f"{self.key}_high")
        return {key: None if value is None else value * factor for key, value in zip(keys, self.value(row), strict=True)}


def _measures(rows: Sequence[Row]) -> list[_Measure]:
    """Those that some row has, what rows are ranked by first."""
    metrics: dict[tuple[str, str], MetricValue] = {}
    for value in (value for row in rows for value in _values(row)):
        metrics.setdefault(value.kind, value)
    found = []
    for index, (kind, first) in enumerate(metrics.items()):  # names come from outside, keys do not
        lower, ranked = first.higher_is_better is False, first.higher_is_better is not None
        found.append(_Measure(f"metric{index}", metric_words(first)[0], lower, ranked, first.unit == "%", partial(_ends, kind)))
    for key, name in _AGREEMENTS.items():
        if any(getattr(row, key) is not None for row in rows):
            ends = partial(_attribute, key)
            found.append(_Measure(key, name, lower=False, ranked=True, percent=key == "agreement", value=ends))
    return found


def _values(row: Row) -> Sequence[MetricValue]:
    return row.metrics or ([] if row.metric is None else [row.metric])


def _ends(kind: tuple[str, str], row: Row) -> tuple[float | None, float | None, float | None]:
    found = next((value for value in _values(row) if value.kind == kind), None)
    return (None, None, None) if found is None else (found.value, found.low, found.high)


def _attribute(name: str, row: Row) -> tuple[float | None, float | None, float | None]:
    return getattr(row, name), None, None


def _data(rows: Sequence[Row], columns: Sequence[Column], names: Sequence[str], best: Sequence[bool]) -> dict[str, Any]:
    """What the script needs: sort keys of every cell, filters, and coordinates."""
    measures = _measures(rows)
    descending = [column.descending for column in columns]
    descending[1:1] = [False] if len(names) > 1 else []
    texts, scales = labels(rows), point_scales(rows)
    return {
        "axes": {key: name for key, name in _AXES.items() if any(getattr(row, key) is not None for row in rows)},
        "measures": {measure.key: measure.as_data() for measure in measures},
        "descending": descending,
        "rows": [
            _entry(row, columns, names, pareto, measures, texts[id(row)], scales[id(row)])
            for row, pareto in zip(rows, best, strict=True)
        ],
    }


def _entry(
    row: Row,
    columns: Sequence[Column],
    names: Sequence[str],
    best: bool,
    measures: Sequence[_Measure],
    tag: str,
    scale: float,
) -> dict[str, Any]:
    several = len(names) > 1
    keys = [short(value) if isinstance(value := column.value(row), str) else value for column in columns]
    keys[1:1] = [row.run] if several else []
    return {
        "label": short(row.name, 60),
        "tag": short(tag, 44),
        "family": family(row),
        "best": best,
        "marker": marker(row),
        "scale": round(scale, 3),
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
        **{key: getattr(row, key) for key in _AXES},
        **{key: value for measure in measures for key, value in measure.figures(row).items()},
    }


def marker(row: Row) -> str:
    """The outline of a row's point: round in ONNX Runtime, square in OpenVINO, a triangle on a GPU, a diamond in torch."""
    return next((path for name, path in _MARKERS.items() if row.runtime.startswith(name)), _MARKERS["onnxruntime"])


def _where(rows: Sequence[Row]) -> dict[int, str]:
    """For the line under a row's name: its runtime, and what else tells it from others."""
    several = {name: len({getattr(row, name) for row in rows}) > 1 for name in ("model", "batch", "threads")}
    found = {}
    for row in rows:
        parts = [f"{row.runtime} {row.precision}", *([row.model] if several["model"] and row.model else [])]
        parts += [f"{name} {getattr(row, name)}" for name in ("batch", "threads") if several[name]]
        found[id(row)] = short(", ".join(parts), 80)
    return found


def _sizes(rows: Sequence[Row]) -> str:
    """The smallest and the largest file, or nothing."""
    known = [row.file_mib for row in rows if row.file_mib is not None]
    return f"{min(known):.2f} to {max(known):.2f} MiB" if known else ""


def _when(text: str) -> str:
    """A time stamp to read; anything else stays as it is."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return short(text, 40)
    zone = moment.strftime("%Z").removesuffix("+00:00")
    return f"{moment.day} {moment:%B %Y, %H:%M} {zone}".rstrip()


def _environment(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = {key: value for key, value in run["environment"].items() if key != "versions" and value not in (None, "unknown")}
    facts = [(short(key).replace("_", " "), _fact(value)) for key, value in known.items()]
    facts += [(f"seed, {short(key)}", str(value)) for key, value in run.get("seeds", {}).items()]
    return facts + [(short(key), short(value)) for key, value in run["environment"].get("versions", {}).items()]


def _fact(value: object) -> str:
    if isinstance(value, list):
        return short(", ".join(map(str, value)), 400)
    return short(value, 400)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
