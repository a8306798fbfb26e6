"""Reports: what stands in them, what they survive, and the page in a real browser."""

import base64
import copy
import hashlib
import html
import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import chromium
import jsonschema
import pytest
from markdown_it import MarkdownIt
from report_rows import CONDITIONS, FINDING, LAYERS, ROW

from qakd_plugin import QakdError, write_report
from qakd_plugin.bench.rows import MetricValue, OutputAgreement, Row
from qakd_plugin.bench.schema import SCHEMA_VERSION, schema, validate
from qakd_plugin.cli import main
from qakd_plugin.report import build_document, console_table, merge_reports, read_report
from qakd_plugin.report.charts import training_run
from qakd_plugin.report.document import rows_of
from qakd_plugin.report.page import embedded, render
from qakd_plugin.report.scatter import Axis, accuracy_latency_plot, pareto
from qakd_plugin.report.tables import short, side_by_side
from qakd_plugin.report.verdicts import verdicts, warnings_of

FP32 = replace(
    ROW, method="FP32", toolkit=None, weight_bits=32, activation_bits=32, precision="float32", p50_ms=2.0, speedup=1.0
)
BF16 = replace(FP32, runtime="openvino", precision="bfloat16", p50_ms=0.8)
PTQ = replace(ROW, method="PTQ", accuracy=0.93, p50_ms=1.1)
QAT = replace(ROW, method="QAT", accuracy=0.96, p50_ms=0.9)
ROWS = [FP32, BF16, PTQ, QAT, replace(ROW, findings=(FINDING,), layers=LAYERS, conditions=CONDITIONS, speedup=2.0)]
HISTORY = [
    {"epoch": 0, "phase": "distill", "loss": 1.5, "val_accuracy": 0.5, "lr": 1e-3, "augmentation": "cutmix",
     "augmentation_scores": {"none": -0.5, "cutmix": 0.25},
     "augmentation_ranking": [
         {"name": "none", "score": -0.5, "cmi": 0.5, "cross_entropy": 1.0, "centroid_divergence": 1.1, "form": "ce"},
         {"name": "cutmix", "score": 0.25, "cmi": 0.75, "cross_entropy": 0.5, "centroid_divergence": 0.4, "form": "ce"},
     ]},
    {"epoch": 1, "phase": "distill", "loss": 0.5, "val_accuracy": 0.75, "lr": 1e-4},
]  # fmt: skip
PARITY = {
    "name": "student",
    "weight_codes": 1234,
    "activation_codes": 10,
    "ties_runtime": 0,
    "runtime_deviation": 1e-7,
    "fused": {"top1": 1.0, "sqnr_db": float("inf")},
}
ENGINE = {
    "name": "e",
    "sha256": "0" * 64,
    "bytes": 2**20,
    "convolutions": {"int8": 9, "total": 9},
    "matmuls": "unknown",
    "runtime": {"name": "tensorrt_rtx", "version": "1.7"},
}
SCRIPT = "<script>document.title='pwned';alert(1)</script>"
HOSTILE = [
    SCRIPT,
    "</script>" + SCRIPT,
    "\"><img src=x onerror=alert(1)><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }} {% raw %} ${alert(1)} \u2028 \u2029 \u202e \x00 \x1b[31m",
    "| a | b |\n\n# head\n[x](javascript:alert(1)) ![i](http://evil.example/i.png) "
    "<http://evil.example> http://evil.example www.evil.example `c` **b** _i_ &lt;b&gt;",
    "<!--", "]]>", "</style><style>body{display:none}</style>", "&quot;&#60;b&#62;", "x" * 10_000,
]  # fmt: skip


def document(rows=ROWS, **details):
    return build_document(
        rows, training=[{"name": "run", "history": HISTORY}], parity=[PARITY], engines=[ENGINE], notes=["a note"], **details
    )


def hostile_document(text):
    finding, layer = replace(FINDING, kind=text, layers=(text,), advice=text), replace(LAYERS[0], name=text, op=text)
    named = replace(ROW, model=text, method=text, toolkit=text, runtime=text, precision=text, p50_ms=9.0)
    counted = {"metrics": (MetricValue(text, 0.5, 0.4, 0.6, True),), "outputs": (OutputAgreement(text, 0.5, 20.0),)}
    rows = [replace(named, findings=(finding,), layers=(replace(layer, precision=text),), **counted), replace(FP32, model=text)]
    row = {"epoch": text, "phase": text, "loss": text, text: 1.0, "augmentation": text, "augmentation_scores": {text: 1.0}}
    row["augmentation_ranking"] = [{"name": text, "cmi": 1.0, "cross_entropy": 0.5, "form": text}]
    made = build_document(
        [*rows, *ROWS],
        title=text,
        notes=[text],
        seeds={text: 3},
        training=[{"name": text, "history": [row]}],
        parity=[{**PARITY, "name": text}],
        engines=[{**ENGINE, "name": text, "sha256": text, "matmuls": text, "runtime": {"name": text, "version": text}}],
    )
    made["runs"][0]["environment"] |= {"cpu": text, text: text, "versions": {text: text}}
    made["runs"][0]["warnings"] = [text]
    return made


