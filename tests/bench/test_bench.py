"""Measurement."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
import weakref
from collections import namedtuple
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import psutil
import pytest
import torch
from agreement import decided
from qdq_graphs import INT4, QdqGraph, residual_net
from report_rows import ROW
from torch import nn

from qakd_plugin import EngineError, MissingPackageError, QakdError, benchmark, build_engine, export_float, export_onnx
from qakd_plugin._common.cpu_features import has_bfloat16
from qakd_plugin.bench import Candidate, peak_memory, row_fields, session
from qakd_plugin.bench.candidates import candidate_from_path
from qakd_plugin.bench.census import census
from qakd_plugin.bench.intervals import wilson_interval
from qakd_plugin.bench.peak_memory import peak_rss_mib
from qakd_plugin.bench.ratios import with_findings, with_speedups
from qakd_plugin.bench.row_fields import percentiles
from qakd_plugin.deploy.canonical.graph import read_onnx
from qakd_plugin.deploy.engine.bindings import gpu_capability
from qakd_plugin.deploy.engine.manifest import sealed
from qakd_plugin.deploy.engine.runner import EngineRunner, StageTimes
from qakd_plugin.deploy.targets.float16 import to_float16
from qakd_plugin.runtimes import host as bench_environment
from qakd_plugin.runtimes.base import Input, fitted
from qakd_plugin.runtimes.host import BUSY_SHARE, Watch, environment
from qakd_plugin.runtimes.onnxruntime import session_options, start_session

bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="the processor has no bfloat16")
linux = pytest.mark.skipif(not os.path.isfile("/proc/self/status"), reason="peak memory is read from Linux's /proc")


@pytest.fixture(scope="module")
def files(tmp_path_factory, _trained_teacher, calibration, digits):
    from qakd_plugin import prepare

    folder = tmp_path_factory.mktemp("files")
    export_float(_trained_teacher, digits.test[0][:8], folder / "fp32.onnx")
    student = prepare(_trained_teacher, calibration)
    export_onnx(student, digits.test[0][:8], folder / "int8.onnx", target="onnxruntime")
    export_onnx(student, digits.test[0][:8], folder / "canonical.onnx")
    return folder


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (7, 9), (437, 450), (49_321, 50_000)])
def test_the_interval_of_an_accuracy_holds_what_wilsons_equation_solves(correct, total):
    """Its ends are the shares p with |p - correct/total| = z sqrt(p (1 - p) / total)."""
    z, share = 1.959963984540054, correct / total
    quadratic = [1 + z**2 / total, -(2 * share + z**2 / total), share**2]
    low, high = wilson_interval(correct, total)
    np.testing.assert_allclose((low, high), np.sort(np.clip(np.roots(quadratic), 0, 1)), atol=1e-12)
    assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize(
    ("count", "p90", "p99"), [(63, False, False), (64, True, False), (661, True, False), (662, True, True)]
)
def test_high_percentiles_need_enough_samples(count, p90, p99):
    samples = np.arange(count)
    result = percentiles(samples)
    assert result[0] == np.median(samples)
    assert [value is not None for value in result[1:]] == [p90, p99]


def test_rows_hold_latency_and_accuracy_of_the_file(files, digits):
    candidates = [Candidate(files / "fp32.onnx", "FP32", "d"), Candidate(files / "int8.onnx", "PTQ", "d", "modelopt", 8, 8)]
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


def test_openvino_runs_the_canonical_file_and_counts_its_integer_layers(files, digits):
    (row,) = benchmark([files / "canonical.onnx"], digits.loader("test"), runtimes=("openvino",), calls=5)
    assert row.accuracy > 0.9
    assert (row.runtime, row.precision) == ("openvino", "int8")
    assert (row.integer_layers, row.total_layers) == (10, 10)


@bfloat16
def test_float_files_have_a_row_per_precision_in_openvino_and_quantized_ones_have_one(files):
    rows = benchmark([files / "fp32.onnx", files / "canonical.onnx"], runtimes=("onnxruntime", "openvino"), calls=3)
    assert [(row.method, row.runtime, row.precision) for row in rows] == [
        ("fp32", "onnxruntime", "float32"),
        ("fp32", "openvino", "float32"),
        ("fp32", "openvino", "bfloat16"),
        ("canonical", "onnxruntime", "int8"),
        ("canonical", "openvino", "int8"),
    ]
    assert {row.integer_layers for row in rows if row.is_float} == {0}


class Recorder:
    """A runner that says who was called with how much, in place of a runtime."""

    runtime, precision, load_ms = "onnxruntime", "float32", 1.0
    inputs, outputs = {"input": Input((None, 1, 32, 32), np.dtype("float32"))}, ("logits",)

    def __init__(self, path, calls):
        self.name, self.calls = os.path.basename(path), calls

    def fit(self, inputs):
        return fitted(self.inputs, inputs)

    def run(self, inputs):
        (images,) = inputs.values()
        self.calls.append((self.name, len(images)))
        return {"logits": self.logits(images)}

    def logits(self, images):
        return np.eye(10, dtype=np.float32)[np.arange(len(images)) % 10]

    def close(self):
        self.calls.append((self.name, "closed"))


@pytest.fixture
def recorded(monkeypatch):
    calls = []
    monkeypatch.setattr(session, "make_runner", lambda path, runtime, threads, precision: Recorder(path, calls))
    monkeypatch.setattr(row_fields, "peak_rss_mib", lambda *_: None)
    return calls


def test_a_sweep_scores_once_interleaves_every_round_and_closes_what_it_loaded(files, digits, recorded):
    names = ["fp32.onnx", "int8.onnx"]
    rows = benchmark([files / name for name in names], digits.loader("test"), batch_sizes=(1, 4), threads=(1, 2), calls=16)
    assert [(row.threads, row.batch, row.method) for row in rows] == [
        (threads, batch, name) for threads in (1, 2) for batch in (1, 4) for name in ("fp32", "int8")
    ]
    scored = [call for call in recorded if call[1] == 64]
    chunks = -(-len(digits.test[1]) // 64)
    assert scored == [(name, 64) for name in names] * chunks, "once, for all batches and threads, the same images to both"
    assert len({row.accuracy for row in rows}) == 1
    measured = [name for name, size in recorded if size in (1, 4)]
    lengths = [6, 6, 6, 2]  # of turns: the first call of each is not timed
    warm_up = 2 * session.WARM_UP_CALLS
    block = warm_up + 2 * sum(lengths)
    assert len(measured) == 4 * block
    for start in range(0, len(measured), block):
        calls = iter(measured[start : start + block])
        assert list(itertools.islice(calls, warm_up)) == names * session.WARM_UP_CALLS
        rounds = [list(itertools.islice(calls, 2 * length)) for length in lengths]
        orders = {(one[0], one[-1]) for one in rounds}
        assert orders == {tuple(names), tuple(reversed(names))}, "in both orders"
        assert rounds == [[one[0]] * length + [one[-1]] * length for one, length in zip(rounds, lengths, strict=True)]
    assert {row.calls for row in rows} == {16}
    assert [call for call in recorded if call[1] == "closed"] == [(name, "closed") for name in reversed(names)] * 2


def test_a_loader_is_read_once_and_never_held(files, digits, recorded):
    """Whoever asks for the next batch holds no more than the last two."""
    images, labels = (part.numpy() for part in digits.test)
    yielded, held = [], []

    def batches():
        for start in range(0, 5 * len(labels), 50):
            part = images[start % len(labels) :][:50].copy()
            yielded.append(weakref.ref(part))
            yield part, labels[start % len(labels) :][:50]
            del part
            held.append(sum(batch() is not None for batch in yielded))

    names = ["fp32.onnx", "int8.onnx"]
    rows = benchmark([files / name for name in names], batches(), batch_sizes=(1, 80), threads=(1, 2), calls=2)
    assert [row.samples for row in rows] == [5 * len(labels)] * 8
    assert len(yielded) == 45
    assert max(held) <= 2
    assert {size for _, size in recorded} == {1, 64, 80, "closed"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda labels: labels[:, None], r"int64 of shape \[450, 1\]"),  # as MedMNIST has them: compared to N x N
        (lambda labels: torch.nn.functional.one_hot(labels, 10), r"int64 of shape \[450, 10\]"),
        (lambda labels: labels.float(), r"float32 of shape \[450\]"),
        (lambda labels: labels[:-1], r"int64 of shape \[449\]"),
        (lambda labels: labels[0], r"int64 of shape \[\]"),
    ],
)
def test_labels_that_are_not_one_class_for_each_image_are_refused(change, found, files, digits, recorded):
    with pytest.raises(QakdError, match=rf"loader: labels must be one integer for each image, shape \[450\]; got {found}"):
        benchmark([files / "fp32.onnx"], [(digits.test[0], change(digits.test[1]))])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader is empty"),
        (
            [(np.ones((40, 1, 32, 32)), np.zeros(40, int)), (np.ones((40, 1, 16, 16)), np.zeros(40, int))],
            r"input 'input' takes shape .*, got \[64, 1, 16, 16\]",
        ),
        ([([[1.0], [1.0, 2.0]], [0, 1])], "cannot be read as arrays"),
        ([(torch.ones(4, 1, 32, 32, requires_grad=True), torch.zeros(4, dtype=int))], "cannot be read as arrays"),
    ],
)
def test_a_loader_that_cannot_be_scored_says_why(loader, message, files, recorded):
    with pytest.raises(QakdError, match=message):
        benchmark([files / "fp32.onnx"], loader)


@pytest.mark.parametrize("shape", [(10, 1, 1), (1,), (10, 4)])
def test_an_output_that_is_no_list_of_logits_has_no_accuracy(shape, files, digits, recorded, monkeypatch):
    monkeypatch.setattr(Recorder, "logits", lambda self, images: np.zeros((len(images), *shape), np.float32))
    with pytest.raises(QakdError, match=r"fp32\.onnx: accuracy needs logits of shape \[64, classes\]"):
        benchmark([files / "fp32.onnx"], digits.loader("test"))


def test_accuracy_of_a_file_with_a_fixed_batch_counts_every_image_once(files, digits, teacher, tmp_path):
    model = onnx.load(files / "fp32.onnx")
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "fixed.onnx")
    fixed = [tmp_path / "fixed.onnx"]
    with torch.no_grad():  # a label on a tie may be another in a batch of another size
        clear = decided(teacher(digits.test[0]), 1e-4).nonzero().flatten()[:90]
    subset = [(digits.test[0][clear], digits.test[1][clear])]
    (row,) = benchmark(fixed, subset, batch_sizes=(4,), calls=2)
    (free,) = benchmark([files / "fp32.onnx"], subset, batch_sizes=(4,), calls=2)
    assert (row.accuracy, row.samples) == (free.accuracy, 90)
    with pytest.raises(QakdError, match=r"fixed\.onnx takes batches of 4, 1 was asked for"):
        benchmark(fixed, subset)


def test_ratios_hold_within_one_model_batch_and_number_of_threads():
    fp32 = replace(ROW, method="FP32", weight_bits=32, precision="float32", p50_ms=4.0)
    bf16 = replace(fp32, runtime="openvino", precision="bfloat16", p50_ms=2.0)
    other = replace(fp32, model="other", p50_ms=0.1)
    wide = replace(ROW, batch=8, p50_ms=1.0)
    rows = with_speedups([fp32, bf16, other, ROW, wide])
    assert [row.speedup for row in rows] == [1.0, None, 1.0, 4.0, None]
    assert [row.speedup_over_best_float for row in rows] == [0.5, 1.0, 1.0, 2.0, None]


def test_the_baseline_is_the_fastest_fp32_row_whatever_the_order():
    slow = replace(ROW, method="FP32", weight_bits=32, precision="float32", p50_ms=4.0)
    fast, half = replace(slow, p50_ms=3.0), replace(slow, precision="float16", p50_ms=2.0)
    for rows in ([slow, fast, half, ROW], [half, fast, slow, ROW], [ROW, half, slow, fast]):
        compared = with_speedups(rows)
        assert [row.speedup * row.p50_ms for row in compared] == [3.0] * 4
        assert [row.speedup_over_best_float * row.p50_ms for row in compared] == [2.0] * 4


def test_a_file_in_fp16_is_no_fp32_baseline(files, tmp_path, monkeypatch):
    monkeypatch.setattr(row_fields, "peak_rss_mib", lambda *_: None)
    ir.save(to_float16(read_onnx(files / "fp32.onnx")), tmp_path / "fp16.onnx")
    half, single, integer = benchmark([tmp_path / "fp16.onnx", files / "fp32.onnx", files / "int8.onnx"], calls=3)
    assert [row.precision for row in (half, single, integer)] == ["float16", "float32", "int8"]
    assert [row.speedup for row in (half, single, integer)] == [single.p50_ms / row.p50_ms for row in (half, single, integer)]


@pytest.mark.parametrize("readable", [True, False])
def test_what_is_quantized_in_an_engine_is_what_its_onnx_file_says(readable, tmp_path, monkeypatch):
    """Also where only weights are, and where the plan cannot be read: neither may stand for floating point."""
    pytest.importorskip("tensorrt_rtx_bindings")
    packed, plain = QdqGraph(("batch", 64), opset=21), QdqGraph(("batch", 64))
    packed.save(tmp_path / "int4.onnx", packed.matmul("input", "fc", (64, 64), dtype=INT4, axis=1))
    plain.save(tmp_path / "float.onnx", plain.add("MatMul", ["input", plain.constant("w", np.eye(64, dtype="f"))], "fc"))
    residual_net(tmp_path / "int8.onnx")
    if not readable:
        monkeypatch.setattr("qakd_plugin.deploy.engine.build.read_plan", lambda plan: None)
    found = {}
    for name in ("int4", "float", "int8"):
        options = {"capabilities": ["SM86"], "allow_float": name == "float"}
        engine = build_engine(tmp_path / f"{name}.onnx", tmp_path / f"{name}.engine", "tensorrt_rtx", **options)
        candidate = candidate_from_path(engine.path)
        found[name] = candidate.weight_bits, candidate.activation_bits
    assert found == {"int4": (4, 32) if readable else (8, 8), "float": (32, 32), "int8": (8, 8)}
    manifest = {key: value for key, value in engine.manifest.items() if key != "quantized"}
    engine.manifest_path.write_text(json.dumps(sealed(manifest)))
    with pytest.raises(EngineError, match=r"int8\.engine: its manifest does not say whether it is quantized"):
        candidate_from_path(engine.path)


def test_weights_that_are_quantized_alone_are_told_from_floats(tmp_path):
    graph = QdqGraph(("batch", 64), opset=21)
    graph.save(tmp_path / "int4.onnx", graph.matmul("input", "fc", (64, 64), dtype=INT4, axis=1))
    (row,) = benchmark([tmp_path / "int4.onnx"], calls=2)
    assert (row.name, row.precision, row.is_float) == ("int4 W4A32", "float32", False)


def test_integer_rows_say_why_they_are_not_faster(files):
    """The canonical form leaves convolutions before a ReLU in float in ONNX Runtime: its own census says so."""
    names = {"fp32.onnx": 1.0, "canonical.onnx": 2.0, "int8.onnx": 3.0}
    rows = [replace(ROW, weight_bits=32 if name == "fp32.onnx" else 8, p50_ms=time) for name, time in names.items()]
    slow = with_findings(with_speedups(rows), [Candidate(files / name) for name in names])
    kinds = [{finding.kind for finding in row.findings} for row in slow]
    assert kinds[0] == set()
    assert "signed codes" in kinds[1] - kinds[2]
    assert any(layer for finding in slow[1].findings for layer in finding.layers)
    assert all(finding.advice for finding in slow[1].findings)
    fast = [replace(row, p50_ms=row.p50_ms / 10) if row.weight_bits == 8 else row for row in rows]
    assert not any(row.findings for row in with_findings(with_speedups(fast), [Candidate(files / name) for name in names]))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("content", [None, b"rubbish"])
def test_a_file_that_can_no_longer_be_read_loses_no_row(content, runtime, tmp_path):
    """What was measured stands, and the report says why there is no diagnosis."""
    if content is not None:
        (tmp_path / "int8.onnx").write_bytes(content)
    slow = replace(ROW, runtime=runtime, p50_ms=2.0)
    rows = with_speedups([replace(slow, weight_bits=32, precision="float32", p50_ms=1.0), slow])
    done = with_findings(rows, [Candidate(tmp_path / "fp32.onnx"), Candidate(tmp_path / "int8.onnx")])
    assert [replace(row, findings=()) for row in done] == rows
    (finding,) = done[1].findings
    assert finding.kind == "not examined"
    assert "int8.onnx" in finding.advice


def test_layers_are_those_of_the_graph_that_runs(files, tmp_path):
    runtimes = ("onnxruntime", "openvino")
    candidates = [Candidate(files / "int8.onnx", weight_bits=8, runtime="onnxruntime")]
    candidates += [Candidate(files / "canonical.onnx", weight_bits=8, runtime="openvino"), Candidate(files / "fp32.onnx")]
    rows = benchmark(candidates, runtimes=runtimes, calls=2, profile_layers=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(files / "int8.onnx"), options, providers=["CPUExecutionProvider"])
    expected = sorted(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert sorted(layer.op for layer in rows[0].layers) == expected
    for row in rows:
        assert all(layer.time_ms >= 0 for layer in row.layers)
        assert sum(layer.time_ms for layer in row.layers) > 0
    kernels = [layer.precision for layer in rows[0].layers if layer.op == "QLinearConv"]
    assert kernels == ["uint8"] * 9
    assert [layer.precision for layer in rows[1].layers if layer.op == "Convolution"] == ["int8"] * 9
    in_float = {row.precision: {layer.precision for layer in row.layers if layer.op == "Convolution"} for row in rows[3:]}
    assert in_float == {precision: {precision} for precision in in_float}


@linux
def test_peak_memory_counts_the_file_and_not_this_process(files):
    ballast = np.ones(300 * 2**20, dtype=np.uint8)
    small = peak_rss_mib(files / "fp32.onnx", "onnxruntime", "float32", 1, {"input": np.zeros((1, 1, 32, 32), "f")})
    large = peak_rss_mib(files / "fp32.onnx", "onnxruntime", "float32", 1, {"input": np.zeros((512, 1, 32, 32), "f")})
    assert ballast.nbytes / 2**20 > small > 20
    activations = 2 * 512 * 8 * 32 * 32 * 4 / 2**20
    assert large - small > activations, "input and output of the first block"


@linux
def test_a_child_that_fails_is_told_with_its_reason(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"rubbish")
    with pytest.raises(QakdError, match=r"(?s)process of its own failed.*cannot load"):
        peak_rss_mib(tmp_path / "bad.onnx", "onnxruntime", "float32", 1, {"input": np.zeros((1, 1), "f")})


@linux
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import time; print('1.0 MiB', flush=True); time.sleep(60)", "not done after 1 seconds"),
        ("print('a runtime that prints')", "got 'a runtime that prints"),
        ("print('nan MiB')", "got 'nan MiB"),
        ("print('1.0 MiB'); print('2.0 MiB')", "expected one line"),
        ("import sys; sys.exit('Illegal instruction')", "Illegal instruction"),
    ],
)
def test_a_child_that_hangs_or_says_no_figure_loses_no_row(code, reason, files, monkeypatch, caplog):
    monkeypatch.setattr(peak_memory, "TIMEOUT_S", 1.0)
    run = subprocess.run
    monkeypatch.setattr(peak_memory.subprocess, "run", lambda _, **options: run([sys.executable, "-c", code], **options))
    (row,) = benchmark([files / "fp32.onnx"], calls=2)
    assert (row.calls, row.peak_rss_mib) == (2, None)
    assert re.search(rf"peak memory is not known: .*fp32\.onnx: .*{reason}", caplog.text)


@linux
def test_the_figure_of_the_child_is_found_among_what_a_runtime_prints(monkeypatch, files):
    run = subprocess.run
    child = [sys.executable, "-c", "print('loading 3.0 MiB of kernels')\nprint('12.5 MiB')\nprint('done')"]
    monkeypatch.setattr(peak_memory.subprocess, "run", lambda _, **options: run(child, **options))
    assert peak_rss_mib(files / "fp32.onnx", "onnxruntime", "float32", 1, {"input": np.zeros((1, 1, 32, 32), "f")}) == 12.5


def test_layers_that_cannot_be_timed_lose_no_row(files, monkeypatch, caplog):
    def fail(*_, **__):
        raise QakdError("no profile")

    monkeypatch.setattr(row_fields, "node_times", fail)
    monkeypatch.setattr(row_fields, "peak_rss_mib", lambda *_: None)
    (row,) = benchmark([files / "fp32.onnx"], calls=2, profile_layers=True)
    assert (row.calls, row.layers) == (2, ())
    assert "times of layers are not known: no profile" in caplog.text


def test_a_file_that_does_not_load_closes_those_that_did(files, recorded, monkeypatch):
    load = session.make_runner

    def second_fails(path, *rest):
        if path.name == "int8.onnx":
            raise QakdError("cannot load")
        return load(path, *rest)

    monkeypatch.setattr(session, "make_runner", second_fails)
    with pytest.raises(QakdError, match="cannot load"):
        benchmark([files / "fp32.onnx", files / "int8.onnx"])
    assert recorded == [("fp32.onnx", "closed")]


def test_measuring_files_imports_no_torch(files):
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from qakd_plugin import benchmark\n"
        "from qakd_plugin.report import build_document\n"
        f"rows = benchmark([{str(files / 'fp32.onnx')!r}, {str(files / 'int8.onnx')!r}], calls=2)\n"
        "build_document(rows)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_bench_and_report_loads_nothing_slow():
    code = (
        "import sys\n"
        "import qakd_plugin.bench, qakd_plugin.report\n"
        "slow = {'torch', 'onnx', 'onnxruntime', 'openvino', 'scipy', 'jinja2', 'pydantic', 'matplotlib', 'psutil'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
        "from qakd_plugin.report import console_table, write_report\n"
        "from qakd_plugin.bench import Candidate, benchmark\n"
        "print(sorted({'torch', 'onnxruntime', 'openvino', 'scipy', 'jinja2', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


class Scaled(nn.Module):
    """Logits that depend on the input, and a weight, so that bfloat16 differs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1024, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.layer(x.flatten(1)))


