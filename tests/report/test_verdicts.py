"""Which file a report recommends, by which rule; where integers are slower, and why; what a file was trained by."""

import json
import re
from dataclasses import replace

import onnx
import pytest
import torch
from qdq_graphs import UINT8, QdqGraph
from report_rows import CONDITIONS, FINDING, ROW
from torch import nn

from qakd_plugin import QAT, Candidate, benchmark, distill, export_float, export_onnx, prepare, write_report
from qakd_plugin._common.training_record import TrainingRecord
from qakd_plugin.bench import row_fields
from qakd_plugin.bench.ratios import with_findings
from qakd_plugin.bench.rows import Change, MetricValue, fastest_integer_rows, rival
from qakd_plugin.deploy.diagnosis import diagnose
from qakd_plugin.deploy.file_record import FileRecord
from qakd_plugin.deploy.finding import Finding
from qakd_plugin.report import build_document, read_report
from qakd_plugin.report.document import rows_of
from qakd_plugin.report.histories import proofs_of, trained_by, training_text, trainings_of
from qakd_plugin.report.page import render
from qakd_plugin.report.scatter import accuracy_latency_plot, labels, point_scales
from qakd_plugin.report.tables import console_table, families, family, shown_columns
from qakd_plugin.report.verdicts import recommendations, verdicts, warnings_of

FP32 = replace(
    ROW, method="fp32", toolkit=None, weight_bits=32, activation_bits=32, precision="float32", p50_ms=2.0, accuracy=0.98,
    file="fp32.onnx", file_mib=8.0,
)  # fmt: skip
BF16 = replace(FP32, runtime="openvino", precision="bfloat16", p50_ms=1.0, change=Change(-0.002, -0.01, 0.006, 1.0, "fp32"))


def integer(name, p50_ms, change, low=None, high=None, **fields):
    low, high = (change - 0.01, change + 0.01) if low is None else (low, high)
    against = Change(change, low, high, 0.2, "fp32")
    fields = {"file": f"{name}.onnx", "accuracy": 0.98 + change, **fields}
    return replace(ROW, method=name, p50_ms=p50_ms, change=against, **fields)


def advised(*rows):
    (one,) = recommendations(rows)
    return one


def test_the_fastest_file_that_keeps_99_percent_is_recommended():
    lossy, sound = integer("lossy", 0.5, -0.0367, -0.06, -0.015), integer("sound", 0.7, -0.0098)
    one = advised(FP32, BF16, lossy, sound)
    assert one.row is sound
    assert one.text.startswith(
        "sound.onnx, sound W8A8 (modelopt) in onnxruntime int8: 97.02 %, 0.98 points less than FP32, 1.43"
    )
    assert "1.43 times as fast as the best float row, fp32 in openvino bfloat16 (1.000 ms), 0.10 MiB." in one.text
    assert "95 % interval of the difference -1.98 to +0.02, McNemar p = 0.2: no difference is shown" in one.why
    assert "lossy.onnx, lossy W8A8 (modelopt) in onnxruntime int8 is 1.40 times as fast as that, and loses too much" in one.why
    assert "-6.00 to -1.50, McNemar p = 0.2: a measurable loss" in one.why
    assert advised(FP32, BF16, replace(sound, change=replace(sound.change, value=-0.0099))).row is BF16, "0.98 points are 1 %"


def test_of_files_that_are_as_fast_the_best_one_is_recommended():
    first, second = integer("first", 0.700, -0.005), integer("second", 0.734, 0.003)
    assert advised(FP32, first, second).row is second
    assert advised(FP32, first, replace(second, p50_ms=0.736)).row is first


def test_a_float_file_is_recommended_where_no_quantized_one_is_worth_it():
    slow, lossy = integer("slow", 3.0, 0.0), integer("lossy", 0.5, -0.1)
    one = advised(FP32, slow, lossy)
    assert one.row is FP32
    assert "It is no quantized file: none that keeps 99 % of FP32's result is faster" in one.why
    assert "slow.onnx" in one.why
    assert "4.00 times as fast as that, and loses too much" in one.why
    one = advised(FP32, lossy)
    assert one.row is FP32
    assert "none keeps 99 % of FP32's result. The closest is lossy.onnx" in one.why


def test_a_row_that_is_slower_than_a_float_row_says_so():
    """Of torch there is no file to deploy, but it may be faster."""
    compiled = replace(FP32, runtime="torch.compile", p50_ms=0.5, file="", file_mib=None)
    one = advised(FP32, compiled, integer("int8", 0.7, 0.0))
    assert one.row.method == "int8"
    assert "slower than the best float row, fp32 in torch.compile float32 (0.500 ms): 0.71x" in one.text