# -- the document


def test_the_schema_that_others_read_judges_as_the_check_does():
    """By another library, leaf by leaf; there, 1.0 is an integer, as in all of JSON Schema."""
    judge = jsonschema.Draft202012Validator(schema())
    judge.check_schema(schema())
    original, counted = document(), {True: 0, False: 0}
    assert judge.is_valid(json.loads(json.dumps(original)))
    for place in leaves(original):
        for odd in (None, -1, 0.5, 3, 2**40, True, "text", [], {}):
            damaged = copy.deepcopy(original)
            *outer, last = place
            holder = damaged
            for key in outer:
                holder = holder[key]
            holder[last] = odd
            try:
                validate(damaged)
            except QakdError as error:
                accepted = "the report has 1 runs" in str(error)  # of rows that name another run the schema knows nothing
            else:
                accepted = True
            assert accepted == judge.is_valid(damaged), (place, odd)
            counted[accepted] += 1
    assert min(counted.values()) > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made["rows"][1].update(p50=1.0), "report: rows/1/p50: is no field that a report has."),
        (lambda made: made["rows"][1].pop("p50_ms"), "report: rows/1/p50_ms: is missing."),
        (
            lambda made: made["rows"][0].update(accuracy=2),
            "report: rows/0/accuracy: Input should be less than or equal to 1, got 2.",
        ),
        (lambda made: made.update(more=1), "report: more: is no field that a report has."),
        (
            lambda made: made["engines"][0]["convolutions"].update(int8="a\nb"),
            "report: engines/0/convolutions/int8: Input should be a valid integer, got 'a\\nb'.",
        ),
        (
            lambda made: made["engines"][0].update(matmuls=5),
            "report: engines/0/matmuls: Input should be a valid string, got 5.",
        ),
        (lambda made: made["training"][0].update({("a", "b"): 1}), "report: training/0/a key: object is no JSON type."),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(change, message):
    made = copy.deepcopy(document())
    change(made)
    with pytest.raises(QakdError) as caught:
        validate(made)
    assert str(caught.value) == message


def test_a_report_survives_the_round_trip(tmp_path):
    path = write_report(ROWS, tmp_path / "out" / "report.html", title="T", notes=["n"], seeds={"split": 3})
    read = read_report(path.with_suffix(".json"))
    assert rows_of(read) == ROWS
    assert read["runs"][0]["seeds"] == {"split": 3}
    assert read["schema_version"] == SCHEMA_VERSION == 3
    again = write_report(read, tmp_path / "again.html")
    assert again.read_text() == path.read_text()
    assert "SQAKD W8A8" in path.with_suffix(".md").read_text()


def test_names_with_dots_are_reports_of_their_own(tmp_path):
    """6.10: the version of a network is no extension."""
    names = ["resnet18.v2", "resnet18.v3", "mobilenet"]
    paths = [
        write_report(ROWS, tmp_path / f"{name}{end}", title=name) for name, end in zip(names, ("", "", ".html"), strict=True)
    ]
    assert [path.name for path in paths] == [f"{name}.html" for name in names]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}{end}" for name in names for end in (".html", ".md", ".json")}
    assert [read_report(tmp_path / f"{name}.json")["title"] for name in names] == names


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(QakdError, match="rows is empty: pass what benchmark returned"):
        write_report([], tmp_path / "r.html")
    assert not any(tmp_path.iterdir())


def test_what_a_finished_document_cannot_take_is_refused(tmp_path):
    with pytest.raises(QakdError, match=r"title, notes: .*build_document"):
        write_report(document(), tmp_path / "r.html", title="x", notes=["n"])
    assert not any(tmp_path.iterdir())


VERSION_1 = {
    "schema_version": 1, "title": "old", "created": "2026-01-01T00:00:00+00:00", "seeds": {"split": 1}, "notes": ["as it was"],
    "environment": {"cpu": "Old CPU", "python": "3.11.2", "versions": {"onnx": "1.18"}},
    "rows": [{"model": "m", "method": "FP32", "toolkit": None, "weight_bits": 32, "activation_bits": 32,
              "runtime": "onnxruntime", "precision": "float32",
              "batch": 1, "threads": 1, "calls": 70, "p50_ms": 1.5, "p90_ms": 1.7, "p99_ms": None,
              "cpu_ms": 1.5, "throughput": 666.0, "load_ms": 3.0, "file_mib": 0.3, "accuracy": 0.9, "accuracy_low": 0.8,
              "accuracy_high": 0.95, "samples": 100, "agreement": None, "sqnr_db": None, "integer_layers": 0,
              "total_layers": 10, "speedup": 1.0, "speedup_over_best_float": 1.0}],
    "training": [{"name": "t", "history": [{"epoch": 0, "phase": "distill", "loss": 1.0}]}], "parity": [], "engines": [],
}  # fmt: skip


