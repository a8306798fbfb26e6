"""A file says by what its model was prepared and trained, and what was proven."""

import copy
import json
import logging

import onnx
import pytest
import torch
from qdq_graphs import residual_net
from torch import nn

from qakd_plugin import KD, QAT, SQAKD, Candidate, attach, build_engine, distill, export_float, export_onnx, prepare
from qakd_plugin._common.training_record import TrainingRecord, method_of, training_records
from qakd_plugin.bench.candidates import candidate_from_path
from qakd_plugin.bench.file_facts import record_of
from qakd_plugin.deploy.file_record import UNTRAINED, FileRecord, read_record
from qakd_plugin.errors import QakdError
from qakd_plugin.report.charts import training_run
from qakd_plugin.training.student_file import load, save


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 8, 3, 2), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def batches():
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 12, 12, generator=draw)
    return [(images[start : start + 16], torch.arange(16) % 10) for start in range(0, 64, 16)]


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def exported(model, batches, path, **options):
    return record_of(export_onnx(model, batches[0][0], path, **options).path)


def test_a_file_that_was_calibrated_only_has_no_training(net, batches, tmp_path):
    record = exported(prepare(net, batches, weight_bits=4), batches, tmp_path / "mobilenet_qat.onnx", target="onnxruntime")
    assert (record.method, record.training) == ("", ())
    assert (record.toolkit, record.weight_bits, record.activation_bits) == ("modelopt", 8, 8), "of most layers"
    assert record.target == "onnxruntime"
    assert record.parity["weight_codes"] == sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert metadata(tmp_path / "mobilenet_qat.onnx")["qakd.method"] == UNTRAINED
    assert candidate_from_path(tmp_path / "mobilenet_qat.onnx") == Candidate(
        tmp_path / "mobilenet_qat.onnx", "mobilenet_qat", "", "modelopt", 8, 8
    )


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_a_file_knows_its_training_and_so_does_that_of_a_copy(net, batches, tmp_path, toolkit):
    student = prepare(net, batches, toolkit)
    result = distill(student, net, batches, epochs=2, val_loader=batches, lr=1e-3, seed=0)
    for index, model in enumerate((result.model, copy.deepcopy(result.model))):
        record = exported(model, batches, tmp_path / f"{index}.onnx", target="onnxruntime")
        (training,) = record.training
        assert (training.method, training.loop) == ("SQAKD", "distill")
        assert record.toolkit == toolkit
        assert training.kept == result.metrics["epoch"]
        recorded = [row["loss"] for row in training.history if "loss" in row]
        assert recorded == pytest.approx([row["loss"] for row in result.history if "loss" in row], rel=1e-5)
        assert not any("images_per_second" in row for row in training.history), "the same training makes the same file"
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


def test_a_file_that_openvino_converted_keeps_its_record(net, batches, tmp_path):
    openvino = pytest.importorskip("openvino")
    student = prepare(net, batches, weight_bits=4)
    distill(student, net, batches, epochs=1, seed=0)
    record = exported(student, batches, tmp_path / "s.onnx", target="openvino")
    openvino.save_model(openvino.convert_model(tmp_path / "s.onnx"), tmp_path / "s.xml")
    assert record_of(tmp_path / "s.xml") == record
    assert record.method == "SQAKD"
    openvino.save_model(openvino.convert_model(export_float(net, batches[0][0], tmp_path / "f.onnx")), tmp_path / "f.xml")
    assert record_of(tmp_path / "f.xml") is None
    (tmp_path / "f.xml").write_text("<net")
    with pytest.raises(QakdError, match=r"f\.xml: cannot load it"):
        record_of(tmp_path / "f.xml")


def test_trainings_add_up_and_own_loops_count(net, batches, tmp_path):
    student = prepare(net, batches)
    distill(student, None, batches, method=QAT(), epochs=1, lr=1e-3)
    assert method_of(training_records(student)) == "QAT"
    with attach(student, net, KD()) as kd:
        assert method_of(training_records(student)) == "QAT", "not trained yet"
        kd.train()
        for images, labels in batches:
            student(images)
            kd.loss(labels).backward()
        kd.eval()
    assert training_records(student)[1:] == (TrainingRecord("KD", "own"),)
    assert exported(student, batches, tmp_path / "s.onnx").method == "QAT, then KD"
    assert training_records(net) == ()