@pytest.mark.parametrize(
    ("rows", "missing"),
    [
        ([FP32, replace(integer("a", 1.0, 0.0), accuracy=None, change=None)], "measure with a loader that has labels"),
        ([replace(integer("a", 1.0, 0.0), change=None)], "measure the FP32 file beside it"),
        ([FP32, replace(integer("a", 1.0, 0.0), change=None)], "measure it and the FP32 file in one run"),
    ],
)
def test_what_cannot_be_said_is_not_guessed(rows, missing):
    rows = [replace(row, accuracy=None) for row in rows] if "labels" in missing else rows
    one = advised(*rows)
    assert one.row is None
    assert one.text.startswith("The fastest quantized file is a.onnx")
    assert missing in one.why
    assert "Deploy" not in render(build_document(rows)).partition("<script")[0].partition("<main>")[2].replace(
        "file to deploy", ""
    )


def test_another_metric_is_judged_in_its_own_direction():
    def error(value, change, direction):
        return {
            "accuracy": None,
            "metrics": (MetricValue("rmse", value, higher_is_better=direction),),
            "change": None if change is None else Change(change, change - 0.001, change + 0.001, None, "fp32"),
        }

    def rows(direction):
        return [
            replace(FP32, **error(1.0, None, direction)),
            replace(integer("worse", 0.5, 0.0), **error(1.02, 0.02, direction)),
            replace(integer("close", 0.7, 0.0), **error(1.009, 0.009, direction)),
        ]

    one = advised(*rows(False))
    assert one.row.method == "close"
    assert "rmse 1.009, 0.009 more than FP32" in one.text
    assert "+0.008 to +0.01: a measurable loss" in one.why
    assert advised(*rows(True)).row.method == "worse", "higher is better now"
    unknown = advised(*rows(None))
    assert (unknown.row, "rmse does not say whether higher is better" in unknown.why) == (None, True)
    headings = [column.heading for column in shown_columns(rows(False))]
    assert headings[:5] == ["row", "rmse", "to FP32", "p50 ms", "MiB"]


def test_settings_are_advised_one_by_one_and_the_page_says_it_first(tmp_path):
    rows = [replace(row, batch=batch) for batch in (1, 8) for row in (FP32, integer("int8", 1.0, 0.0))]
    assert [one.setting for one in recommendations(rows)] == ["digits, batch 1, 1 thread", "digits, batch 8, 1 thread"]
    path = write_report(rows, tmp_path / "r.html")
    page, text = path.read_text(), path.with_suffix(".md").read_text()
    body = page.partition("<main>")[2]
    assert body.index("Which file to deploy") < body.index("Integers against floating point") < body.index('id="rows"')
    assert text.count("**Deploy** int8.onnx") == 2
    assert page.count('class="deploy"') == 2
    assert recommendations([FP32]) == []


def test_each_runtime_is_told_where_integers_are_slower_there():
    """The fastest of all has to beat all floats, the fastest of another runtime those of its own."""
    slow, fast = integer("ort", 2.4, 0.0), integer("ov", 0.6, 0.0, runtime="openvino")
    rows = [FP32, BF16, slow, replace(slow, method="slower", p50_ms=2.9), fast]
    assert fastest_integer_rows(rows) == [slow, fast]
    assert [rival(row, rows) for row in (slow, fast)] == [FP32, BF16]
    of_ort, of_ov = verdicts(rows)
    assert (of_ort.row, of_ort.is_faster) == (slow, False)
    assert "is not faster than the best float row there, fp32 in onnxruntime float32 (2.000 ms): 0.83x" in of_ort.text
    assert of_ov.is_faster
    assert "1.67 times as fast as the best float row there" in of_ov.text
    assert rival(slow, [slow, BF16, fast]) is BF16, "none was measured in its own runtime"


def test_integer_rows_that_lose_to_floats_are_warned_of_with_the_cause():
    cause = Finding("output not quantized", ("stem", "layer1.0.conv2", "fc"), "Quantize it.")
    slow, slower = integer("ov", 1.0, 0.0, runtime="openvino", findings=(cause,)), integer("ov2", 1.2, 0.0, runtime="openvino")
    (text,) = warnings_of([FP32, BF16, slow, slower, integer("ort", 1.5, 0.0)])
    assert text == (
        "digits, batch 1, 1 thread: fp32 in openvino bfloat16, which is not quantized, takes 1.000 ms and is as fast as these "
        "or faster: ov W8A8 (modelopt) in openvino int8 (1.000 ms; output not quantized: stem and 2 more), ov2 W8A8 (modelopt) "
        "in openvino int8 (1.200 ms; no cause is known)."
    )
    faster = replace(slow, p50_ms=0.9)
    assert warnings_of([FP32, BF16, faster, replace(slower, batch=8)]) == [], "of another setting"


