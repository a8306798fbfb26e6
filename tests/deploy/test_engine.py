"""Engines: what is built, what the manifest proves, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from qdq_graphs import INT4, INT8, UINT8, QdqGraph, residual_net, resnet18

from qakd_plugin.deploy.engine.bindings import (
    PORTABLE_CAPABILITIES,
    Runtime,
    choose_capabilities,
    collecting_logger,
    gpu_capability,
    load_runtime,
)
from qakd_plugin.deploy.engine.build import attach_timing_cache, build_engine
from qakd_plugin.deploy.engine.layer_inspector import read_report
from qakd_plugin.deploy.engine.manifest import FORMAT, SealedManifest, load_engine, sealed, verify_engine
from qakd_plugin.deploy.engine.precheck import inspect_onnx
from qakd_plugin.deploy.engine.rtx_plan import PlanLayer, count, read_plan
from qakd_plugin.deploy.engine.trtexec import input_shape, trtexec_command
from qakd_plugin.errors import EngineError, MissingPackageError

pytest.importorskip("tensorrt_rtx_bindings")
RTX = "tensorrt_rtx"
ONE = {"runtime": RTX, "capabilities": ["SM86"]}
"""One GPU generation builds faster than all of them."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the residual net; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("engine")
    return build_engine(residual_net(folder / "net.onnx"), folder / "net.engine", **ONE).path


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    for name in ("net.engine", "net.engine.json", "net.onnx"):
        (tmp_path / name).write_bytes((built.parent / name).read_bytes())
    return tmp_path / "net.engine"


def _edit_manifest(engine: Path, **changes: Any) -> None:
    """As an engine of that kind would have it."""
    path = engine.with_name(engine.name + ".json")
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | changes)))


# What is built


def test_every_layer_of_a_residual_net_consumes_int8(built: Path) -> None:
    manifest = verify_engine(built)
    assert manifest["convolutions"] == {"total": 5, "int8": 5}
    assert manifest["matmuls"] == {"total": 1, "int8": 1}
    names = {name for layer in manifest["layers"] for name in layer["onnx_layers"]}
    assert {"stem/Conv", "block.shortcut/Conv", "depthwise/Conv", "head/Gemm"} <= names


def test_every_layer_of_resnet18_consumes_int8_for_all_portable_gpus(tmp_path: Path) -> None:
    manifest = build_engine(resnet18(tmp_path / "net.onnx"), tmp_path / "net.engine", RTX, require_int8=1.0).manifest
    assert manifest["convolutions"] == {"total": 20, "int8": 20}
    assert manifest["matmuls"] == {"total": 1, "int8": 1}
    assert manifest["capabilities"] == (["CURRENT"] if gpu_capability() else list(PORTABLE_CAPABILITIES))


def test_manifest_describes_the_files_on_disk(built: Path) -> None:
    manifest, plan = json.loads(Path(f"{built}.json").read_text()), built.read_bytes()
    assert manifest["sha256"] == hashlib.sha256(plan).hexdigest()
    assert manifest["bytes"] == len(plan) == os.path.getsize(built)
    source = (built.parent / "net.onnx").read_bytes()
    assert manifest["onnx"] == {"file": "net.onnx", "sha256": hashlib.sha256(source).hexdigest()}
    assert manifest["runtime"]["version"] == load_runtime(RTX).version
    assert manifest["inputs"] == {"input": [None, 3, 16, 16]}
    assert manifest["profile"] == {"min": 1, "opt": 8, "max": 64}
    assert manifest["capabilities"] == ["SM86"]
    assert str(built.parent) not in json.dumps(manifest), "a manifest travels: it must hold no local path"


def test_fixed_batch_needs_no_profile(tmp_path: Path) -> None:
    info = build_engine(residual_net(tmp_path / "net.onnx", batch=2), tmp_path / "net.engine", **ONE)
    assert info.manifest["profile"] is None
    assert info.manifest["inputs"] == {"input": [2, 3, 16, 16]}
    assert os.fspath(info) == str(tmp_path / "net.engine")


def test_progress_names_the_phases_of_the_build(tmp_path: Path) -> None:
    lines: list[str] = []
    build_engine(residual_net(tmp_path / "net.onnx"), tmp_path / "net.engine", progress=lines.append, **ONE)
    assert lines
    assert all(isinstance(line, str) and line for line in lines)


def test_layers_left_in_float_are_counted_and_named(tmp_path: Path) -> None:
    graph = QdqGraph()
    x = graph.add("Relu", [graph.conv(graph.quantize("input", "first.in"), "first", (3, 8))], "relu")
    path = graph.save(tmp_path / "net.onnx", graph.conv(x, "second", (8, 8)), rank=4)
    assert build_engine(path, tmp_path / "a.engine", **ONE).manifest["convolutions"] == {"total": 2, "int8": 1}
    assert build_engine(path, tmp_path / "b.engine", require_int8=0.5, **ONE).path.is_file()
    with pytest.raises(EngineError, match=r"require_int8=0\.9, but 50% of 2 .* second/Conv \(float x float\)"):
        build_engine(path, tmp_path / "c.engine", require_int8=0.9, **ONE)
    assert not list(tmp_path.glob("c.engine*"))