def test_what_an_interrupted_training_leaves_is_not_called_untrained(net, batches):
    class Stop:
        def on_step_end(self, step, losses):
            raise KeyboardInterrupt

    student = prepare(net, batches)
    with pytest.raises(KeyboardInterrupt):
        distill(student, net, batches, epochs=1, callbacks=[Stop()])
    assert method_of(training_records(student)) == "SQAKD"


def test_a_student_file_carries_the_training_to_the_file(net, batches, tmp_path):
    student = prepare(net, batches)
    distill(student, net, batches, method=SQAKD(), epochs=1, lr=1e-3)
    path, fresh = save(student, tmp_path / "student.safetensors"), prepare(net, batches)
    assert training_records(fresh) == ()
    load(path, fresh)
    assert training_records(fresh) == training_records(student)
    torch.save(student.state_dict(), tmp_path / "plain.pt")
    load(tmp_path / "plain.pt", fresh)
    assert training_records(fresh) == (), "weights of which nothing is known"


def test_a_long_history_is_thinned_and_keeps_its_ends():
    history = [{"epoch": k, "loss": 1 / 3, "nested": {"a": 1}, "bad": float("nan"), "ok": True} for k in range(1000)]
    record = TrainingRecord.of_distill("SQAKD", history, 7)
    assert len(record.history) <= 62
    assert 7 in [row["epoch"] for row in record.history], "whose weights were kept"
    assert [record.history[0]["epoch"], record.history[-1]["epoch"]] == [0, 999]
    assert record.history[0] == {"epoch": 0, "loss": 0.333333, "bad": None, "ok": True}
    phases = [{"epoch": k, "phase": "first" if k < 501 else "second"} for k in range(1000)]
    run = training_run({"name": "r", "history": TrainingRecord.of_distill("QKD", phases, 7).history})
    assert (run.phases, run.epochs) == ("first 501 epochs, second 499 epochs", 1000)
    assert training_run({"name": "r", "history": [{"epoch": -1}, {"epoch": 0}, {"epoch": 1}]}).epochs == 2
    kept = TrainingRecord("SQAKD", "distill", kept=-1)
    assert method_of([kept]) == ""
    assert method_of([kept, TrainingRecord("QAT", "own"), TrainingRecord("QAT", "own")]) == "QAT"


GOOD = FileRecord("modelopt", 8, 8, "tensorrt", (TrainingRecord("QAT", "own"),), {"weight_codes": 3}).as_metadata()


@pytest.mark.parametrize(
    "change",
    [
        {"qakd.training": "["},
        {"qakd.training": "[" * 100_000},
        {"qakd.training": json.dumps([{"method": "QAT", "loop": "elsewhere"}])},
        {"qakd.training": '[{"method":"QAT","loop":"own","history":[{"loss":NaN}]}]'},
        {"qakd.training": '[{"method":"\\ud800","loop":"own"}]'},
        {"qakd.training": '[{"method":"QAT","loop":"own","history":[{"loss":1e999}]}]'},
        {"qakd.training": " " * 2_000_000 + "[]"},
        {"qakd.bits": "W8"},
        {"qakd.bits": "W99A8"},
        {"qakd.parity": '{"weight_codes":-1}'},
        {"qakd.parity": "null"},
    ],
    ids=range(11),
)
def test_a_record_that_cannot_be_read_is_left_out_and_said(change, caplog):
    assert read_record(GOOD, "f.onnx").method == "QAT"
    with caplog.at_level(logging.WARNING):
        assert read_record(GOOD | change, "f.onnx") is None
    assert "f.onnx: what it says of its training cannot be read" in caplog.text


def test_files_of_other_makers_have_no_record(net, tmp_path, caplog):
    assert record_of(export_float(net, torch.rand(2, 1, 12, 12), tmp_path / "f.onnx")) is None
    assert read_record({"author": "x", "qakd.fixed": "y"}, "f.onnx") is None
    assert "cannot be read" not in caplog.text


def test_an_engine_keeps_what_its_onnx_file_says(net, batches, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    residual_net(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    onnx.helper.set_model_props(model, GOOD | {"author": "somebody"})
    onnx.save(model, tmp_path / "net.onnx")
    engine = build_engine(tmp_path / "net.onnx", tmp_path / "net.engine", "tensorrt_rtx", capabilities=["SM86"])
    assert engine.manifest["metadata"] == GOOD
    assert record_of(engine.path) == read_record(GOOD, "net.onnx")
    assert candidate_from_path(engine.path).toolkit == "modelopt"