def test_a_report_of_version_1_is_read(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(VERSION_1))
    read = read_report(tmp_path / "old.json")
    assert read["schema_version"] == 3
    assert read["runs"] == [{key: VERSION_1[key] for key in ("created", "environment", "seeds", "notes")}]
    (row,) = rows_of(read)
    assert (row.p50_ms, row.run, row.layers) == (1.5, 0, ())
    page = write_report(read, tmp_path / "new.html").read_text()
    assert "Old CPU" in page
    assert "as it was" in page


def test_a_report_of_version_2_is_read(tmp_path):
    """It had no metrics but accuracy."""
    old = document()
    for row in old["rows"]:
        del row["metrics"], row["outputs"]
    old["schema_version"] = 2
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert rows_of(read_report(tmp_path / "old.json")) == rows_of(document())


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"accuracy": 2.0}, "accuracy"),
        ({"metrics": (MetricValue("f1", float("inf")),)}, "metrics/0/value: inf is not a finite number"),
        ({"metrics": (MetricValue("f1", 0.5, unit="dB"),)}, "metrics/0/unit"),
        ({"p50_ms": 0.0}, "p50_ms"),
        ({"p50_ms": float("nan")}, "p50_ms"),
        ({"batch": 0}, "batch"),
        ({"model": None}, "model"),
        ({"model": "\ud800"}, "model: text with a lone surrogate"),
        ({"samples": 10**30}, "beyond 2\\^63"),
    ],
)
def test_a_row_that_does_not_fit_the_schema_is_named(change, place, tmp_path):
    with pytest.raises(QakdError, match=place):
        write_report([replace(ROW, **change)], tmp_path / "report.html")
    assert not any(tmp_path.iterdir())


GOOD = json.dumps(document())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe\x00",
        b"\x00" * 100,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        ('{"schema_version": 3, "title": ' + "[" * 500 + "]" * 500 + "}").encode(),
        GOOD.replace('"schema_version": 3', '"schema_version": 4').encode(),
        GOOD.replace('"schema_version": 3', '"schema_version": true').encode(),
        GOOD.replace('"schema_version": 3', '"schema_version": [3]').encode(),
        GOOD.replace('"schema_version": 3, ', "").encode(),
        GOOD.replace('"p50_ms": 2.0', '"p50_ms": NaN').encode(),
        GOOD.replace('"p50_ms": 2.0', '"p50_ms": -Infinity').encode(),
        GOOD.replace('"p50_ms": 2.0', '"p50_ms": 1e999').encode(),
        GOOD.replace('"p50_ms": 2.0', '"p50_ms": ' + "9" * 5000).encode(),
        GOOD.replace('"samples": 450', '"samples": ' + "9" * 400).encode(),
        GOOD.replace('"run": 0', '"run": 1').encode(),
        GOOD.replace('"a note"', '"\\ud800"').encode(),
        json.dumps({**VERSION_1, "rows": 3}).encode(),
        json.dumps({**VERSION_1, "environment": None}).encode(),
    ],
    ids=range(23),
)
def test_a_file_that_is_no_report_is_refused_by_name(content, tmp_path):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(QakdError, match=r"r\.json"):
        read_report(tmp_path / "r.json")


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(QakdError, match=path.name):
            read_report(path)


def leaves(value, place=()):
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*place, key))
    else:
        yield place


def test_whatever_is_damaged_is_refused_or_shown(tmp_path):
    """Every leaf of a report in turn becomes something else: an error that names the file, or a whole report."""
    odd = [None, -1, 0, 1e308, -1e-300, 2**62, True, "", "x" * 5000, [], {}, [[]], {"a": {"b": [1]}}, SCRIPT]
    original, draw, refused = document(), random.Random(0), []
    for place in leaves(original):
        damaged = copy.deepcopy(original)
        holder = damaged
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = draw.choice(odd)
        (tmp_path / "r.json").write_text(json.dumps(damaged))
        try:
            read = read_report(tmp_path / "r.json")
        except QakdError as error:
            refused.append(str(error))
            continue
        write_report(read, tmp_path / "shown.html")
    assert len(refused) > 100
    assert all("r.json" in message for message in refused)


def test_bytes_that_are_damaged_are_refused_or_shown(tmp_path):
    """How many of these are still reports depends on the machine that GOOD describes: none has to be."""
    draw, data, refused = random.Random(1), GOOD.encode(), []
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "r.json").write_bytes(damaged)
        try:
            render(read_report(tmp_path / "r.json"))
        except QakdError as error:
            refused.append(str(error))
    assert all("r.json" in message for message in refused)


def test_a_report_that_was_cut_off_is_refused_wherever_it_was(tmp_path):
    draw, data = random.Random(1), GOOD.encode()
    for size in (0, 1, len(data) - 1, *(draw.randrange(len(data)) for _ in range(50))):
        (tmp_path / "r.json").write_bytes(data[:size])
        with pytest.raises(QakdError, match=r"r\.json"):
            read_report(tmp_path / "r.json")


