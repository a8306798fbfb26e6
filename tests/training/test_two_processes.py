"""Two processes do what one does with the joined batch: the same weights to float tolerance, the same ranges, nothing twice."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from test_resume import _log, _results
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from training_server import BATCHES, Server, was_killed

from qakd_plugin import LabelsRequiredError, QakdError, distill, prepare
from qakd_plugin.training.distributed.launch import require_batch_norms_run
from qakd_plugin.training.distributed.processes import Processes
from qakd_plugin.training.distributed.shards import Shards, shared

ALIKE = {"norm": False, "noise": False, "lr": 1e-3, "double": True}
"""Without BatchNorm, which normalizes with the share of each process, and without random augmentation.

In float64: two processes add in another order than one. In float32 that moves a few activations across a rounding tie, after
which the runs part; how far is chance.
"""


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def _run(server, out, processes, **order):
    codes = server.run(out, processes=processes, **order)
    assert codes == [0] * processes, _log(out)
    return _results(out, {"processes": processes})


def _require_close(found, expected, within=1e-9):
    """The same weights up to the order of sums, which in float64 is about 1e-16."""
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=within), name


def _require_equal_ranks(results):
    first, second = results
    assert first["history"] == second["history"]
    for part in ("student", "teacher"):
        different = [name for name, value in first[part].items() if not torch.equal(value, second[part][name])]
        assert not different, part


EVEN, FEWER, ONE_MORE = 32 * BATCHES, 32 * BATCHES - 11, 32 * BATCHES + 1
COVERING = [
    ("QKD", "modelopt", "own", EVEN),
    ("SQAKD", "modelopt", "LSQ", FEWER),
    ("QKD", "pt2e", "own", ONE_MORE),
    ("SQAKD", "pt2e", "LSQ", FEWER),
    ("QKD", "modelopt", "own", ONE_MORE),
]
"""Each kind of student, each number of samples."""


@pytest.mark.parametrize(
    ("method", "toolkit", "quantizers", "samples"),
    [
        pytest.param(*kind, samples, marks=() if (*kind, samples) in COVERING else pytest.mark.matrix)
        for kind in [("SQAKD", "modelopt", "LSQ"), ("QKD", "modelopt", "own"), ("QKD", "pt2e", "own"), ("SQAKD", "pt2e", "LSQ")]
        for samples in (EVEN, FEWER, ONE_MORE)
    ],
)
def test_two_processes_give_the_weights_of_one_with_the_joined_batch(method, toolkit, quantizers, samples, server, tmp_path):
    order = {"method": method, "toolkit": toolkit, "quantizers": quantizers, "samples": samples, **ALIKE}
    order["double"] = (toolkit, quantizers) != ("pt2e", "own")  # whose kernel takes scales in float32 only
    # Learned quantizers compute in float32 whatever is around them: about 1e-6, and more after a code on a tie.
    exact = (toolkit, quantizers) == ("modelopt", "own")
    expected = _run(server, tmp_path / "one", 1, **order)[0]
    found = _run(server, tmp_path / "two", 2, **order)
    _require_equal_ranks(found)
    for part in ("student", "teacher"):
        _require_close(found[0][part], expected[part], 1e-9 if exact else 2e-4)
    for row, other in zip(found[0]["history"], expected["history"], strict=True):
        assert row.keys() == other.keys()
        numbers = row.keys() - {"phase", "best"}
        bounds = {name: 1e-9 if exact else 2e-2 if "agreement" in name else 2e-3 for name in numbers}
        assert all(row[name] == pytest.approx(other[name], abs=bounds[name]) for name in numbers)


@pytest.mark.matrix
@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}], ids=["whole", "divided"])
def test_four_processes_give_the_weights_of_one_with_the_joined_batch(environment, server, tmp_path):
    order = {"method": "QKD", "toolkit": "modelopt", "quantizers": "own", "samples": ONE_MORE, **ALIKE}
    expected = _run(server, tmp_path / "one", 1, **order)[0]
    found = _run(server, tmp_path / "four", 4, environment=environment, **order)
    for pair in itertools.pairwise(found):
        _require_equal_ranks(pair)
    for part in ("student", "teacher"):
        _require_close(found[0][part], expected[part])


def test_two_processes_accumulate_average_and_share_cached_logits_as_one_does(server, tmp_path):
    order = {"method": "SQAKD", "toolkit": "modelopt", "quantizers": "own", **ALIKE}
    results = []
    for processes in (1, 2):
        options = {"accumulate": 2, "ema": 0.9, "cache_teacher": str(tmp_path / f"logits-{processes}.pt")}
        results.append(_run(server, tmp_path / str(processes), processes, options=options, **order))
    (expected,), found = results
    _require_equal_ranks(found)
    _require_close(found[0]["student"], expected["student"])
    sizes = [len(load_file(tmp_path / f"logits-{processes}.pt")["outputs.logits"]) for processes in (1, 2)]
    assert sizes == [32 * BATCHES] * 2


def test_two_processes_train_scales_alone_as_one_does(server, tmp_path):
    order = {"method": "SQAKD", "toolkit": "modelopt", "quantizers": "LSQ", **ALIKE, "lr": None}
    order["options"] = {"trainable": "scales"}
    expected, *_ = _run(server, tmp_path / "one", 1, **order)
    found = _run(server, tmp_path / "two", 2, **order)
    _require_equal_ranks(found)
    _require_close(found[0]["student"], expected["student"], 2e-4)


@pytest.mark.parametrize(
    ("method", "toolkit", "quantizers"), [("QKD", "pt2e", "own"), ("SQAKD", "pt2e", "EWGS"), ("QKD", "modelopt", "LSQ")]
)
def test_weights_statistics_and_ranges_are_equal_on_all_ranks(method, toolkit, quantizers, server, tmp_path):
    """With BatchNorm, observers that go on in training, EWGS's delta, and noise of each process's own."""
    _require_equal_ranks(_run(server, tmp_path, 2, method=method, toolkit=toolkit, quantizers=quantizers))


def test_each_process_reads_its_own_stream_and_goes_on_where_it_was(server, tmp_path):
    order = {"method": "SQAKD", "toolkit": "modelopt", "quantizers": "own", **ALIKE, "stream": "split"}
    order["options"] = {"steps_per_epoch": BATCHES - 2}
    expected = _run(server, tmp_path / "one", 1, **order)[0]
    folder = str(tmp_path / "checkpoints")
    assert was_killed(server.run(tmp_path / "killed", processes=2, folder=folder, die=["step", 9], **order))
    found = _run(server, tmp_path / "two", 2, folder=folder, **order)
    _require_equal_ranks(found)
    _require_close(found[0]["student"], expected["student"])


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"stream": "whole"}, "loader: processes 0 and 1 of 2 begin with the same batch.*split_by_node"),
        ({}, "steps_per_epoch: each of the 2 processes would read the whole data set. Leave it out"),
    ],
)
def test_a_stream_that_all_processes_would_read_as_a_whole_is_refused(order, message, server, tmp_path):
    assert server.run(tmp_path, processes=2, options={"steps_per_epoch": 3}, **order) == [1, 1]
    _require_refused(tmp_path, message)


def test_a_bad_batch_in_one_process_stops_both(server, tmp_path):
    assert server.run(tmp_path, processes=2, poison=150) == [1, 1], _log(tmp_path)
    errors = [(tmp_path / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert all(error.startswith("TrainingError: ") for error in errors), errors
    own, other = sorted(errors, key=lambda error: not error.startswith("TrainingError: loader: batch"))
    assert own.startswith("TrainingError: loader: batch")
    # The other one's loss is NaN as well, or it is told before it looks.
    assert ("loss is nan at step" in other and "phase 'distill'" in other) or " of 2 failed: loader: batch" in other


# -- the shares of a loader


class _Processes:
    """Processes as a loader sees them, without any: all have drawn the same order."""

    def __init__(self, index, count=2):
        self.index, self.count = index, count

    def on_main(self, work):
        torch.manual_seed(4)
        return work()


def _shares(loader, index):
    """What each process is given, batch by batch, and which of it counts."""
    shards = Shards(loader, _Processes(index))
    found = [(batch[0].flatten().tolist(), counts) for batch, counts in shards]
    assert len(found) == len(shards)
    return found


@pytest.mark.parametrize("size", [64, 63, 57, 49, 48, 33])
@pytest.mark.parametrize("kind", ["by index", "workers", "list"])
def test_no_sample_is_lost_and_none_counts_twice(kind, size):
    loader = DataLoader(TensorDataset(torch.arange(size)), 8, shuffle=kind != "list", num_workers=kind == "workers")
    loader = list(loader) if kind == "list" else loader
    shares = [_shares(loader, index) for index in range(2)]
    counted = [number for share in shares for batch, counts in share if counts for number in batch]
    assert sorted(counted) == list(range(size))
    assert len(shares[0]) == len(shares[1])
    assert all(batch for share in shares for batch, _ in share)


@pytest.mark.parametrize("processes", [2, 3])
def test_batches_that_cannot_be_divided_are_named(processes):
    batches = [(torch.ones(4), ["names", "of", "four", "images"])] * 5
    shards = Shards(batches, _Processes(0, processes))
    with pytest.raises(QakdError, match=r"loader: its last \d batches cannot be divided among"):
        list(shards)


def test_a_loader_that_accelerate_shared_out_is_refused():
    loader = prepare_data_loader(DataLoader(TensorDataset(torch.arange(8)), 2), num_processes=2, process_index=1)
    with pytest.raises(QakdError, match=r"accelerator\.prepare"):
        shared(loader, _Processes(1))


def test_accelerates_own_precision_does_not_replace_ours(server, tmp_path):
    order = {"method": "SQAKD", "toolkit": "modelopt", "quantizers": "LSQ", **ALIKE, "double": False}
    plain = _run(server, tmp_path / "plain", 1, **order)[0]
    under = _run(server, tmp_path / "bf16", 1, environment={"ACCELERATE_MIXED_PRECISION": "bf16"}, **order)[0]
    assert plain["history"] == under["history"]


def test_a_loader_that_is_shared_out_already_is_taken_as_it_is():
    dataset = TensorDataset(torch.arange(8))
    mine = DistributedSampler(dataset, num_replicas=2, rank=1)
    batches = BatchSampler(mine, 2, drop_last=False)
    for loader in (
        DataLoader(dataset, 2, sampler=mine),
        DataLoader(dataset, batch_sampler=batches),
        DataLoader(dataset, batch_size=None, sampler=batches),
    ):
        found = shared(loader, _Processes(1))
        assert [batch[0].tolist() for batch, counts in found if counts] == [batch[0].tolist() for batch in loader]


# -- refused


def test_processes_never_train_each_for_itself(server, tmp_path):
    if server.run(tmp_path, processes=2, accelerate_first=True) == [0, 0]:  # an accelerate that joins processes on CPUs itself
        first, second = (torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(2))
        assert first["history"] == second["history"]
        assert all(torch.equal(value, second["student"][name]) for name, value in first["student"].items())
    else:
        _require_refused(tmp_path, "2 processes were started, but accelerate knows of 1.*cpu=True")


def _require_refused(out, text):
    error = (out / "error-0.txt").read_text()
    assert re.match(f"QakdError: .*{text}", error), error


def test_sync_batch_norm_is_refused_where_it_cannot_run_and_warned_of_where_it_is_none(caplog):
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    images, plain = torch.rand(4, 3, 8, 8), nn.Sequential(network[0], nn.BatchNorm2d(4)).eval()
    student = prepare(network, [images])
    assert "SyncBatchNorm" not in caplog.text
    assert torch.equal(student(images), prepare(plain, [images])(images))
    require_batch_norms_run("prepared_model", student, torch.device("cpu"), 1)
    require_batch_norms_run("prepared_model", student, torch.device("cuda"), 2)
    with pytest.raises(QakdError, match=r"prepared_model: 1 is a SyncBatchNorm.*BatchNorm2d"):
        require_batch_norms_run("prepared_model", student, torch.device("cpu"), 2)
    prepare(network, [images], "torch_ao")
    assert "1: with toolkit='torch_ao' SyncBatchNorm is not folded" in caplog.text


def test_a_wrapped_network_is_refused(make_student, teacher, batches):
    with pytest.raises(QakdError, match=r"prepared_model is wrapped in DataParallel.*prepared_model\.module"):
        distill(nn.DataParallel(make_student()), teacher, batches, epochs=1)
    with pytest.raises(QakdError, match="teacher is wrapped in DataParallel"):
        distill(make_student(), nn.DataParallel(teacher), batches, epochs=1)


def test_a_sharded_network_is_refused(make_student, teacher, batches):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student = fully_shard(make_student(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(QakdError, match="prepared_model is sharded"):
            distill(student, teacher, batches, epochs=1)
    finally:
        dist.destroy_process_group()


# -- as users launch it

_SCRIPT = """
import sys
from pathlib import Path
import torch
from training_server import Deaths, Trainings
from qakd_plugin.errors import QakdError

