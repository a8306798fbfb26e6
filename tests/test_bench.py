"""Measurement and reports."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import binomtest

from qakd_plugin import EngineError, MissingPackageError, QakdError, benchmark, build_engine, export_onnx, write_report
from qakd_plugin.bench import Candidate
from qakd_plugin.bench.census import census
from qakd_plugin.bench.measure import percentiles, wilson_interval
from qakd_plugin.bench.record import Row, schema, validate
from qakd_plugin.deploy.to_onnx import export_float
from qakd_plugin.deploy.trt import gpu_capability
from qakd_plugin.report import build_document, read_report
from qakd_plugin.report.plot import accuracy_latency_plot, pareto

ROW = Row(
    "digits", "SQAKD", "modelopt", 8, 8, "onnxruntime", "int8", 1, 1, 100, 1.0, 1.2, None, 1.0, 1000.0, 5.0, 0.1, 0.97, 0.95,
    0.98, 450,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory, _trained_teacher, calibration, digits):
    from qakd_plugin import prepare

    folder = tmp_path_factory.mktemp("files")
    export_float(_trained_teacher, digits.test[0][:8], folder / "fp32.onnx")
    student = prepare(_trained_teacher, calibration)
    export_onnx(student, digits.test[0][:8], folder / "int8.onnx", target="onnxruntime")
    export_onnx(student, digits.test[0][:8], folder / "canonical.onnx")
    return folder


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (7, 9), (437, 450)])
def test_wilson_interval_equals_scipy(correct, total):
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson_interval(correct, total), (expected.low, expected.high), atol=1e-12)


@pytest.mark.parametrize(
    ("count", "p90", "p99"), [(63, False, False), (64, True, False), (661, True, False), (662, True, True)]
)
def test_high_percentiles_need_enough_samples(count, p90, p99):
    samples = np.arange(count)
    result = percentiles(samples)
    assert result[0] == np.median(samples)
    assert [value is not None for value in result[1:]] == [p90, p99]


def test_rows_hold_latency_and_accuracy_of_the_file(files, digits):
    candidates = [Candidate(files / "fp32.onnx", "FP32"), Candidate(files / "int8.onnx", "PTQ", "digits", "modelopt", 8, 8)]
    slow, fast = benchmark(candidates, digits.loader("test"), calls=70, batch_sizes=(4,))
    assert slow.accuracy > 0.9
    assert fast.accuracy > 0.9
    assert fast.samples == len(digits.test[1])
    assert fast.accuracy_low < fast.accuracy < fast.accuracy_high
    assert (fast.integer_layers, fast.total_layers) == (10, 10)
    assert (slow.integer_layers, slow.total_layers) == (0, 10)
    assert fast.p90_ms is not None
    assert fast.p99_ms is None
    assert fast.speedup == pytest.approx(slow.p50_ms / fast.p50_ms)
    assert slow.throughput == pytest.approx(4 / slow.p50_ms * 1e3)


def test_openvino_runs_the_canonical_file(files, digits):
    (row,) = benchmark([files / "canonical.onnx"], digits.loader("test"), runtimes=("openvino",), calls=5)
    assert row.accuracy > 0.9
    assert row.runtime == "openvino"


def test_census_names_float_layers(files):
    counted = census(files / "fp32.onnx")
    assert counted.integer == 0
    assert len(counted.float_layers) == counted.total == 10


def test_bad_input_of_benchmark_is_named(files, digits, tmp_path):
    with pytest.raises(QakdError, match="models is empty"):
        benchmark([])
    with pytest.raises(QakdError, match=r"none\.onnx does not exist"):
        benchmark([tmp_path / "none.onnx"], digits.loader("test"))
    with pytest.raises(QakdError, match="takes shape"):
        benchmark([files / "fp32.onnx"], [(digits.test[0][:, :, :16], digits.test[1])])
    with pytest.raises(QakdError, match="batches \\(images, labels\\)"):
        benchmark([files / "fp32.onnx"], digits.loader("test", labels=False))
    with pytest.raises(QakdError, match="'tflite' is unknown"):
        benchmark([files / "fp32.onnx"], runtimes=("tflite",))
    (tmp_path / "bad.onnx").write_bytes(b"rubbish")
    with pytest.raises(QakdError, match="cannot load"):
        benchmark([Candidate(tmp_path / "bad.onnx")], digits.loader("test"))
    (tmp_path / "s.engine").write_bytes(b"rubbish")
    with pytest.raises(EngineError, match="manifest"):
        benchmark([tmp_path / "s.engine"], digits.loader("test"), runtimes=("onnxruntime", "tensorrt"))
    with pytest.raises(QakdError, match="engines run in 'tensorrt'"):
        benchmark([tmp_path / "s.engine"], digits.loader("test"))


@pytest.mark.skipif(gpu_capability() is not None, reason="there is a GPU")
def test_an_engine_without_a_gpu_is_refused_by_name(files, digits, tmp_path):
    engine = build_engine(files / "canonical.onnx", tmp_path / "s.engine", runtime="tensorrt_rtx")
    with pytest.raises(EngineError, match=r"s\.engine.*GPU"):
        benchmark([engine.path], digits.loader("test"), runtimes=("tensorrt",))


def test_a_missing_runtime_is_named_with_its_pip_line(files, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'qakd-plugin\[openvino\]'"):
        benchmark([files / "canonical.onnx"], runtimes=("openvino",), calls=1)


def test_the_row_and_its_schema_have_the_same_fields():
    assert list(schema()["properties"]["rows"]["items"]["properties"]) == list(ROW.as_dict())


def test_a_report_survives_the_round_trip(tmp_path):
    path = write_report([ROW], tmp_path / "out" / "report.html", title="T", notes=["n"], seeds={"split": 3})
    document = read_report(path.with_suffix(".json"))
    assert document["rows"] == [json.loads(json.dumps(ROW.as_dict()))]
    assert document["seeds"] == {"split": 3}
    again = write_report(document, tmp_path / "again.html")
    assert again.read_text() == path.read_text()
    assert "SQAKD W8A8" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("change", "place"),
    [({"accuracy": 2.0}, "accuracy"), ({"p50_ms": 0.0}, "p50_ms"), ({"batch": 0}, "batch"), ({"model": None}, "model")],
)
def test_a_row_that_does_not_fit_the_schema_is_named(change, place, tmp_path):
    with pytest.raises(QakdError, match=place):
        write_report([replace(ROW, **change)], tmp_path / "report.html")
    assert not any(tmp_path.iterdir())


def test_an_unknown_schema_version_is_refused():
    document = build_document([ROW])
    document["schema_version"] = 2
    with pytest.raises(QakdError, match="schema_version"):
        validate(document)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_file_that_is_no_report_is_refused(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(QakdError, match=r"r\.json|report"):
        read_report(tmp_path / "r.json")


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in {"src", "href", "action"}]


def test_the_page_is_self_contained_and_hostile_names_stay_inert(tmp_path):
    hostile = replace(ROW, model="<img src=x onerror=alert(1)>", method="</script><script>alert(1)</script>" + "x" * 10_000)
    path = write_report([hostile, ROW], tmp_path / "report.html", title='"><script>alert(2)</script>', notes=["<b>bold</b>"])
    text = path.read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.tags.count("script") == 1
    assert "img" not in tags.tags
    assert "b" not in tags.tags
    assert tags.links == []
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "<script>" not in path.with_suffix(".md").read_text()


def test_a_thousand_rows_can_be_written(tmp_path):
    rows = [replace(ROW, p50_ms=1 + k / 100, accuracy=0.9 + (k % 90) / 1000) for k in range(1000)]
    assert write_report(rows, tmp_path / "report.html").stat().st_size < 2_000_000


def test_pareto_keeps_what_nothing_beats():
    rows = [replace(ROW, p50_ms=p, accuracy=a) for p, a in [(1.0, 0.9), (2.0, 0.95), (3.0, 0.94), (0.5, None)]]
    assert pareto(rows) == [True, True, False, False]


def test_the_plot_keeps_points_inside_and_needs_an_accuracy():
    rows = [replace(ROW, p50_ms=p, accuracy=a, accuracy_low=None, accuracy_high=None) for p, a in [(1.0, 0.9), (2.0, 0.95)]]
    plot = accuracy_latency_plot(rows)
    assert all(0 < point.x < plot.width and 0 < point.y < plot.height for point in plot.points)
    assert accuracy_latency_plot([replace(ROW, accuracy=None)]) is None