@pytest.fixture
def residual(tmp_path):
    """A convolution whose output an addition reads as it is: ONNX Runtime leaves it in floating point, OpenVINO does not."""
    graph = QdqGraph(("batch", 16, 8, 8))
    x = graph.quantize("input", "in", 0.1, 128, UINT8)
    graph.save(tmp_path / "net.onnx", graph.add("Add", [graph.conv(x, "first", (16, 16)), x], "sum"), rank=4)
    return tmp_path / "net.onnx"


def test_causes_are_those_of_the_runtime(residual):
    of_ort, of_ov = ({finding.kind for finding in diagnose(residual, (), runtime)} for runtime in ("onnxruntime", "openvino"))
    assert "output not quantized" in of_ort
    assert not of_ov & {"output not quantized", "narrow", "depthwise", "signed codes"}
    assert diagnose(residual) == diagnose(residual, (), "onnxruntime")
    slow, other = integer("ort", 3.0, 0.0), integer("ov", 2.5, 0.0, runtime="openvino")
    rows = [FP32, replace(FP32, runtime="openvino", p50_ms=1.0), slow, other]
    found = with_findings(rows, [Candidate(residual)] * 4)
    assert "output not quantized" in {finding.kind for finding in found[2].findings}
    assert "output not quantized" not in {finding.kind for finding in found[3].findings}
    assert not any("ONNX Runtime" in finding.advice for finding in found[3].findings)


# -- what a file was trained by


def recorded(*records, **fields):
    return replace(integer("mobilenet_qat", 1.0, 0.0), record=FileRecord("modelopt", 8, 8, "tensorrt", records), **fields)


def test_the_legend_follows_the_record_and_never_the_name():
    history = ({"epoch": 0, "loss": 1.0}, {"epoch": 11, "loss": 0.5})
    cases = {
        FP32: ("float", "-"),
        recorded(): ("ptq", "no training recorded"),
        recorded(TrainingRecord("QAT", "distill", 11, history)): ("qat", "QAT, 12 epochs"),
        recorded(TrainingRecord("SQAKD", "own")): ("distilled", "SQAKD, own loop"),
        recorded(TrainingRecord("SQAKD", "distill", -1, history)): ("ptq", "calibrated weights kept"),
        integer("mobilenet_int8", 1.0, 0.0): ("unknown", "not known"),
        integer("SQAKD", 1.0, 0.0): ("unknown", "not known"),
        replace(integer("a", 1.0, 0.0), method="SQAKD"): ("distilled", "SQAKD"),
        replace(integer("a", 1.0, 0.0), method="PTQ"): ("ptq", "no training recorded"),
    }  # fmt: skip
    assert {row.file: (family(row), training_text(row)) for row in cases} == {row.file: found for row, found in cases.items()}
    for row, found in cases.items():
        assert (family(row), training_text(row)) == found
    rows = list(cases)
    assert families(rows)["distilled"] == "SQAKD"
    assert families([FP32]) == {"float": "floating point"}


def test_a_page_shows_the_curves_and_proofs_that_its_files_have(tmp_path):
    history = tuple({"epoch": k, "phase": "distill", "loss": 1 / (k + 1), "val_accuracy": 0.9} for k in range(3))
    record = FileRecord("modelopt", 8, 8, "openvino", (TrainingRecord("SQAKD", "distill", 2, history),), {"weight_codes": 77})
    rows = [FP32, *(replace(integer("s", 1.0, 0.0, runtime=name), record=record) for name in ("onnxruntime", "openvino"))]
    path = write_report(rows, tmp_path / "r.html")
    read = read_report(path.with_suffix(".json"))
    assert rows_of(read) == rows
    assert trainings_of(read, rows) == [{"name": "SQAKD: s.onnx", "history": list(history)}], "once, for both runtimes"
    assert proofs_of(read, rows) == [{"name": "s.onnx", "weight_codes": 77}]
    page = path.read_text()
    assert "val accuracy: 0.9 after 3 epochs" in page
    assert ">77<" in page
    given = build_document(rows, training=[{"name": "own", "history": []}], parity=[{"name": "own"}])
    assert [entry["name"] for entry in (*trainings_of(given, rows), *proofs_of(given, rows))] == ["own", "own"]