torch.set_num_threads(1)
order = {"toolkit": "modelopt", "quantizers": "own", "method": "QKD", "processes": 2, "norm": False, "noise": False, "lr": 1e-3}
result = Trainings().run({**order, "double": True}, Deaths(None, bytearray(8)))
import torch.distributed as dist
torch.save(result, Path(sys.argv[1]) / f"result-{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.mark.resume
def test_torchrun_gives_the_weights_of_one_process(server, tmp_path):
    (tmp_path / "train.py").write_text(_SCRIPT)
    paths = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "train.py"), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = _results(tmp_path, {"processes": 2})
    _require_equal_ranks(found)
    expected = _run(server, tmp_path / "one", 1, method="QKD", quantizers="own", **ALIKE)[0]
    _require_close(found[0]["student"], expected["student"])
    assert json.dumps(found[0]["history"]) == json.dumps(found[1]["history"])


# -- errors


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_in_one_process_ends_both_with_its_message(victim, server, tmp_path):
    """A user's augmentation fails in one process; the other would wait for it in the next sum over both."""
    assert server.run(tmp_path, processes=2, fails=victim, limit=60) == [1, 1], _log(tmp_path)
    errors = [(tmp_path / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert errors[victim] == "ValueError: this image cannot be read"
    assert errors[1 - victim] == f"QakdError: process {victim} of 2 failed: ValueError: this image cannot be read"


@pytest.mark.parametrize(
    ("toolkit", "kinds"),
    [
        ("modelopt", ["student", "loss", "evaluation", "callback", "last callback", "student interrupted"]),
        ("pt2e", ["layer"]),  # whose observers wait for those of the other process within the forward pass
    ],
    ids=["modelopt", "pt2e"],
)
def test_an_error_anywhere_in_one_process_ends_both_in_seconds(toolkit, kinds, server, tmp_path):
    """All in the same two processes, one run after the other: a run that failed leaves nothing behind for the next."""
    victims = dict.fromkeys(kinds, 1) | ({"teacher": 0} if toolkit == "modelopt" else {})
    assert server.run(tmp_path, processes=2, toolkit=toolkit, failing=victims) == [0, 0], _log(tmp_path)
    results = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(2)]
    for kind, victim in victims.items():
        part = kind.removesuffix(" interrupted")
        text = f"{'ValueError' if part == kind else 'KeyboardInterrupt'}: the {part} fails"
        assert results[victim][kind][0] == text
        assert results[1 - victim][kind][0] == f"QakdError: process {victim} of 2 failed: {text}"
        assert abs(results[0][kind][1] - results[1][kind][1]) < 20


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_in_a_backward_pass_is_found_by_the_other_process(victim, server, tmp_path):
    """Which waits in its own backward pass until the connection breaks."""
    assert server.run(tmp_path, processes=2, failing={"backward pass": victim}) == [0, 0], _log(tmp_path)
    results = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True)["backward pass"][0] for rank in range(2)]
    assert results[victim] == "ValueError: the backward pass fails"
    assert results[1 - victim] == f"QakdError: process {victim} of 2 failed: ValueError: the backward pass fails"


def test_an_error_of_the_package_keeps_its_class_everywhere(monkeypatch):
    def gathered(told, mine, group):
        told[:] = [mine, (LabelsRequiredError, "no labels")]

    processes = Processes()
    processes.count = 2
    monkeypatch.setattr(dist, "all_reduce", lambda failed, group: failed.fill_(1))
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(LabelsRequiredError, match="process 1 of 2 failed: no labels"):
        processes.agree()