def _with_byte_in_a_note(byte):
    return GOOD.encode().replace(b'"a note"', b'"a n' + byte + b'te"')


@pytest.mark.parametrize("byte", [b"\x00", b"\x1f", b'"', b"\x80", b"\xff"])
def test_a_byte_that_is_no_text_is_refused(byte, tmp_path):
    (tmp_path / "r.json").write_bytes(_with_byte_in_a_note(byte))
    with pytest.raises(QakdError, match=r"r\.json"):
        read_report(tmp_path / "r.json")


@pytest.mark.parametrize("byte", [b" ", b"0", b"A", b"<", b"&", b"~"])
def test_a_byte_that_is_other_text_is_shown(byte, tmp_path):
    (tmp_path / "r.json").write_bytes(_with_byte_in_a_note(byte))
    assert f"a n{byte.decode()}te" in html.unescape(render(read_report(tmp_path / "r.json")))


# -- several runs


def test_merged_rows_keep_their_environment_and_their_ratios(tmp_path, capsys):
    first, second = document(title="one"), document([replace(row, p50_ms=row.p50_ms / 100) for row in ROWS], title="two")
    second["runs"][0]["environment"]["cpu"] = "Another CPU"
    for name, made in (("a", first), ("b", second)):
        write_report(made, tmp_path / f"{name}.html")
    assert main(["report", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(tmp_path / "m.html")]) == 0
    merged = read_report(tmp_path / "m.json")
    assert merged["title"] == "one + two"
    assert [run["environment"]["cpu"] for run in merged["runs"]] == [first["runs"][0]["environment"]["cpu"], "Another CPU"]
    rows = rows_of(merged)
    assert [row.run for row in rows] == [0] * 5 + [1] * 5
    assert [row.speedup for row in rows] == [row.speedup for row in ROWS] * 2
    assert pareto(rows) == pareto(ROWS) * 2, "a machine a hundred times as fast beats nothing on another one"
    assert [verdict.is_faster for verdict in verdicts(rows)] == [verdict.is_faster for verdict in verdicts(ROWS)] * 2
    assert len(merged["training"]) == len(merged["engines"]) == 1, "told once"
    text = (tmp_path / "m.html").read_text()
    assert "2: Another CPU" in text
    third = copy.deepcopy(first)
    third["runs"][0]["created"] = "2026-01-01T00:00:00+00:00"
    thrice = merge_reports([merged, first, third, second, first], "all")
    assert (thrice["title"], [row["run"] for row in thrice["rows"]]) == ("all", [0] * 5 + [1] * 5 + [2] * 5), "each run once"
    assert thrice["runs"] == [*merged["runs"], *third["runs"]]
    assert main(["report", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "--out is missing" in capsys.readouterr().err
    with pytest.raises(QakdError, match="documents is empty"):
        merge_reports([])


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("out", ["a.html", "folder/../b.html", "a.md"])
def test_a_merge_replaces_no_report_that_was_given(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        write_report(document(title=name, seeds={name: 1}), f"{name}.html")
    before = contents(tmp_path)
    assert main(["report", "a.json", "b.json", "--out", out]) == 1
    assert re.search(r"--out: .* would replace [ab]\.json", capsys.readouterr().err)
    assert contents(tmp_path) == before
    for flags in ([], ["--force"]):
        assert main(["report", "a.json", "b.json", "--out", "both.html", *flags]) == 0
    assert len(read_report("both.json")["runs"]) == 2


def test_the_json_of_a_single_report_stays_the_source(tmp_path, capsys):
    source = write_report(document(), tmp_path / "r.html").with_suffix(".json")
    before = source.read_bytes()
    assert main(["report", str(source), "--title", "again"]) == 1
    assert "r.html is there already" in capsys.readouterr().err
    assert main(["report", str(source), "--title", "again", "--force"]) == 0
    assert "<title>again</title>" in (tmp_path / "r.html").read_text()
    assert (tmp_path / "r.md").read_text().startswith("# again\n")
    assert main(["report", str(source), "--out", str(tmp_path / "other.html")]) == 0
    assert source.read_bytes() == before
    assert not (tmp_path / "other.json").exists()
    source.rename(tmp_path / "odd.md")
    assert main(["report", str(tmp_path / "odd.md")]) == 1
    assert "would replace" in capsys.readouterr().err
    assert (tmp_path / "odd.md").read_bytes() == before


# -- what is derived from rows


def test_pareto_keeps_what_nothing_of_its_setting_beats():
    draw = random.Random(0)
    rows = [
        replace(ROW, p50_ms=draw.randint(1, 6), accuracy=draw.choice((None, 0.5, 0.6, 0.7, 0.8)), batch=draw.choice((1, 8)))
        for _ in range(200)
    ]

    def beaten(row, other):
        if other.accuracy is None or other.batch != row.batch:
            return False
        better = other.p50_ms < row.p50_ms or other.accuracy > row.accuracy
        return better and other.p50_ms <= row.p50_ms and other.accuracy >= row.accuracy

    expected = [row.accuracy is not None and not any(beaten(row, other) for other in rows) for row in rows]
    assert pareto(rows) == expected


RMSE = MetricValue("root_mean_squared_error", 0.25, 0.2, 0.3, higher_is_better=False)
DEPTH = [
    replace(row, accuracy=None, accuracy_low=None, accuracy_high=None, metrics=(replace(RMSE, value=value),), p50_ms=time)
    for row, value, time in ((FP32, 0.2, 4.0), (PTQ, 0.5, 1.0), (QAT, 0.3, 1.0), (ROW, 0.25, 0.5))
]


def test_rows_are_ranked_by_their_metric_in_its_own_direction(tmp_path):
    """The smallest error is the best one; in the other direction the same rows are ranked the other way round."""
    assert pareto(DEPTH) == [True, False, False, True]
    turned = [replace(row, metrics=(replace(row.metrics[0], higher_is_better=True),)) for row in DEPTH]
    assert pareto(turned) == [False, True, False, True]
    unknown = [replace(row, metrics=(replace(row.metrics[0], higher_is_better=None),)) for row in DEPTH]
    assert not any(pareto(unknown))
    both = [DEPTH[2], replace(DEPTH[2], metrics=(replace(RMSE, value=0.1),), runtime=QAT.runtime, p50_ms=2.0)]
    assert side_by_side(both).lines[0][2][2] is both[1]
    plot = accuracy_latency_plot(DEPTH)
    assert (plot.y_name, plot.better, plot.corner) == (RMSE.name, "better", "lower left")
    heights = {point.metric.value: point.y for point in plot.points}
    assert sorted(heights, key=heights.get) == sorted(heights, reverse=True), "the axis goes up all the same"
    assert accuracy_latency_plot(unknown).frontiers == ()
    path = write_report(DEPTH, tmp_path / "depth.html")
    assert rows_of(read_report(path.with_suffix(".json"))) == [replace(row, run=0) for row in DEPTH]
    page, text = path.read_text(), path.with_suffix(".md").read_text()
    assert "lower left is better" in page
    assert "accurate" not in page + text
    assert "0.2 to 0.3" in text
    assert all(f"{row.metrics[0].value:.4g}" in text for row in DEPTH)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page).group(1))
    assert data["measures"] == {"metric0": {"name": RMSE.name, "lower": True, "ranked": True, "percent": False}}
    assert not any(data["descending"]), "the smallest error comes first"
    assert data["rows"][0]["metric0"] == 0.2
    higher = json.loads(re.search(r'json">(.*?)</script>', render(build_document(turned))).group(1))
    assert sum(higher["descending"]) == 1


def test_a_users_accuracy_is_not_taken_for_top_1_in_percent():
    own = replace(QAT, metrics=(MetricValue("accuracy", 0.5, higher_is_better=True),))
    assert own.metric.text == "0.5"
    assert QAT.metric.text == "96.00 %"
    assert pareto([replace(own, p50_ms=QAT.p50_ms * 2), QAT]) == [True, True], "they are not compared"
    data = json.loads(re.search(r'json">(.*?)</script>', render(build_document([own, QAT]))).group(1))
    assert [measure["percent"] for measure in data["measures"].values()] == [False, True]


def test_the_plot_keeps_points_inside_labels_apart_and_needs_an_accuracy():
    draw = random.Random(0)
    rows = [replace(ROW, p50_ms=draw.uniform(0.1, 9), accuracy=draw.uniform(0.5, 1), accuracy_low=None) for _ in range(60)]
    plot = accuracy_latency_plot(rows)
    assert all(0 < point.x < plot.width and 0 < point.y < plot.height for point in plot.points)
    labels = [point for point in plot.points if point.label]
    assert labels
    for one in labels:
        for two in labels:
            if one is not two and one.anchor == two.anchor == "start" and abs(one.label_y - two.label_y) < 12:
                assert abs(one.label_x - two.label_x) > 100
    assert accuracy_latency_plot([replace(ROW, accuracy=None)]) is None


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"),
    [(0, 1e-6, False), (99.9, 100, False), (-2, 3, False), (0.01, 3000, True), (1e-6, 1e9, True)],
)
def test_ticks_are_few_round_and_within_the_axis(low, high, logarithmic):
    axis = Axis(low, high, 0.0, 100.0, logarithmic)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 20
    if low < 0:
        assert float(ticks[0][1]) == low  # a round end has its tick, whatever its sign
    assert [position for position, _ in ticks] == sorted(position for position, _ in ticks)
    for position, text in ticks:
        assert position == pytest.approx(axis(float(text)), abs=0.2)