def test_products_of_two_activations_are_counted_but_not_required_to_be_int8(tmp_path: Path) -> None:
    graph = QdqGraph(("batch", 8, 64))
    x = graph.matmul(graph.quantize("input", "in"), "query", (64, 64), axis=1)
    scores = graph.add("MatMul", [x, graph.add("Transpose", [x], "transpose", perm=[0, 2, 1])], "scores/MatMul")
    path = graph.save(tmp_path / "net.onnx", scores, rank=3)
    assert build_engine(path, tmp_path / "a.engine", require_int8=1.0, **ONE).manifest["matmuls"] == {"total": 2, "int8": 1}
    graph = QdqGraph(("batch", 8, 64))
    product = graph.add("MatMul", ["input", graph.add("Transpose", ["input"], "transpose", perm=[0, 2, 1])], "scores/MatMul")
    path = graph.save(tmp_path / "none.onnx", graph.matmul(product, "plain", (8, 8)), rank=3)
    with pytest.raises(EngineError, match=r"0% of 1 convolutions and matrix products with weights .* plain/MatMul \(float x"):
        build_engine(path, tmp_path / "b.engine", require_int8=1.0, allow_float=True, **ONE)


def test_a_file_that_falls_short_names_every_layer_up_to_ten(tmp_path: Path) -> None:
    graph = QdqGraph()
    x = "input"
    for index in range(12):
        x = graph.conv(x, f"conv{index}", (3, 3))
    path = graph.save(tmp_path / "net.onnx", x, rank=4)
    with pytest.raises(EngineError, match=r"0% of 12 .*conv0/Conv.*conv9/Conv \(float x float\) and 2 more\. Both"):
        build_engine(path, tmp_path / "net.engine", allow_float=True, require_int8=0.9, **ONE)