@pytest.mark.filterwarnings("ignore")
def test_torch_modules_are_yardsticks_in_eager_and_compiled_form(digits):
    torch.manual_seed(0)
    module, threads = Scaled().train(), torch.get_num_threads()
    with torch.no_grad():
        logits = module.eval()(digits.test[0])
    images, labels = (part[decided(logits, 1e-4)] for part in digits.test)  # compiled code adds in another order
    expected = (logits[decided(logits, 1e-4)].argmax(1) == labels).float().mean().item()
    module.train()
    rows = benchmark([Candidate(module, "FP32", "m")], [(images, labels)], ("torch", "torch.compile"), calls=3)
    precisions = ("float32", "bfloat16") if has_bfloat16() else ("float32",)
    assert [(r.runtime, r.precision) for r in rows] == [(r, p) for r in ("torch", "torch.compile") for p in precisions]
    assert [row.accuracy for row in rows if row.precision == "float32"] == pytest.approx([expected] * 2)
    assert all(row.file_mib is None and row.load_ms is None and row.peak_rss_mib is None for row in rows)
    assert module.training
    assert module.layer.weight.dtype == torch.float32
    assert torch.get_num_threads() == threads


def test_bad_modules_are_named(digits):
    with pytest.raises(QakdError, match="modules do not say what size"):
        benchmark([nn.Linear(3, 2)], runtimes=("torch",))
    with pytest.raises(QakdError, match="the module cannot run"):
        benchmark([nn.Linear(3, 2)], digits.loader("test"), ("torch",))
    with pytest.raises(QakdError, match="measured in none of"):
        benchmark([nn.Linear(3, 2)], digits.loader("test"))
    with pytest.raises(QakdError, match="modules are measured in floating point"):
        benchmark([Candidate(nn.Linear(3, 2), weight_bits=8)], digits.loader("test"), ("torch",))