def test_rows_stand_side_by_side():
    other = replace(QAT, accuracy=0.9)
    beside = side_by_side([FP32, BF16, PTQ, QAT, other, ROW, replace(PTQ, weight_bits=4), replace(QAT, runtime="openvino")])
    assert beside.methods == ("PTQ", "QAT", "SQAKD")
    first, four_bit, openvino = (cells for _, _, cells in beside.lines)
    assert first == (FP32, BF16, PTQ, QAT, ROW)
    assert four_bit[:3] == (FP32, BF16, replace(PTQ, weight_bits=4))
    assert openvino[0] is None, "FP32 was not measured in OpenVINO"
    assert [beside.distinguishing, side_by_side([FP32])] == [(1, 3), None]


def test_a_slow_integer_model_is_explained_in_words_with_layers():
    (verdict,) = verdicts([FP32, BF16, replace(ROW, findings=(FINDING,), integer_layers=9, total_layers=10)])
    assert not verdict.is_faster
    assert "SQAKD W8A8 (modelopt) in onnxruntime (1.000 ms), is not faster than" in verdict.text
    assert "FP32 in openvino bfloat16 (0.800 ms): 0.80x. 9 of its 10" in verdict.text
    made = document([FP32, BF16, replace(ROW, findings=(FINDING,))])
    page = render(made)
    assert "Integer is not faster." in page
    assert "<code>stages.0.conv2</code>" in page
    assert "1.25 times as fast" not in page
    (fast,) = verdicts([FP32, ROW])
    assert fast.is_faster
    assert "2.00 times as fast" in fast.text


