"""A report says of a tuned file what computes otherwise in it than in the one that was proven."""

from dataclasses import replace

from report_rows import ROW

from qakd_plugin import write_report
from qakd_plugin.deploy.file_record import FileRecord, read_record
from qakd_plugin.report.document import read_report, rows_of
from qakd_plugin.report.histories import tunings_of

TUNED = {
    "runtime": "openvino",
    "precision": "bfloat16",
    "cpu": "a processor <b>",
    "batch": 1,
    "threads": 1,
    "plain_ms": 2.0,
    "tuned_ms": 1.5,
    "float_layers": ["stem", "head"],
    "unrounded": ["stem.input_qdq"],
    "half_steps": [],
    "zero_points": [],
    "blocked": [],
    "proof": {"largest_step": 0.5},
}


def test_a_page_names_layers_in_floating_point_and_what_was_proven(tmp_path):
    record = FileRecord("pt2e", 8, 8, "openvino", (), {"weight_codes": 7}, TUNED)
    rows = [ROW, replace(ROW, file="t.onnx", runtime="openvino", record=record)]
    page = write_report(rows, tmp_path / "r.html")
    read = rows_of(read_report(page.with_suffix(".json")))
    assert read == rows
    (line,) = tunings_of(read)
    assert line.startswith("t.onnx: tuned for openvino on a processor <b>")
    for part in ("in floating point: stem, head", "no longer round: 1", "in bfloat16", "at most 0.50 steps"):
        assert part in line
    assert "half their step" not in line
    assert "t.onnx: tuned for openvino on a processor &lt;b&gt;" in page.read_text()


def test_a_record_keeps_what_was_tuned_and_refuses_what_cannot_be_read():
    metadata = {
        "qakd.toolkit": "pt2e",
        "qakd.bits": "W8A8",
        "qakd.target": "openvino",
        "qakd.training": "[]",
        "qakd.parity": "{}",
    }
    assert read_record(metadata, "s.onnx").tuning is None
    assert read_record(metadata | {"qakd.tuning": '{"unrounded": ["a"]}'}, "s.onnx").tuning == {"unrounded": ["a"]}
    assert read_record(metadata | {"qakd.tuning": '{"unrounded": 3}'}, "s.onnx") is None