def test_a_reference_of_another_size_is_refused(files, digits):
    for shape, images in (((3, 10), "64 or more"), ((450, 9), "64 or more"), ((451, 10), "450"), ((10,), "64 or more")):
        message = (
            rf"reference: expected 10 logits for each of the loader's {images} images, got shape {re.escape(str([*shape]))}"
        )
        with pytest.raises(QakdError, match=message):
            benchmark([files / "fp32.onnx"], digits.loader("test"), reference=np.zeros(shape, np.float32), calls=1)


def test_agreement_and_sqnr_are_those_of_the_logits(files, digits):
    reference, quantized = (
        start_session(files / name, session_options(1)).run(None, {"input": digits.test[0].numpy()})[0]
        for name in ("fp32.onnx", "int8.onnx")
    )
    (row,) = benchmark([files / "int8.onnx"], digits.loader("test"), reference=reference, calls=2)
    assert row.agreement == pytest.approx((reference.argmax(1) == quantized.argmax(1)).mean())
    noise = np.sum((reference - quantized) ** 2, dtype=np.float64)
    assert row.sqnr_db == pytest.approx(10 * np.log10(np.sum(reference**2, dtype=np.float64) / noise), abs=0.5)


def test_other_work_is_noticed():
    """At least what psutil says of a process that works beside this one; other tests may work as well."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        watch, process, started = Watch(), psutil.Process(other.pid), time.perf_counter()
        before = process.cpu_times().user
        while time.perf_counter() - started < 1.5:
            sum(range(1000))
        used = process.cpu_times().user - before
        found, elapsed = watch.conditions(), time.perf_counter() - started
        other.kill()
    ticks = 4 * 0.01 * psutil.cpu_count()  # each of four accounts is rounded to ticks of 10 ms on each processor
    assert used > 0.1
    assert found.other_cores * elapsed > used - ticks
    assert found.busy == (found.other_cores / psutil.cpu_count() > BUSY_SHARE)


def test_own_work_waiting_and_guests_are_not_counted_as_other_work(monkeypatch):
    machine = {"user": 40.0, "system": 10.0, "idle": 100.0, "iowait": 5.0, "steal": 1.0, "guest": 3.0}
    account, own, clock = namedtuple("Account", machine), [20.0, 2.0], [0.0]
    Own = namedtuple("Own", ("user", "system"))
    monkeypatch.setattr(psutil, "cpu_times", lambda: account(**machine))
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda self: Own(*own))
    monkeypatch.setattr(bench_environment.time, "perf_counter", lambda: clock[0])
    watch = Watch()
    clock[0] = 10.0
    for name, seconds in (("user", 9.0), ("system", 2.0), ("idle", 8.0), ("iowait", 1.0), ("steal", 0.5), ("guest", 4.0)):
        machine[name] += seconds
    own[:] = [own[0] + 3.0, own[1] + 1.0]
    # Guests are within user time: 9 + 2 + 0.5 seconds of work, of which this process did 4.
    assert watch.conditions().other_cores == pytest.approx(0.75)


def test_what_others_used_decides_and_the_load_of_the_past_only_where_that_is_not_known(monkeypatch):
    clock, used = [0.0], [0.0]
    monkeypatch.setattr(bench_environment, "load_average", lambda: 100.0)
    monkeypatch.setattr(bench_environment, "_others_seconds", lambda: used[0])
    monkeypatch.setattr(bench_environment.time, "perf_counter", lambda: clock[0])
    watch = Watch()
    clock[0] = 0.5
    assert watch.conditions().busy
    clock[0] = 2.0
    assert not watch.conditions().busy
    used[0] = 2.0 * psutil.cpu_count()
    assert watch.conditions().busy


def test_an_environment_has_no_names_of_host_or_user():
    text = str(environment())
    for private in (os.uname().nodename, os.path.expanduser("~")):
        assert len(private) < 3 or private not in text


class StagedEngine(EngineRunner):
    """An engine's runner without its GPU: times that a GPU would have measured."""

    runtime, precision, load_ms = "tensorrt", "float16", 2.0
    inputs, outputs = {"input": Input((None, 1, 32, 32), np.dtype("float32"))}, ("logits",)

    def __init__(self):
        pass

    def fit(self, inputs):
        return fitted(self.inputs, inputs)

    def run(self, inputs):
        return {"logits": np.zeros((len(inputs["input"]), 10), np.float32)}

    def time(self, inputs):
        return StageTimes(0.25, 1.5, 0.125)

    def close(self):
        pass