def test_a_busy_machine_is_told():
    assert warnings_of([replace(ROW, conditions=CONDITIONS)]) == []
    busy = replace(ROW, conditions=replace(CONDITIONS, busy=True, other_cores=1.25, load_before=3.5))
    (text,) = build_document([busy, ROW])["runs"][0]["warnings"]
    assert "1 of 2 rows" in text
    assert "1.2 processor cores" in text
    assert "3.5" in text


def test_training_is_drawn_whatever_its_history_holds():
    run = training_run({"name": "r", "history": HISTORY})
    assert [(curve.name, curve.last) for curve in run.curves] == [("loss", 0.5), ("val_accuracy", 0.75)]
    assert run.augmentations == (("0", "cutmix", "cutmix 0.250, none -0.500"),)
    (scatter,) = run.rankings
    assert [point.name for point in scatter.points if point.is_best] == ["cutmix"]
    for x1, y1, x2, y2 in scatter.diagonals:
        assert x1 < x2
        assert y1 > y2
    odd = [{}, {"loss": "text"}, {"loss": 1e308}, {"loss": -5e-324, "phase": 3}, {"loss": True}, {"loss": 2**60}]
    assert training_run({"name": "r", "history": odd}).epochs == 6
    assert training_run({"name": "r", "history": []}).curves == ()
    long = training_run({"name": "r", "history": [{"epoch": k, "loss": 1 / (k + 1)} for k in range(5000)]})
    assert long.curves[0].last == 1 / 5000
    assert len(long.lines) < 500


def test_a_table_for_80_columns_cuts_no_figure():
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(console_table([*ROWS, replace(ROW, method="x" * 200, p50_ms=123456.789)]))
    assert "123456.789" in console.export_text()


# -- hostile names


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_page_stays_what_it_is_whatever_names_say(text):
    made = hostile_document(text)
    page = render(made)
    found, plain = Tags(), Tags()
    found.feed(page)
    plain.feed(render(hostile_document("a plain name")))
    assert found.tags == plain.tags
    assert not [entry for entry in found.attributes if entry[1].startswith("on") or entry[1] in {"src", "style", "action"}]
    assert all(value.startswith("#") for _, name, value in found.attributes if name == "href")
    assert "evil" in text or re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]
    assert "x" * 1001 not in page


def test_parity_is_shown_as_far_as_it_was_checked():
    bare = render(build_document([], parity=[{"name": "bare"}]))
    assert "bare" in bare
    assert "agreement, OpenVINO" not in bare
    full = render(build_document([], parity=[{"name": "bare"}, {**PARITY, "openvino": {"top1": 0.875}}]))
    assert "agreement, OpenVINO" in full
    assert "87.50 %" in full
    assert "1,234" in full


def test_only_the_pages_own_style_and_script_are_allowed():
    page = render(document())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page.replace("&#39;", "'"))
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy


def test_embedded_data_is_ascii_ends_no_element_and_comes_back():
    data = {text: [text] for text in HOSTILE}
    text = str(embedded(data))
    assert text.isascii()
    assert not set(text) & set("<>&")
    assert json.loads(text) == data


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_markdown_holds_the_same_table_and_no_markup_from_names(text, tmp_path):
    path = write_report(hostile_document(text), tmp_path / "r.html").with_suffix(".md")
    plain = write_report(hostile_document("plain"), tmp_path / "p.html").with_suffix(".md")
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")

    def shape(source):
        tokens = parser.parse(source)
        inline = [child.type for token in tokens for child in token.children or () if child.type not in {"text", "softbreak"}]
        return [token.type for token in tokens], [kind for kind in inline if kind not in {"text_special", "html_entity"}]

    assert shape(path.read_text()) == shape(plain.read_text())
    assert not re.search(r"(?i)://|www\.", path.read_text())


