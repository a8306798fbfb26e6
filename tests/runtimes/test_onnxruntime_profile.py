"""What ONNX Runtime recorded is read as it is; what it did not record is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from qdq_graphs import UINT8, QdqGraph

from qakd_plugin.errors import QakdError
from qakd_plugin.runtimes.onnxruntime import session_options, start_session
from qakd_plugin.runtimes.onnxruntime_profile import NodeTimes, read_profile


def _profiled(folder: Path, calls: int) -> Path:
    graph = QdqGraph(("batch", 8, 16, 16))
    x = graph.quantize("input", "in", dtype=UINT8)
    x = graph.quantize(graph.conv(x, "first", (8, 8)), "first.out", dtype=UINT8)
    x = graph.add("Sigmoid", [graph.conv(x, "second", (8, 8))], "end")
    path = graph.save(folder / "net.onnx", x, rank=4)
    session = start_session(path, session_options(1, profile=folder / "record"))
    images = np.random.default_rng(0).random((2, 8, 16, 16), dtype=np.float32)
    for _ in range(calls):
        session.run(None, {"input": images})
    return Path(session.end_profiling())


def test_each_node_of_the_runtime_has_a_time_for_each_call(tmp_path: Path) -> None:
    nodes = {node.name: node for node in read_profile(_profiled(tmp_path, calls=4))}
    assert {"first/Conv", "second/Conv"} <= set(nodes)
    first = nodes["first/Conv"]
    assert (first.operator, first.precision) == ("QLinearConv", "uint8")
    assert all(len(node.times_ms) == 4 for node in nodes.values())
    assert all(time >= 0 for node in nodes.values() for time in node.times_ms)


def _event(name: str, index: str, duration: float, **arguments: object) -> dict[str, object]:
    return {"cat": "Node", "name": name, "dur": duration, "args": {"node_index": index, "op_name": "Conv", **arguments}}


def test_names_are_those_of_the_file_and_the_median_leaves_out_the_first_calls(tmp_path: Path) -> None:
    kinds = [{"float": [1, 3]}, {"float": [3]}]
    events = [
        {"cat": "Session", "name": "model_run", "dur": 9},
        _event("a/Conv_fence_before", "0", 1),
        *(_event("a/Conv_token_12_kernel_time", "0", time, input_type_shape=kinds) for time in (9000, 1000, 2000, 4000)),
        _event("b/Conv_kernel_time", "1", 500, input_type_shape=[]),
    ]
    (tmp_path / "record.json").write_text(json.dumps(events))
    nodes = read_profile(tmp_path / "record.json")
    assert nodes == [
        NodeTimes("a/Conv", "Conv", "float32", (9.0, 1.0, 2.0, 4.0)),
        NodeTimes("b/Conv", "Conv", "unknown", (0.5,)),
    ]
    assert nodes[0].median_ms(warm_up=1) == 2.0
    assert nodes[1].median_ms(warm_up=1) == 0.0


@pytest.mark.parametrize(
    "text", ["", "[", "[1]", '[{"cat": "Node"}]', '[{"name": "a_kernel_time", "cat": "Node"}]', "[" * 100_000]
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(QakdError, match=r"record\.json is no profile of ONNX Runtime"):
        read_profile(tmp_path / "record.json")
    with pytest.raises(QakdError, match="cannot be read: No such file"):
        read_profile(tmp_path / "none.json")