def test_copies_and_computing_of_an_engine_are_told_apart(files, tmp_path, monkeypatch):
    engine = build_engine(files / "canonical.onnx", tmp_path / "s.engine", runtime="tensorrt_rtx", opt_batch=2, max_batch=2)
    monkeypatch.setattr(session, "make_runner", lambda *_: StagedEngine())
    (row,) = benchmark([engine.path], runtimes=("tensorrt",), batch_sizes=(2,), calls=2)
    assert (row.upload_ms, row.compute_ms, row.download_ms) == (0.25, 1.5, 0.125)
    assert (row.precision, row.weight_bits) == ("int8", 8), "the manifest says what the plan holds"
    assert (row.integer_layers, row.total_layers) == (10, 10)
    with pytest.raises(QakdError, match=r"s\.engine takes batches of 1 to 2, 3 was asked for"):
        benchmark([engine.path], runtimes=("tensorrt",), batch_sizes=(3,))


def test_openvinos_own_files_are_measured_beside(files, digits, tmp_path):
    """What NNCF writes: an .xml with its weights in a .bin."""
    import openvino

    openvino.save_model(openvino.convert_model(files / "canonical.onnx"), tmp_path / "ir.xml", compress_to_fp16=False)
    rows = benchmark([tmp_path / "ir.xml", files / "canonical.onnx"], digits.loader("test"), ("openvino",), calls=2)
    assert [(row.weight_bits, row.integer_layers) for row in rows] == [(8, 10), (8, 10)]
    assert rows[0].accuracy == rows[1].accuracy
    sizes = sum((tmp_path / name).stat().st_size for name in ("ir.xml", "ir.bin"))
    assert rows[0].file_mib == pytest.approx(sizes / 2**20)
    (tmp_path / "bad.xml").write_text("<net")
    with pytest.raises(QakdError, match=r"bad\.xml: cannot load it"):
        benchmark([Candidate(tmp_path / "bad.xml")], runtimes=("openvino",))
    with pytest.raises(QakdError, match="measured in none of"):
        benchmark([tmp_path / "ir.xml"])


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
        benchmark([Candidate(tmp_path / "s.engine")], digits.loader("test"))


@pytest.mark.skipif(gpu_capability() is not None, reason="there is a GPU")
def test_an_engine_without_a_gpu_is_refused_by_name(files, digits, tmp_path):
    engine = build_engine(files / "canonical.onnx", tmp_path / "s.engine", runtime="tensorrt_rtx")
    with pytest.raises(EngineError, match=r"s\.engine.*GPU"):
        benchmark([engine.path], digits.loader("test"), runtimes=("tensorrt",))


def test_a_missing_runtime_is_named_with_its_pip_line(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[openvino\]'"):
        benchmark([files / "canonical.onnx"], runtimes=("openvino",), calls=1)