def test_layers_that_the_plan_does_not_show_do_not_count_as_int8(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = read_plan(built.read_bytes())
    assert contents is not None
    shorter = type(contents)(contents.layers[1:], 0)
    monkeypatch.setattr("qakd_plugin.deploy.engine.build.read_plan", lambda plan: shorter)
    info = build_engine(built.parent / "net.onnx", built.parent / "shorter.engine", **ONE)
    assert info.manifest["convolutions"] == {"total": 5, "int8": 4}
    assert info.manifest["layers"][-1]["inputs"] == ["unknown", "unknown"]


# The plan reader


@pytest.mark.parametrize(
    "plan",
    [b"", b"no plan", random.Random(0).randbytes(4096), b'  corrltn={ name="x" input={"a" "b" } }'],
    ids=["empty", "text", "random", "unbalanced"],
)
def test_a_plan_that_cannot_be_read_is_unknown(plan: bytes) -> None:
    assert read_plan(plan) is None


def test_a_plan_cut_anywhere_never_raises(built: Path) -> None:
    plan = built.read_bytes()
    for end in random.Random(0).sample(range(len(plan)), 20):
        read_plan(plan[:end])


def test_the_stored_type_of_a_weight_is_that_of_the_constant_it_comes_from(tmp_path: Path) -> None:
    graph = QdqGraph(("batch", 8, 64), opset=21)
    x = graph.quantize("input", "act")
    x = graph.matmul(x, "four", (64, 64), dtype=INT4, axis=1)
    x = graph.matmul(graph.quantize(x, "second"), "eight", (64, 64), axis=1)
    x = graph.quantize(x, "third")
    product = graph.add("MatMul", [x, graph.add("Transpose", [x], "transpose", perm=[0, 2, 1])], "attention/MatMul")
    info = build_engine(graph.save(tmp_path / "net.onnx", product, rank=3), tmp_path / "net.engine", **ONE)
    stored = {source: layer["stored"] for layer in info.manifest["layers"] for source in layer["onnx_layers"]}
    assert [stored[f"{name}/MatMul"] for name in ("four", "eight", "attention")] == ["int4", "int8", None]
    assert info.manifest["int4_layers"] == 1


# The engine inspector, as far as it can be read without a GPU


def _inspected(name: str, kind: str, weights: str, data: str, **entries: Any) -> dict[str, Any]:
    return {
        "Name": name, "LayerType": kind, "Inputs": [{"Name": "x", "Dimensions": [16, 512, 28, 28], "Format/Datatype": data}],
        "ParameterType": "Convolution", "Weights": {"Type": weights, "Count": 131072}, **entries,
    }  # fmt: skip


def test_the_inspectors_report_is_read_as_nvidia_documents_it() -> None:
    documented = "Thirty-two wide channel vectorized row major Int8 format."
    report = {
        "Layers": [
            _inspected(
                "a + relu", "CaskConvolution", "Int8", documented, Metadata="[ONNX Layer: a/Conv]\x1e[ONNX Layer: relu]"
            ),
            _inspected("b", "CaskConvolution", "Half", "Channel major FP16 format where channel % 8 == 0"),
            _inspected("c", "CaskGemmConvolution", "Int8", "Row major linear FP32"),
            _inspected("d", "CaskConvolution", "Int8", "N/A due to dynamic shapes"),
            {"Name": "pool", "LayerType": "CaskPooling", "ParameterType": "Pooling", "Inputs": []},
            {"Name": "{ForeignNode[...]}", "LayerType": "Myelin"},
            "only a name",
        ]
    }
    contents = read_report(json.dumps(report))
    assert contents is not None
    assert [(layer.name, layer.kind, layer.inputs) for layer in contents.layers] == [
        ("a + relu", "convolution", ("int8", "int8")),
        ("b", "convolution", ("half", "half")),
        ("c", "matmul", ("float", "int8")),
        ("d", "convolution", ("unknown", "int8")),
    ]
    assert contents.layers[0].onnx_layers == ("a/Conv", "relu")
    assert count(contents.layers, "convolution") == {"total": 3, "int8": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"Layers": ["names", "only"]}', '{"Layers": null}', "[" * 100_000])
def test_an_inspectors_report_that_cannot_be_read_is_unknown(text: str) -> None:
    assert read_report(text) is None


def test_integer_means_both_operands() -> None:
    layers = [
        PlanLayer("a", "convolution", ("int8", "int8")),
        PlanLayer("b", "convolution", ("float", "int8")),
        PlanLayer("c", "matmul", ("int8", "int4")),
    ]
    assert count(layers, "convolution") == {"total": 2, "int8": 1}
    assert count(layers, "matmul") == {"total": 1, "int8": 1}


def test_unreadable_plans_are_recorded_as_unknown_and_fail_a_requirement(
    built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qakd_plugin.deploy.engine.build.read_plan", lambda plan: None)
    info = build_engine(built.parent / "net.onnx", tmp_path / "a.engine", **ONE)
    assert info.manifest["convolutions"] == info.manifest["matmuls"] == info.manifest["layers"] == "unknown"
    with pytest.raises(EngineError, match="share of integer layers is unknown"):
        build_engine(built.parent / "net.onnx", tmp_path / "b.engine", require_int8=0.9, **ONE)


# The file and its manifest


@pytest.mark.parametrize("position", [0, 1000, -1])
def test_one_changed_byte_is_refused(engine: Path, position: int) -> None:
    data = bytearray(engine.read_bytes())
    data[position] ^= 1
    engine.write_bytes(data)
    for check in (verify_engine, load_engine):
        with pytest.raises(EngineError, match=r"not the file that its manifest describes .* executable code"):
            check(engine)


def test_a_truncated_engine_is_refused(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-1])
    for check in (verify_engine, load_engine):
        with pytest.raises(EngineError, match="bytes, its manifest says"):
            check(engine)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text("{"), "not valid JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
        (lambda path: path.write_text("[" * 100_000), "not valid JSON"),
        (lambda path: path.write_text("[]"), "has format None"),
        (lambda path: path.write_text('{"format": 99}'), "has format 99"),
        (
            lambda path: path.write_text(f'{{"format": {FORMAT}}}'),
            "sha256, bytes, runtime, capabilities, float_type, seal missing",
        ),
        (lambda path: path.write_text(path.read_text().replace('"max": 64', '"max": 65')), "entries are not those that were"),
    ],
)
def test_a_damaged_manifest_is_refused(engine: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(engine.with_name("net.engine.json"))
    for check in (verify_engine, load_engine):
        with pytest.raises(EngineError, match=message):
            check(engine)


def test_fields_of_the_wrong_type_are_refused(engine: Path) -> None:
    for changes in ({"runtime": {"name": 1}}, {"bytes": "many"}, {"sha256": None}):
        original = Path(f"{engine}.json").read_bytes()
        _edit_manifest(engine, **changes)
        with pytest.raises(EngineError, match=f"{next(iter(changes))} missing or of the wrong type"):
            verify_engine(engine)
        Path(f"{engine}.json").write_bytes(original)


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": {"input": 3}},
        {"profile": {"min": 8, "opt": 1, "max": 64}},
        {"profile": {"min": "1", "opt": 8, "max": 64}},
        {"convolutions": {"total": 5}},
        {"matmuls": [1, 1]},
        {"layers": [{"name": "a", "kind": "pool", "inputs": ["int8", "int8"]}]},
        {"quantized": "yes"},
        {"float_type": "bfloat16"},
        {"onnx": None, "bytes": True},
    ],
)
def test_a_sealed_manifest_with_entries_that_nothing_can_use_is_refused(engine: Path, changes: dict[str, Any]) -> None:
    _edit_manifest(engine, **changes)
    with pytest.raises(EngineError, match=f"net.engine.json is damaged: {list(changes)[-1]} missing or of the wrong type"):
        verify_engine(engine)