def test_text_from_outside_is_one_line_of_bounded_length():
    assert short("a\n\tb\x00\u2028c") == "a b\N{REPLACEMENT CHARACTER} c"
    assert len(short("x" * 10_000)) == 120


# -- the page in a browser

browser_only = pytest.mark.skipif(chromium.EXECUTABLE is None, reason=f"no Chromium is installed ({', '.join(chromium.NAMES)})")


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium() as opened:
        yield opened


def thousand_rows():
    draw = random.Random(0)
    rows = []
    for index in range(1000):
        base = FP32 if index % 4 == 0 else ROW
        accuracy, runtime = draw.uniform(0.8, 0.99), draw.choice(("onnxruntime", "openvino", "tensorrt"))
        rows.append(
            replace(base, model=f"net{index % 20}", runtime=runtime, p50_ms=draw.uniform(0.1, 20), accuracy=accuracy,
                    accuracy_low=accuracy - 0.01, accuracy_high=accuracy + 0.01, batch=draw.choice((1, 8, 32)),
                    threads=draw.choice((1, 2)), p90_ms=None if index % 3 else 1.0, calls=100 + index % 2)
        )  # fmt: skip
    return rows


@browser_only
def test_hostile_names_stay_inert_in_a_browser(browser, tmp_path):
    for index, text in enumerate(HOSTILE):
        path = write_report(hostile_document(text), tmp_path / f"hostile{index}.html")
        with chromium.Page(browser, path) as page:
            for point in page.evaluate("document.querySelectorAll('#plot .point').length") * ["ArrowRight"]:
                page.evaluate(
                    f"document.querySelector('.canvas').dispatchEvent(new KeyboardEvent('keydown', {{key: '{point}'}}))"
                )
            page.evaluate("document.querySelectorAll('button').forEach(button => button.click())")
            assert page.evaluate("document.title") == short(text)
            assert page.requests == [path.as_uri()]
            assert page.complaints == []
            assert page.evaluate("getComputedStyle(document.body).display") == "block"
            assert page.evaluate("document.querySelectorAll('script').length") == 2


@browser_only
def test_the_policy_stops_what_would_get_in(browser, tmp_path):
    path = write_report(document(), tmp_path / "r.html")
    with chromium.Page(browser, path) as page:
        page.evaluate(
            "{const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s);"
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 2\">')}"
        )
        refused = page.evaluate("fetch('http://localhost:9/').then(() => false, () => true)")
        assert refused
        assert page.evaluate("window.pwned === undefined")
        stopped = {event["requestId"] for event in page.happened("Network.loadingFailed") if event["blockedReason"] == "csp"}
        sent = {event["requestId"] for event in page.happened("Network.requestWillBeSent")}
        assert len(sent - stopped) == 1, "the page itself"


@browser_only
def test_a_thousand_rows_stay_usable(browser, tmp_path):
    rows = thousand_rows()
    path = write_report(rows, tmp_path / "r.html")
    assert path.stat().st_size < 3_000_000
    with chromium.Page(browser, path) as page:
        ready = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        assert ready < 6000, "two seconds on a quiet machine"
        names = "[...document.querySelectorAll('#rows tbody tr:not([hidden])')].map(line => Number(line.dataset.i))"
        assert page.evaluate(names) == list(range(1000))
        heading = "[...document.querySelectorAll('#rows thead button')].find(button => button.textContent === '{}').click()"
        started = page.evaluate("performance.now()")
        page.evaluate(heading.format("p50 ms"))
        ascending = page.evaluate(names)
        assert [rows[index].p50_ms for index in ascending] == sorted(row.p50_ms for row in rows)
        page.evaluate(heading.format("p50 ms"))
        assert page.evaluate(names) == ascending[::-1]
        page.evaluate(heading.format("p90 ms"))
        assert all(rows[index].p90_ms is None for index in page.evaluate(names)[-600:]), "unknown comes last"
        sorted_by = "[...document.querySelectorAll('#rows th[aria-sort]')].map(th => [th.textContent, th.ariaSort])"
        assert page.evaluate(sorted_by) == [["p90 ms", "ascending"]]
        choose = "[...document.querySelectorAll('#filters button')].find(button => button.textContent === '{}').click()"
        page.evaluate(choose.format("openvino"))
        page.evaluate(choose.format("net7"))
        wanted = {index for index, row in enumerate(rows) if row.runtime == "openvino" and row.model == "net7"}
        assert set(page.evaluate(names)) == wanted
        assert page.evaluate("document.querySelectorAll('#plot .point').length") == len(wanted)
        assert page.evaluate("document.querySelector('#filters output').textContent") == f"{len(wanted)} of 1000 rows"
        assert page.evaluate("performance.now()") - started < 6000
        page.evaluate(
            "{const s = document.querySelector('#filters input'); s.value = 'no such row'; s.dispatchEvent(new Event('input'))}"
        )
        assert page.evaluate(names) == []
        assert page.evaluate("!document.getElementById('nothing').hidden")
        assert page.complaints == []