def test_a_calibrated_file_given_by_its_path_is_not_called_distilled(tmp_path, monkeypatch):
    """From export over benchmark to the page; the trained one beside it is."""
    monkeypatch.setattr(row_fields, "peak_rss_mib", lambda *_: None)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)).eval()
    images, labels = torch.rand(48, 1, 12, 12), torch.arange(48) % 4
    student = prepare(net, [images])
    files = [
        export_float(net, images, tmp_path / "fp32.onnx"),
        export_onnx(student, images, tmp_path / "sqakd.onnx", target="onnxruntime"),
    ]
    trained = distill(student, None, [(images, labels)], method=QAT(), epochs=1, lr=1e-3).model
    files.append(export_onnx(trained, images, tmp_path / "student.ort.onnx", target="onnxruntime"))
    rows = benchmark(files, [(images, labels)], calls=3)
    assert [trained_by(row) for row in rows] == [None, "", "QAT"]
    assert [row.toolkit for row in rows] == [None, "modelopt", "modelopt"]
    page = write_report(rows, tmp_path / "r.html").read_text()
    assert re.findall(r'<span class="key (?:ptq|qat|distilled|unknown)">([^<]*)<', page)[:2] == [
        "calibrated, no training recorded",
        "QAT",
    ]
    assert "distillation" not in page
    assert "QAT: student.ort.onnx" in page, "with its curve"
    assert "Proof of parity" in page
    assert {entry.key for entry in onnx.load(files[1]).metadata_props} >= {"qakd.method", "qakd.parity"}


# -- the drawing and the table


def test_intervals_that_the_axis_cuts_are_marked():
    plot = accuracy_latency_plot([FP32, replace(integer("a", 1.0, 0.0), accuracy_low=0.5, accuracy_high=0.981)])
    assert {(point.row.method, point.cut_low, point.cut_high) for point in plot.points} == {
        ("fp32", True, False),
        ("a", True, False),
    }
    rows = [replace(FP32, accuracy_low=0.98, accuracy_high=0.98), integer("a", 1.0, 0.0, accuracy_low=0.5, accuracy_high=0.98)]
    page = render(build_document(rows))
    assert page.partition("<script")[0].count('class="cut"') == 1
    assert "with an arrow where it goes on beyond the axis" in page


def test_areas_of_points_are_as_sizes_of_files():
    rows = [FP32, integer("a", 1.0, 0.0, file_mib=2.0), replace(FP32, runtime="torch", file_mib=None)]
    large, small, unknown = (point_scales(rows)[id(row)] for row in rows)
    assert (large / small) ** 2 == pytest.approx(4)
    assert unknown == 1
    assert "areas: size of the file, 2.00 to 8.00 MiB" in render(build_document(rows))


def test_labels_tell_rows_apart():
    rows = [FP32, BF16, replace(BF16, precision="float32"), integer("a", 1.0, 0.0)]
    assert list(labels(rows).values()) == ["fp32, onnxruntime", "fp32, openvino bfloat16", "fp32, openvino float32", "a W8A8"]
    assert labels([*rows, integer("a", 1.0, 0.0, toolkit="pt2e")])[id(rows[3])] == "a W8A8 (modelopt)"


def test_what_a_file_is_chosen_by_stands_first():
    rows = [FP32, BF16, integer("a", 1.0, -0.01)]
    headings = [column.heading for column in shown_columns(rows)]
    assert headings[:6] == ["row", "accuracy %", "points to FP32", "p50 ms", "MiB", "runtime"]
    table = {column.heading: [column.text(row) for row in rows] for column in shown_columns(rows)}
    assert table["points to FP32"] == ["-", "-0.20", "-1.00"]
    assert table["95 % of points to FP32"] == ["-", "-1.00 to +0.60", "-2.00 to +0.00"]
    assert [str(column.header) for column in console_table(rows).columns][1:4] == ["row", "runtime", "top-1 %"]
    data = json.loads(re.search(r'json">(.*?)</script>', render(build_document(rows))).group(1))
    assert data["descending"][:4] == [False, True, True, False], "the smallest loss comes first"


def test_facts_are_told_as_people_read_them():
    made = build_document([FP32])
    made["runs"][0]["created"] = "2026-11-27T08:05:34+00:00"
    made["runs"][0]["environment"] |= {"gpu": None, "governor": "unknown"}
    page = render(made)
    assert "27 November 2026, 08:05 UTC" in page
    assert "unknown" not in page.partition('id="environment"')[2].partition("<script")[0]


def test_a_busy_machine_contradicts_itself_no_more():
    """Over less than a second it is not known what others used."""
    (text,) = warnings_of([replace(ROW, conditions=replace(CONDITIONS, busy=True, other_cores=0.0, load_before=2.8))])
    assert "other processes" not in text
    assert "load average before was up to 2.8" in text
    assert FINDING.kind not in text


def test_a_file_that_ran_where_it_was_not_proven_is_named():
    canonical = FileRecord("modelopt", 8, 8, "tensorrt", (), {"weight_codes": 77, "fused": None, "openvino": None})
    proven = FileRecord("modelopt", 8, 8, "openvino", (), {"weight_codes": 77, "fused": None, "openvino": {"top1": 1.0}})
    (text,) = warnings_of([replace(ROW, runtime="openvino", record=canonical)])
    assert text.startswith(f"Not proven in openvino: {ROW.name}.")
    assert 'target="openvino"' in text
    assert (
        warnings_of([replace(ROW, runtime="openvino", record=proven), replace(ROW, runtime="tensorrt", record=canonical)]) == []
    )