def test_manifests_of_former_and_later_versions_are_read_as_they_are(engine: Path) -> None:
    manifest = json.loads(Path(f"{engine}.json").read_text())
    former = {key: value for key, value in manifest.items() if key not in {"quantized", "seal"}}
    for entries in (former, former | {"entry of a later version": [1]}):
        Path(f"{engine}.json").write_text(json.dumps(sealed(entries)))
        assert verify_engine(engine) == sealed(entries)


def test_a_manifest_without_end_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qakd_plugin.deploy.engine.manifest._LARGEST", 1 << 20)
    with open(f"{engine}.json", "ab") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(EngineError, match="more than 1 MiB: it is no manifest"):
        verify_engine(engine)


def test_the_schema_of_a_manifest_is_that_of_the_model() -> None:
    schema = SealedManifest.model_json_schema()
    assert set(schema["required"]) == {"sha256", "bytes", "runtime", "capabilities", "float_type", "seal"}
    assert schema["$defs"]["Layer"]["properties"]["kind"]["enum"] == ["convolution", "matmul"]


def test_an_engine_of_another_version_is_refused(engine: Path) -> None:
    _edit_manifest(engine, runtime={"name": RTX, "version": "0.1"})
    with pytest.raises(EngineError, match=r"built by tensorrt_rtx 0\.1, installed is .* Build it again"):
        load_engine(engine)


def test_an_engine_of_another_gpu_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _edit_manifest(engine, capabilities=["CURRENT"], gpu="SM86")
    monkeypatch.setattr("qakd_plugin.deploy.engine.manifest.gpu_capability", lambda: "SM89")
    with pytest.raises(EngineError, match="generation SM86, this one is SM89"):
        load_engine(engine)
    _edit_manifest(engine, capabilities=["SM80", "SM86"], gpu=None)
    with pytest.raises(EngineError, match="generation SM80 or SM86, this one is SM89"):
        load_engine(engine)