@browser_only
def test_points_are_told_by_pointer_and_keys(browser, tmp_path):
    with chromium.Page(browser, write_report(document(), tmp_path / "r.html")) as page:
        page.evaluate("document.querySelector('.canvas').focus()")
        for _ in range(2):
            page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        fastest = sorted(ROWS, key=lambda row: row.p50_ms)[1]
        tip = "document.querySelector('.tip')"
        assert page.evaluate(f"{tip}.firstChild.textContent") == fastest.name
        assert f"p50 ms: {fastest.p50_ms:.3f}" in page.evaluate(f"[...{tip}.children].map(line => line.textContent)")
        assert page.evaluate("document.querySelector('#rows tr.active th .key').textContent") == fastest.name
        page.evaluate("scrollTo(0, 0); document.getElementById('plot').scrollIntoView()")
        place = page.evaluate(
            "(() => {const p = document.querySelectorAll('#plot .float .point');"
            "const b = p[p.length - 1].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]})()"
        )
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        assert page.evaluate(f"{tip}.firstChild.textContent") == "FP32"
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
        assert page.evaluate(f"{tip}.hidden")


@browser_only
def test_without_script_everything_is_there(browser, tmp_path):
    path = write_report(document(), tmp_path / "r.html")
    with chromium.Page(browser, path, script=False) as page:
        body = page.call("DOM.getDocument", depth=-1)["root"]
        html = page.call("DOM.getOuterHTML", nodeId=body["nodeId"])["outerHTML"]
        assert html.count("<tr data-i=") == len(ROWS)
        assert html.count('class="point"') >= len(ROWS)
        assert re.search(r'id="filters"[^>]*hidden', html)
        assert page.complaints == []


@browser_only
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_follows_the_color_scheme(browser, tmp_path, dark):
    path = write_report(document(), tmp_path / "r.html")
    with chromium.Page(browser, path, width=390, dark=dark) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.evaluate("getComputedStyle(document.body).color")
        brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ground, ink)]
        assert (brightness[0] < brightness[1]) == dark
        assert abs(brightness[0] - brightness[1]) > 450


@browser_only
def test_paper_shows_what_is_folded_and_no_controls(browser, tmp_path):
    with chromium.Page(browser, write_report(document(), tmp_path / "r.html")) as page:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
        page.call("Emulation.setEmulatedMedia", media="print")
        assert page.evaluate("getComputedStyle(document.getElementById('filters')).display") == "none"
        assert base64.b64decode(page.call("Page.printToPDF")["data"]).startswith(b"%PDF")


def test_a_report_without_accuracy_draws_latencies():
    page = render(build_document([replace(row, accuracy=None) for row in ROWS]))
    assert 'id="bars"' in page
    assert 'id="plot"' not in page
    assert page.count('class="bar"') == len(ROWS)


def test_a_document_of_another_version_is_refused():
    made = document()
    made["schema_version"] = 4
    with pytest.raises(QakdError, match="schema_version"):
        validate(made)
    assert isinstance(rows_of(document())[0], Row)


def test_a_training_that_ended_below_its_start_says_so():
    start = {"epoch": -1, "phase": "start", "val_accuracy": 0.98, "val_agreement": 0.99, "best": True}
    worse = {"epoch": 0, "phase": "distill", "loss": 1.0, "val_accuracy": 0.94, "val_agreement": 0.95, "best": False}
    run = training_run({"name": "r", "history": [start, worse]})
    assert run.epochs == 1
    assert run.phases == "distill 1 epoch"
    assert "lost 4 points of accuracy (98.00% at the start, 94.00%) and 4 points of agreement" in run.outcome
    assert run.outcome.endswith("; the prepared model was kept.")
    better = worse | {"val_accuracy": 0.99, "val_agreement": 0.995, "best": True}
    assert training_run({"name": "r", "history": [start, better]}).outcome == ""
    odd = [start | {"val_accuracy": "high"}, {"val_accuracy": None}, better]
    assert training_run({"name": "r", "history": odd}).outcome == ""
    kept = {"epoch": 0, "phase": "distill", "loss": 1.0, "eval_loss": 0.5, "start_eval_loss": 0.25}
    assert "the loss was 0.25 at the start and is 0.5" in training_run({"name": "r", "history": [kept]}).outcome
    for odd in ({"eval_loss": "high"}, {"start_eval_loss": None}):
        assert training_run({"name": "r", "history": [kept | odd]}).outcome == ""