def test_an_engine_of_a_runtime_that_is_not_installed_tells_how_to_install_it(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it fails from now on, installed or not
    _edit_manifest(engine, runtime={"name": "tensorrt", "version": "10.3"})
    with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[tensorrt\]'"):
        load_engine(engine)


@pytest.mark.skipif(gpu_capability() is not None, reason="there is a GPU")
def test_loading_without_a_gpu_says_so(engine: Path) -> None:
    for _ in range(2):
        with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
            load_engine(engine)


def test_a_failed_build_leaves_the_older_engine_as_it_was(engine: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(EngineError, match="require_int8"):
        _fail_late(engine, tmp_path)
    (tmp_path / "float.onnx").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    verify_engine(engine)


def _fail_late(engine: Path, folder: Path) -> None:
    graph = QdqGraph()
    path = graph.save(folder / "float.onnx", graph.conv("input", "conv", (3, 8)), rank=4)
    build_engine(path, engine, allow_float=True, require_int8=1.0, **ONE)


def test_a_folder_that_cannot_be_written_is_reported(engine: Path) -> None:
    with pytest.raises(EngineError, match="cannot write"):
        build_engine(engine.parent / "net.onnx", engine / "below-a-file" / "net.engine", **ONE)


def test_building_engines_imports_no_torch() -> None:
    code = "import sys, qakd_plugin.deploy.engine.build; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(gpu_capability() is not None, reason="there is a GPU")
def test_a_device_with_tensorrt_numpy_and_pydantic_alone_comes_as_far_as_the_missing_gpu(engine: Path, tmp_path: Path) -> None:
    """An interpreter that sees these packages and nothing else of site-packages: as on an edge box without torch."""
    packages = tmp_path / "packages"
    packages.mkdir()
    pydantic = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions")
    for name in ("numpy", "numpy.libs", *pydantic, "tensorrt_rtx_bindings", "tensorrt_rtx_libs", "qakd_plugin"):
        found = importlib.util.find_spec(name)
        origin = Path(found.origin) if found and found.origin else Path(np.__file__).parent.parent / name / "__init__.py"
        place = origin.parent if origin.name == "__init__.py" else origin
        if place.exists():
            (packages / place.name).symlink_to(place)
    code = f"""
import sys
sys.path.append({str(packages)!r})
from importlib.util import find_spec
assert not any(map(find_spec, ("torch", "onnx", "onnx_ir", "onnxruntime", "pycuda"))), "what is not there is not needed"
from qakd_plugin.deploy.engine.cuda import open_device
from qakd_plugin.deploy.engine.manifest import verify_engine
from qakd_plugin.deploy.engine.runner import EngineRunner
from qakd_plugin.errors import EngineError
print(verify_engine({str(engine)!r})["runtime"]["version"])
for last_step in (lambda: EngineRunner({str(engine)!r}), open_device):
    try:
        last_step()
    except EngineError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    version, load, device = done.stdout.splitlines()
    assert version == load_runtime(RTX).version
    assert "needs an NVIDIA GPU" in load
    assert "needs an NVIDIA GPU" in device


# What is refused before TensorRT sees it


def _float_net(graph: QdqGraph) -> str:
    return graph.conv("input", "conv", (3, 8))


def _unsigned(graph: QdqGraph) -> str:
    return graph.conv(graph.quantize("input", "act", dtype=UINT8), "conv", (3, 8))


def _asymmetric(graph: QdqGraph) -> str:
    return graph.conv(graph.quantize("input", "act", zero_point=-3), "conv", (3, 8))


def _negative_scale(graph: QdqGraph) -> str:
    return graph.conv(graph.quantize("input", "act", scale=-0.1), "conv", (3, 8))


def _nan_scale(graph: QdqGraph) -> str:
    return graph.conv(graph.quantize("input", "act", scale=float("nan")), "conv", (3, 8))


def _dynamic_range(graph: QdqGraph) -> str:
    graph.nodes.append(onnx.helper.make_node("DynamicQuantizeLinear", ["input"], ["q", "s", "z"], name="act"))
    return graph.conv(graph.add("DequantizeLinear", ["q", "s", "z"], "dq"), "conv", (3, 8))


def _computed_scale(graph: QdqGraph) -> str:
    scale = graph.add("Abs", [graph.add("ReduceMax", ["input"], "max", keepdims=0)], "abs")
    codes = graph.add("QuantizeLinear", ["input", scale, graph.constant("zero", np.int8(0))], "act")
    return graph.conv(graph.add("DequantizeLinear", [codes, scale], "dq"), "conv", (3, 8))


def _per_channel_activation(graph: QdqGraph) -> str:
    scales, zeros = graph.constant("s", np.full(3, 0.1, np.float32)), graph.constant("z", np.zeros(3, np.int8))
    codes = graph.add("QuantizeLinear", ["input", scales, zeros], "act", axis=1)
    return graph.conv(graph.add("DequantizeLinear", [codes, scales, zeros], "dq", axis=1), "conv", (3, 8))


def _integer_bias(graph: QdqGraph) -> str:
    y = graph.conv(graph.quantize("input", "act"), "conv", (3, 8))
    codes, scale = graph.constant("bias.codes", np.arange(8, dtype=np.int32)), graph.constant("bias.scale", np.float32(0.01))
    conv = graph.nodes.pop()
    conv.input[2] = graph.add("DequantizeLinear", [codes, scale], "bias/DequantizeLinear")
    graph.nodes.append(conv)
    return y


def _sixteen_bits(graph: QdqGraph) -> str:
    return graph.conv(graph.quantize("input", "act", dtype=np.dtype(np.int16)), "conv", (3, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_float_net, r"holds no QuantizeLinear.*allow_float=True"),
        (_unsigned, r"act/QuantizeLinear: unsigned codes \(UINT8\)"),
        (_asymmetric, r"act/QuantizeLinear: zero point -3; TensorRT takes 0 only"),
        (_negative_scale, r"act/QuantizeLinear: its scale must be finite and positive, got -0\.1"),
        (_nan_scale, r"act/QuantizeLinear: its scale must be finite and positive, got nan"),
        (_dynamic_range, r"act: its range is measured at run time"),
        (_computed_scale, r"act: its scale is computed by the graph"),
        (_per_channel_activation, r"act: several scales for an activation"),
        (_integer_bias, r"bias/DequantizeLinear: a bias quantized to int32"),
        (_sixteen_bits, r"act/QuantizeLinear: codes of type INT16"),
    ],
)
def test_what_tensorrt_must_not_be_given_is_refused_by_name(
    make: Callable[[QdqGraph], str], message: str, tmp_path: Path
) -> None:
    graph = QdqGraph(opset=21)
    path = graph.save(tmp_path / "net.onnx", make(graph), rank=4)
    with pytest.raises(EngineError, match=message):
        build_engine(path, tmp_path / "net.engine", **ONE)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_a_quantizer_whose_type_is_left_to_the_standard_is_unsigned(tmp_path: Path) -> None:
    graph = QdqGraph()
    codes = graph.add("QuantizeLinear", ["input", graph.constant("s", np.float32(0.1))], "act")
    y = graph.conv(graph.add("DequantizeLinear", [codes, "s"], "dq"), "conv", (3, 8))
    with pytest.raises(EngineError, match="act: unsigned codes"):
        inspect_onnx(graph.save(tmp_path / "net.onnx", y, rank=4))


def test_float_engines_are_built_where_asked_for(tmp_path: Path) -> None:
    graph = QdqGraph()
    path = graph.save(tmp_path / "net.onnx", _float_net(graph), rank=4)
    # The weights are quantized, the activations are not: nothing computes in integers.
    manifest = build_engine(path, tmp_path / "net.engine", allow_float=True, **ONE).manifest
    assert manifest["convolutions"] == {"total": 1, "int8": 0}


@pytest.mark.parametrize("shape", [("batch", 3, "height", 16), (1, 3, "height", "width")])
def test_dynamic_sizes_beside_the_batch_need_sizes(shape: tuple[int | str, ...], tmp_path: Path) -> None:
    graph = QdqGraph(shape)
    path = graph.save(tmp_path / "net.onnx", graph.conv(graph.quantize("input", "act"), "conv", (3, 8)), rank=4)
    with pytest.raises(
        EngineError, match=r"'height' \(dimension 2 of 'input'\) is dynamic.* Pass sizes=\{\"height\": \(smallest"
    ):
        build_engine(path, tmp_path / "net.engine", **ONE)


@pytest.mark.parametrize(
    "data",
    [b"", b"not an onnx file", b"\x08\x0a", random.Random(0).randbytes(2000)],
    ids=["empty", "text", "no graph", "random"],
)
def test_files_that_are_no_onnx_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    with pytest.raises(EngineError, match="not a valid ONNX file"):
        build_engine(path, tmp_path / "net.engine", **ONE)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.onnx cannot be read: No such file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "net.engine", **ONE)
    with pytest.raises(EngineError, match="cannot be read: Is a directory"):
        build_engine(tmp_path, tmp_path / "net.engine", **ONE)


def test_weights_outside_the_file_are_refused(tmp_path: Path) -> None:
    model = onnx.load(residual_net(tmp_path / "net.onnx"))
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, size_threshold=0, location="weights.bin")
    with pytest.raises(EngineError, match="keeps its weights in other files"):
        build_engine(tmp_path / "split.onnx", tmp_path / "net.engine", **ONE)


def _elsewhere(name: str) -> TensorProto:
    tensor = onnx.numpy_helper.from_array(np.float32(0.5), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def _in_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["hidden"], value=_elsewhere("hidden")))


def _in_subgraph(model: onnx.ModelProto) -> None:
    value = onnx.helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [])
    branch = onnx.helper.make_graph([], "branch", [], [value], [_elsewhere("hidden")])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "choice"))
    model.graph.node.append(onnx.helper.make_node("If", ["choice"], ["chosen"], then_branch=branch, else_branch=branch))


def _in_function(model: onnx.ModelProto) -> None:
    constant = onnx.helper.make_node("Constant", [], ["hidden"], value=_elsewhere("hidden"))
    opsets = [onnx.helper.make_opsetid("", 20)]
    model.functions.append(onnx.helper.make_function("own", "Half", [], ["hidden"], [constant], opsets))
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    model.graph.node.append(onnx.helper.make_node("Half", [], ["called"], domain="own"))


def _in_sparse_tensor(model: onnx.ModelProto) -> None:
    indices = onnx.numpy_helper.from_array(np.array([0]), "indices")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(_elsewhere("hidden"), indices, [1]))


@pytest.mark.parametrize("hide", [_in_attribute, _in_subgraph, _in_function, _in_sparse_tensor])
def test_no_tensor_may_lie_outside_the_file(hide: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    """The digest in the manifest would not cover it, and it would be read from wherever the process happens to stand."""
    model = onnx.load(residual_net(tmp_path / "net.onnx"))
    hide(model)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"keeps its weights in other files \('hidden' and \d more\)"):
        inspect_onnx(tmp_path / "net.onnx")


def test_a_tensor_cut_short_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    model = onnx.load(residual_net(tmp_path / "net.onnx"))
    short = onnx.numpy_helper.from_array(np.ones(4, np.float32), "short")
    short.raw_data = short.raw_data[:-1]
    branch = onnx.helper.make_graph(
        [], "branch", [], [onnx.helper.make_tensor_value_info("short", TensorProto.FLOAT, [4])], [short]
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "choice"))
    model.graph.node.append(onnx.helper.make_node("If", ["choice"], ["chosen"], then_branch=branch, else_branch=branch))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="not a valid ONNX file"):
        inspect_onnx(tmp_path / "net.onnx")


def test_a_type_of_codes_that_onnx_does_not_have_is_refused(tmp_path: Path) -> None:
    graph = QdqGraph(opset=21)
    scale = graph.constant("scale", np.float32(0.1))
    codes = graph.add("QuantizeLinear", ["input", scale], "act", output_dtype=99)
    y = graph.conv(graph.add("DequantizeLinear", [codes, scale], "dq"), "conv", (3, 8))
    with pytest.raises(EngineError, match=r"act: codes of a type that ONNX does not have \(99\)"):
        inspect_onnx(graph.save(tmp_path / "net.onnx", y, rank=4))


def test_operations_that_the_parser_does_not_know_are_named(tmp_path: Path) -> None:
    graph = QdqGraph()
    y = graph.add("Frobnicate", [graph.conv(graph.quantize("input", "act"), "conv", (3, 8))], "odd", domain="nowhere")
    path = graph.save(tmp_path / "net.onnx", y, rank=4)
    model = onnx.load(path)
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"node 'odd' \(Frobnicate\): .* Keep this operation out"):
        build_engine(path, tmp_path / "net.engine", **ONE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_batch": 0}, "0 < min_batch <= opt_batch <= max_batch"),
        ({"opt_batch": 65}, "0 < min_batch <= opt_batch <= max_batch"),
        ({"require_int8": 90}, "a share between 0 and 1"),
        ({"runtime": "onnxruntime"}, "runtime='onnxruntime' is unknown"),
        ({"capabilities": ["SM42"]}, r"capabilities=\['SM42'\].*knows .*'SM86'"),
        ({"capabilities": []}, r"capabilities=\[\]"),
        ({"capabilities": ["CURRENT", "SM86"]}, "'CURRENT' stands alone"),
        ({"timing_cache": "x"}, "tensorrt_rtx has none"),
    ],
)
def test_bad_options_are_refused(built: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        build_engine(built.parent / "net.onnx", tmp_path / "net.engine", **(ONE | options))
    assert not list(tmp_path.iterdir())


# 4-bit weights: which combinations TensorRT-RTX computes as they are meant


def _linear(kind: str, quantized: bool, **weight: Any) -> Callable[[QdqGraph], str]:
    def make(graph: QdqGraph) -> str:
        x = graph.quantize("input", "act") if quantized else "input"
        return getattr(graph, kind)(x, "layer", (128, 64), **weight)

    return make


def _axes(kind: str) -> tuple[int, int]:
    """Axes of a weight: output channels, and the dimension that is summed."""
    return (0, 1) if kind == "gemm" else (1, 0)


@pytest.mark.parametrize("kind", ["gemm", "matmul"])
@pytest.mark.parametrize("dtype", [INT4, INT8], ids=str)
@pytest.mark.parametrize("block", [None, 16, 32, 64, 128])
@pytest.mark.parametrize("quantized", [False, True])
def test_linear_layers(kind: str, dtype: Any, block: int | None, quantized: bool, tmp_path: Path) -> None:
    """Weight-only: all. With quantized activations: one scale per output channel; a single block is just that."""
    out_axis, summed_axis = _axes(kind)
    graph = QdqGraph(("batch", 128), opset=21)
    weight = {"dtype": dtype, "axis": out_axis if block is None else summed_axis, "block": block}
    path = graph.save(tmp_path / "net.onnx", _linear(kind, quantized, **weight)(graph))
    if quantized and block not in (None, 128):
        with pytest.raises(EngineError, match=rf"layer/\w+: weights with {128 // block} scales along the summed dimension"):
            build_engine(path, tmp_path / "net.engine", **ONE)
        return
    manifest = build_engine(path, tmp_path / "net.engine", allow_float=True, **ONE).manifest
    assert manifest["matmuls"] == {"total": 1, "int8": int(quantized)}
    assert manifest["int4_weights"] == (dtype == INT4)


@pytest.mark.parametrize("kind", ["gemm", "matmul"])
def test_one_scale_for_all_4_bit_weights_beside_8_bit_activations_is_refused(kind: str, tmp_path: Path) -> None:
    graph = QdqGraph(("batch", 128), opset=21)
    path = graph.save(tmp_path / "net.onnx", _linear(kind, True, dtype=INT4, axis=None)(graph))
    with pytest.raises(EngineError, match="one scale for all 4-bit weights"):
        build_engine(path, tmp_path / "net.engine", **ONE)


@pytest.mark.parametrize(
    ("quantized", "weight", "message"),
    [
        (False, {"dtype": INT4}, None),
        (False, {"dtype": INT4, "axis": 1, "block": 1}, "one scale per channel, got blocks"),
        (True, {"dtype": INT4}, "TensorRT has no such convolution"),
        (True, {"dtype": INT4, "axis": None}, "TensorRT has no such convolution"),
        (True, {"dtype": INT8, "axis": 1, "block": 1}, "one scale per channel, got blocks"),
        (True, {"dtype": INT8}, None),
        (True, {"dtype": INT8, "axis": None}, None),
    ],
)
def test_convolutions(quantized: bool, weight: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    graph = QdqGraph(opset=21)
    x = graph.quantize("input", "act") if quantized else "input"
    path = graph.save(tmp_path / "net.onnx", graph.conv(x, "layer", (3, 64), **weight), rank=4)
    if message is not None:
        with pytest.raises(EngineError, match=f"layer/Conv: .*{message}"):
            build_engine(path, tmp_path / "net.engine", allow_float=True, **ONE)
        return
    manifest = build_engine(path, tmp_path / "net.engine", allow_float=True, **ONE).manifest
    assert manifest["convolutions"] == {"total": 1, "int8": int(quantized)}


def test_rtx_applies_the_first_of_several_block_scales_to_the_whole_sum(tmp_path: Path) -> None:
    """Why blocks beside quantized activations are refused: when this fails, the check may be lifted for newer versions.

    The generated program sums int8 x int8 over all 128 inputs and then multiplies by one of the 2 x 64 scales per column.
    """
    graph = QdqGraph(("batch", 128), opset=21)
    path = graph.save(tmp_path / "net.onnx", _linear("matmul", True, dtype=INT8, axis=0, block=64)(graph))
    library = load_runtime(RTX)
    trt = library.module
    logger, _ = collecting_logger(library)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(path.read_bytes())
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("input", (1, 128), (8, 128), (8, 128))
    config.add_optimization_profile(profile)
    plan = bytes(builder.build_serialized_network(network, config))
    contents = read_plan(plan)
    assert contents is not None
    assert [layer.inputs for layer in contents.layers] == [("int8", "int8")]
    assert plan.count(b"dims={ 128 64 }") > 0, "the weight is one matrix, not two blocks"
    assert b"dims={ 1 128 } name=" in plan, "the scales of both blocks are one row of 2 x 64"


# Small parts


def test_classic_tensorrt_takes_no_capabilities() -> None:
    classic = Runtime("tensorrt", load_runtime(RTX).module)
    assert choose_capabilities(classic, None, None) == ["CURRENT"]
    with pytest.raises(EngineError, match="builds for the GPU at hand"):
        choose_capabilities(classic, ["SM86"], "SM86")


@pytest.mark.parametrize(
    ("wanted", "gpu", "chosen"),
    [
        (None, None, list(PORTABLE_CAPABILITIES)),
        (None, "SM89", ["CURRENT"]),
        (None, "SM90", list(PORTABLE_CAPABILITIES)),
        (["CURRENT"], "SM90", ["CURRENT"]),
        (["SM89", "SM80", "SM89"], None, ["SM89", "SM80"]),
    ],
)
def test_rtx_builds_for_the_gpu_at_hand_or_for_portable_ones(
    wanted: list[str] | None, gpu: str | None, chosen: list[str]
) -> None:
    assert choose_capabilities(load_runtime(RTX), wanted, gpu) == chosen


def test_a_timing_cache_starts_empty_and_is_read_back(tmp_path: Path) -> None:
    """The classic TensorRT uses it; RTX has the same calls, which is what can be run here."""
    library = load_runtime(RTX)
    logger, _ = collecting_logger(library)
    builder = library.module.Builder(logger)
    config = builder.create_builder_config()
    attach_timing_cache(config, tmp_path / "none.cache")
    saved = tmp_path / "saved.cache"
    saved.write_bytes(bytes(config.get_timing_cache().serialize()))
    again = builder.create_builder_config()
    attach_timing_cache(again, saved)
    assert bytes(again.get_timing_cache().serialize()) == saved.read_bytes()


def test_nvidias_command_line_is_equivalent(built: Path) -> None:
    inputs = input_shape(built.parent / "net.onnx")
    words = shlex.split(trtexec_command("my net.onnx", "net.engine", inputs, min_batch=2, opt_batch=4, max_batch=16))
    assert words[:3] == ["trtexec", "--onnx=my net.onnx", "--saveEngine=net.engine"]
    assert {
        "--stronglyTyped",
        "--minShapes=input:2x3x16x16",
        "--optShapes=input:4x3x16x16",
        "--maxShapes=input:16x3x16x16",
    } <= set(words)
    words = shlex.split(trtexec_command("a", "b", {"x": (2, 3)}, runtime=RTX, capabilities=["SM86", "SM120"]))
    assert words == ["tensorrt_rtx", "--onnx=a", "--saveEngine=b", "--skipInference", "--computeCapabilities=86,120"]
    assert "--useGpu" in trtexec_command("a", "b", {"x": (2, 3)}, runtime=RTX, capabilities=["CURRENT"])


def test_inspection_lists_layers_with_stored_weights_only(tmp_path: Path) -> None:
    graph = QdqGraph(("batch", 8, 8))
    x = graph.quantize("input", "act")
    product = graph.add("MatMul", [x, graph.add("Transpose", [x], "transpose", perm=[0, 2, 1])], "attention/MatMul")
    path = graph.save(tmp_path / "net.onnx", graph.matmul(product, "layer", (8, 8), axis=1), rank=3)
    assert [layer.name for layer in inspect_onnx(path).layers] == ["layer/MatMul"]
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
