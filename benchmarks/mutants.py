"""Files that cross a process, damaged at random or crafted, and read as the package reads them: a part of ``faults.py``."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import random
import re
import resource
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import corruption
from fault_record import Finding, Tally

from qakd_plugin import benchmark, build_engine, diagnose, export_onnx, prepare, restore_modelopt, tune_for_host, write_report
from qakd_plugin._common.tensor_file import pack, unpack
from qakd_plugin._common.torch_file import load_plain, tensors_of
from qakd_plugin.cli.classifier import network
from qakd_plugin.cli.images import KEY, Preprocessing, from_metadata, image_metadata
from qakd_plugin.deploy.engine.manifest import manifest_path, sealed, verify_engine
from qakd_plugin.report import merge_reports, read_report
from qakd_plugin.report.page import render
from qakd_plugin.training.checkpoint import CheckpointStore
from qakd_plugin.training.distributed.processes import Processes
from qakd_plugin.training.student_file import load, save
from qakd_plugin.training.teacher_cache import TeacherCache

MOST_MEMORY = 4 * 2**30
SECONDS = 60.0
"""A file that takes longer to read hangs; it takes some hundredths, or a few seconds where it is measured."""

IMAGES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TRAINING = [{"name": "SQAKD", "history": [{"epoch": 0, "loss": 0.5, "accuracy": 0.9}]}]
FINGERPRINT = {"method": "SQAKD()", "parameters": ["weight (3, 4)"], "epochs": 4}
PREPROCESSING = Preprocessing((8, 8), 8, (0.5,), (0.25,))


def net() -> nn.Module:
    """A classifier of three classes, of images (N, 1, 8, 8)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def student() -> nn.Module:
    """It, prepared."""
    return prepare(net().eval(), [IMAGES], "torch_ao")


@cache
def _known_student() -> nn.Module:
    return student()


# -- sound files: each function writes one, with what belongs beside it


def _checkpoint(path: Path) -> None:
    state = {"student": net().state_dict(), "position": {"epoch": 1, "sums": {"loss": 0.5}}, "history": [{"epoch": 0}]}
    CheckpointStore(path.parent, FINGERPRINT).save(1, state).rename(path)


def _student(path: Path) -> None:
    save(_known_student(), path)


def _old_student(path: Path) -> None:
    torch.save({"state_dict": _known_student().state_dict(), "quantizers": {}}, path)


def _cache(path: Path) -> None:
    with torch.no_grad():
        TeacherCache(path, nn.Flatten(), "no").fill(IMAGES.split(4), lambda x: {"logits": x.flatten(1)}, Processes())


def _old_cache(path: Path) -> None:
    _cache(path)
    tensors, facts = unpack(path.read_bytes())
    torch.save({"teacher": facts["teacher"], "samples": tensors["samples"], "logits": tensors["outputs.logits"]}, path)


def _weights(path: Path) -> None:
    torch.save(net().state_dict(), path)


def _weights_of_others(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(net().state_dict(), path)


def _saved_by_modelopt(path: Path) -> None:
    import modelopt.torch.opt as mto

    mto.save(prepare(net().eval(), [IMAGES], "modelopt"), path)


def _report(path: Path) -> None:
    from report_rows import CONDITIONS, FINDING, LAYERS, ROW

    measured = replace(ROW, findings=(FINDING,), layers=LAYERS, conditions=CONDITIONS, speedup=2.0)
    floating = replace(ROW, method="FP32", toolkit=None, weight_bits=32, activation_bits=32, precision="float32", p50_ms=2.0)
    parity = [{"name": "student", "weight_codes": 12, "runtime_deviation": 1e-7, "fused": {"top1": 1.0, "sqnr_db": None}}]
    engines = [{"name": "e", "sha256": "0" * 64, "bytes": 4, "runtime": {"name": "tensorrt_rtx", "version": "1.7"}}]
    page = path.with_suffix(".html")
    write_report([floating, measured], page, training=TRAINING, parity=parity, engines=engines, notes=["a note"])


def _engine(path: Path) -> None:
    """Some bytes with a manifest that fits them: nothing reads on where it does not."""
    plan = bytes(range(256)) * 4
    entries = {
        "format": 2,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "bytes": len(plan),
        "onnx": {"file": "net.onnx", "sha256": "0" * 64},
        "runtime": {"name": "tensorrt_rtx", "version": "1.7"},
        "capabilities": ["SM86"],
        "inputs": {"input": [None, 1, 8, 8]},
        "float_type": "float32",
        "quantized": True,
        "profile": {"min": 1, "opt": 8, "max": 64},
        "convolutions": {"total": 1, "int8": 1},
        "layers": [{"name": "conv", "kind": "convolution", "inputs": ["int8", "int8"]}],
        "metadata": _exported_metadata(),
    }
    path.write_bytes(plan)
    manifest_path(path).write_text(json.dumps(sealed(entries)))


def _manifest(path: Path) -> None:
    _engine(path.with_suffix(""))


@cache
def _exported() -> bytes:
    """For ONNX Runtime and OpenVINO, with what the file says of its history."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return export_onnx(_known_student(), IMAGES, Path(folder) / "net.onnx", target="onnxruntime").path.read_bytes()


def _exported_metadata() -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.ModelProto.FromString(_exported()).metadata_props}


def _network_file(path: Path) -> None:
    path.write_bytes(_exported())


def _network_for_tensorrt(path: Path) -> None:
    from qdq_graphs import residual_net

    residual_net(path)


def _network_in_two_files(path: Path) -> None:
    model = onnx.ModelProto.FromString(_exported())
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=64)


def _weights_beside(path: Path) -> None:
    _network_in_two_files(path.with_name("net.onnx"))


def _openvino(path: Path) -> None:
    import openvino

    openvino.save_model(openvino.Core().read_model(_exported()), path.with_suffix(".xml"), compress_to_fp16=False)


def _metadata(path: Path) -> None:
    path.write_text(image_metadata(PREPROCESSING, ["a", "b", "c"])[KEY])


def _image(path: Path) -> None:
    Image.fromarray((IMAGES[0, 0].numpy() * 255).astype(np.uint8)).resize((40, 30)).save(path)


# -- what reads them


def _read_checkpoint(path: Path) -> Any:
    found = CheckpointStore(path.parent, FINGERPRINT).load()
    return None if found is None else found[1]


def _read_student(path: Path) -> Any:
    loaded = copy.deepcopy(_known_student())  # what a crafted file does to it is not the next one's business
    load(path, loaded)
    return loaded.state_dict()


def _read_cache(path: Path) -> Any:
    found = TeacherCache(path, nn.Flatten(), "no")
    return found.find(IMAGES), len(found)


def _read_weights(path: Path) -> Any:
    return network("mutants:net", 3, PREPROCESSING, str(path)).state_dict()


def _read_saved_by_modelopt(path: Path) -> Any:
    return restore_modelopt(net().eval(), path).state_dict()


def _read_report(path: Path) -> Any:
    document = merge_reports([read_report(path)])
    render(document)


def _read_engine(path: Path) -> Any:
    from qakd_plugin.bench.file_facts import batch_limits, input_sizes, quantized_bits, record_of

    for fact in (input_sizes, batch_limits, quantized_bits, record_of):
        fact(path)
    return verify_engine(path)


def _read_manifest(path: Path) -> Any:
    return _read_engine(path.with_suffix(""))


def _read_network(path: Path) -> Any:
    from qakd_plugin.bench.file_facts import batch_limits, float_type, input_sizes, quantized_bits
    from qakd_plugin.deploy.engine.precheck import inspect_onnx

    inspect_onnx(path)
    for fact in (input_sizes, batch_limits, quantized_bits, float_type):
        fact(path)


def _diagnose(path: Path) -> Any:
    for runtime in ("onnxruntime", "openvino"):
        diagnose(path, runtime=runtime)


def _tune(path: Path) -> Any:
    tune_for_host(path, path.with_name("tuned.onnx"), calls=1)


def _build(path: Path) -> Any:
    verify_engine(build_engine(path, path.with_suffix(".engine"), "tensorrt_rtx", capabilities=["SM86"], allow_float=True).path)


def _measure(path: Path, runtime: str, name: str | None = None) -> Any:
    """As ``qakd bench`` does, and its report."""
    rows = benchmark([path if name is None else path.with_name(name)], runtimes=[runtime], calls=1)
    write_report(rows, path.with_name("measured.html"))


def _measure_everywhere(path: Path) -> Any:
    """A file whose weights are in another."""
    source = path.with_name("net.onnx")
    diagnose(source)
    for runtime in ("onnxruntime", "openvino"):
        _measure(source, runtime)


def _read_metadata(path: Path) -> Any:
    found = from_metadata({KEY: path.read_text(errors="replace")}, path)
    if found is not None:
        _image(path.with_suffix(".png"))
        found[0](path.with_suffix(".png"))


def _read_image(path: Path) -> Any:
    PREPROCESSING(path)


# -- damages that fit a format


def torch_file_changed(data: bytes, chance: random.Random) -> bytes:
    """A file of ``torch.save`` with one place taken away, or with something strange in it."""
    content = load_plain(data)
    places = list(_places(content))
    container, key = chance.choice(places)
    strange = (
        None, "text", [], {}, -1, 2**70, float("nan"), torch.zeros(0), torch.zeros(1).expand(10**9), [[[]]], b"bytes", True,
    )  # fmt: skip
    if isinstance(container, dict) and chance.random() < 0.3:
        del container[key]
    else:
        container[key] = chance.choice(strange)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tensor_file_changed(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file of ours with another fact or another tensor, and a digest that fits."""
    tensors, facts = unpack(data)
    if chance.random() < 0.5:
        name, other = chance.choice(sorted(facts)), facts[chance.choice(sorted(facts))]
        facts[name] = chance.choice(("", "7", "[]", "{}", "[[1]]", '{"a": 1}', "x" * 10_000, "[" * 5000, other))
    else:
        name = chance.choice(sorted(tensors))
        rows = tensors.pop(name)
        if chance.random() < 0.7:
            kinds = (torch.zeros(0), torch.tensor(1.0), rows[:1].clone() if rows.ndim else rows, rows.to(torch.bfloat16))
            tensors[chance.choice((name, "another"))] = chance.choice(kinds)
    return pack(tensors, facts)


def manifest_changed(data: bytes, chance: random.Random) -> bytes:
    """A manifest with another entry, and a seal that fits."""
    change = chance.choice((corruption.value_replaced, corruption.values_swapped, corruption.value_removed))
    changed = json.loads(change(data, chance))
    return json.dumps(sealed(changed)).encode() if isinstance(changed, dict) else data


def history_changed(data: bytes, chance: random.Random) -> bytes:
    """An ONNX file that says something else of its own history."""
    model = onnx.ModelProto.FromString(data)
    entry = chance.choice(model.metadata_props)
    text = entry.value.encode()
    if text.startswith((b"{", b"[")) and text not in (b"{}", b"[]") and chance.random() < 0.8:
        changed = chance.choice((corruption.value_replaced, corruption.value_removed, corruption.nested_deeply))(text, chance)
    else:
        changed = chance.choice((b"", b"null", b"W0A99", b"W99999999999999999999A8", b"[" * 100_000, b"\x1b[31m", text * 2))
    entry.value = changed.decode(errors="replace")
    return bytes(model.SerializeToString())


def places_of_weights_changed(data: bytes, chance: random.Random) -> bytes:
    """An ONNX file whose weights are said to be elsewhere in the file beside it, in another one, or in none."""
    model = onnx.ModelProto.FromString(data)
    for tensor in chance.sample(list(model.graph.initializer), chance.choice((1, 1, 3))):
        if not tensor.external_data:
            continue
        entry = chance.choice(tensor.external_data)
        number = ("-1", "0", "1", "7", "4096", str(2**40), str(2**63), str(2**64), "x", "")
        place = ("", ".", "..", "../net.data", "/etc/hostname", "none", "net.onnx", "net.data/", "/dev/zero", "a\nb")
        entry.value = chance.choice(place if entry.key == "location" else number)
    return bytes(model.SerializeToString())


def xml_changed(data: bytes, chance: random.Random) -> bytes:
    """A file of OpenVINO with another value of one attribute, or without one of its elements."""
    text = data.decode()
    if chance.random() < 0.2:
        lines = text.splitlines(keepends=True)
        del lines[chance.randrange(1, len(lines))]
        return "".join(lines).encode()
    found = chance.choice(list(re.finditer(r'([\w.]+)="([^"]*)"', text)))
    strange = ("", "-1", "0", "1", "7", str(2**31), str(2**40), str(2**64), "1" * 5000, "x", "1,2,3", "1,-1,30000,30000", "²",
               "f64", "i4", "u1", "string", "Loop", "Convolution", "&lt;")  # fmt: skip
    return (text[: found.start(2)] + chance.choice(strange) + text[found.end(2) :]).encode()


def entities_nested(data: bytes, chance: random.Random) -> bytes:
    """XML whose entities become larger than any memory."""
    lines = "".join(f'<!ENTITY e{level + 1} "{f"&e{level};" * 10}">' for level in range(12))
    head, _, rest = data.decode().partition("?>")
    rest = re.sub(r'name="[^"]*"', 'name="&e12;"', rest, count=1)
    return f'{head}?><!DOCTYPE net [<!ENTITY e0 "0123456789">{lines}]>{rest}'.encode()


def png_resized(data: bytes, chance: random.Random) -> bytes:
    """A PNG whose header names another size, with a checksum that fits."""
    sizes = (0, 1, 7, 40, 60_000, 2**20, 2**31 - 1)
    header = b"IHDR" + struct.pack(">II", chance.choice(sizes), chance.choice(sizes)) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def png_of_one_line(data: bytes, chance: random.Random) -> bytes:
    """A sound one, which is thousands of times as long as it is wide."""
    size = chance.choice(((1, 60_000), (60_000, 1), (2, 9_000)))
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "png")
    return buffer.getvalue()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every dict and list in plain data, with each key in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of its file.
        make: writes a sound one, with what belongs beside it.
        read: as the package does; gives what must not change unnoticed, or None where the format has no digest.
        damages: of it.
        crafted: whether damages come with a digest that fits, or there is none: then other content may be read.
        beside: other files that it is read with.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    damages: tuple[corruption.Damage, ...] = corruption.BYTES
    crafted: bool = False
    beside: tuple[str, ...] = ()


_OPENVINO, _RTX = (importlib.util.find_spec(name) is not None for name in ("openvino", "tensorrt_rtx_bindings"))
_XML = (*corruption.BYTES, *[xml_changed] * 12, entities_nested)
_PLACES = (*corruption.BYTES, *[places_of_weights_changed] * 9)
_SEALED = (manifest_changed,)

KINDS: dict[str, Kind] = {
    "checkpoint": Kind("step", _checkpoint, _read_checkpoint),
    "checkpoint, crafted": Kind("step", _checkpoint, _read_checkpoint, (*corruption.BYTES, *[torch_file_changed] * 9), True),
    "student": Kind("student.safetensors", _student, _read_student),
    "student, crafted": Kind("student.safetensors", _student, _read_student, (tensor_file_changed,), True),
    "student.pt": Kind("student.pt", _old_student, _read_student),
    "student.pt, crafted": Kind("student.pt", _old_student, _read_student, (torch_file_changed,), True),
    "teacher cache": Kind("cache", _cache, _read_cache),
    "teacher cache, crafted": Kind("cache", _cache, _read_cache, (tensor_file_changed,), True),
    "teacher cache, version 1": Kind("cache.pt", _old_cache, _read_cache),
    "teacher cache, version 1, crafted": Kind("cache.pt", _old_cache, _read_cache, (torch_file_changed,), True),
    "weights": Kind("net.pt", _weights, _read_weights),
    "weights, crafted": Kind("net.pt", _weights, _read_weights, (torch_file_changed,), True),
    "weights, safetensors": Kind("net.safetensors", _weights_of_others, _read_weights, crafted=True),
    "saved by ModelOpt": Kind("net.pth", _saved_by_modelopt, _read_saved_by_modelopt),
    "saved by ModelOpt, crafted": Kind("net.pth", _saved_by_modelopt, _read_saved_by_modelopt, (torch_file_changed,), True),
    "report.json": Kind("report.json", _report, _read_report, corruption.JSON, True),
    "engine": Kind("net.engine", _engine, _read_engine, beside=("net.engine.json",)),
    "manifest": Kind("net.engine.json", _manifest, _read_manifest, corruption.JSON, beside=("net.engine",)),
    "manifest, crafted": Kind("net.engine.json", _manifest, _read_manifest, _SEALED, True, ("net.engine",)),
    "metadata of images": Kind("images.json", _metadata, _read_metadata, corruption.JSON, True),
    "image": Kind("image.png", _image, _read_image, (*corruption.BYTES, *[png_resized] * 4, png_of_one_line), True),
    "ONNX": Kind("net.onnx", _network_for_tensorrt, _read_network, corruption.ONNX, True),
    "ONNX, diagnosed": Kind("net.onnx", _network_file, _diagnose, corruption.ONNX, True),
    "ONNX, tuned": Kind("net.onnx", _network_file, _tune, corruption.ONNX, True),
    "ONNX, its history": Kind("net.onnx", _network_file, partial(_measure, runtime="onnxruntime"), (history_changed,), True),
    "ONNX in ONNX Runtime": Kind("net.onnx", _network_file, partial(_measure, runtime="onnxruntime"), corruption.ONNX, True),
}
if _OPENVINO:
    KINDS |= {
        "ONNX in OpenVINO": Kind("net.onnx", _network_file, partial(_measure, runtime="openvino"), corruption.ONNX, True),
        "ONNX in two files": Kind("net.onnx", _network_in_two_files, _measure_everywhere, _PLACES, True, ("net.data",)),
        "ONNX in two files, its weights": Kind(
            "net.data", _weights_beside, _measure_everywhere, corruption.BYTES, True, ("net.onnx",)
        ),
        "OpenVINO .xml": Kind("net.xml", _openvino, partial(_measure, runtime="openvino"), _XML, True, ("net.bin",)),
        "OpenVINO .bin": Kind(
            "net.bin", _openvino, partial(_measure, runtime="openvino", name="net.xml"), corruption.BYTES, True, ("net.xml",)
        ),
    }
if _RTX:
    KINDS["ONNX in TensorRT-RTX"] = Kind("net.onnx", _network_for_tensorrt, _build, corruption.ONNX, True)


# -- the trial


def digest_of(content: Any) -> str:
    """Of plain data and tensors."""
    digest = hashlib.sha256()
    for tensor in tensors_of(content):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    digest.update(re.sub(r"tensor\(.*?\)", "", repr(content), flags=re.DOTALL).encode())
    return digest.hexdigest()


def read_mutant(order: Path) -> None:
    """Read the file that an order names, as the package would; raise where that is wrong. In a child process."""
    asked = json.loads(order.read_text())
    kind, path = KINDS[asked["kind"]], Path(asked["path"])
    try:
        content = kind.read(path)
    finally:
        processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # what is measured is loaded in a process of its own, too
        memory = max(resource.getrusage(which).ru_maxrss for which in processes) * 1024
        if memory > MOST_MEMORY:
            raise MemoryError(f"{memory >> 20} MiB")
    if not kind.crafted and digest_of(content) != asked["digest"]:
        raise AssertionError("other content was read")


class Sound:
    """Sound files of each kind, each in a folder of its own, made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[Path, bytes, str]] = {}

    def __call__(self, name: str) -> tuple[Path, bytes, str]:
        """The folder of one, its bytes, and the digest of what is read from it."""
        if name not in self._known:
            kind, own = KINDS[name], self._folder / f"sound-{len(self._known)}"
            own.mkdir(parents=True)
            kind.make(own / kind.name)
            data = (own / kind.name).read_bytes()
            content = kind.read(_put(own, kind, data))  # damaging what nobody reads would prove nothing
            self._known[name] = own, data, "" if kind.crafted else digest_of(content)
        return self._known[name]


def mutants(tally: Tally, count: int, seed: int, folder: Path, kinds: tuple[str, ...], isolated: bool = True) -> None:
    """Damage files and read them, the kinds in turn.

    Args:
        tally: of what comes of it.
        count: of damaged files.
        seed: of the damage.
        folder: for files.
        kinds: of them.
        isolated: read in a child process, which may crash or hang.
    """
    sound = Sound(folder)
    reader = corruption.Reader(read_mutant, SECONDS) if isolated else _read_here
    try:
        for number in range(count):
            name = kinds[number % len(kinds)]
            chance = random.Random(f"{seed} {name} {number // len(kinds)}")
            trial = f"{name}, {number // len(kinds)}"
            tally.carry_out(trial, lambda: [_mutant(name, trial, chance, sound, folder / f"mutant-{number}", reader)])  # noqa: B023
    finally:
        if isinstance(reader, corruption.Reader):
            reader.close()


def _mutant(
    name: str, trial: str, chance: random.Random, sound: Sound, own: Path, reader: Callable[[Path], tuple[str, str]]
) -> Finding:
    """Damage a file of a kind, and read it."""
    kind, (whole, data, digest) = KINDS[name], sound(name)
    damage = chance.choice(kind.damages)
    damaged = damage(data, chance)
    own.mkdir()
    for other in kind.beside:
        shutil.copy(whole / other, own / other)
    path = _put(own, kind, damaged, None if kind.crafted else data)
    (own / "order.json").write_text(json.dumps({"kind": name, "path": str(path), "digest": digest}))
    classes, message = reader(own / "order.json")
    where = f"{trial}, {damage.__name__}"
    if not classes:
        shutil.rmtree(own)
        return ("read as the sound file" if damaged == data or not kind.crafted else "read"), None
    if "QakdError" not in classes.split():
        if classes.startswith("MemoryError") and isinstance(reader, corruption.Reader):
            reader.close()  # the next one begins with little
        return "", f"{where}: {classes.split()[0]}: {message[:300]}"
    if "\n" in message:
        return "", f"{where}: several lines: {message[:300]!r}"
    shutil.rmtree(own)
    return "refused in one line", None


def _put(folder: Path, kind: Kind, data: bytes, named: bytes | None = None) -> Path:
    """Write a file under its name; that of a checkpoint holds a digest, of ``named`` where that is another."""
    name = f"step-000000001-{hashlib.sha256(named or data).hexdigest()[:16]}.pt" if kind.name == "step" else kind.name
    (folder / name).write_bytes(data)
    return folder / name


def _read_here(order: Path) -> tuple[str, str]:
    try:
        read_mutant(order)
    except Exception as error:  # noqa: BLE001 - what it is, is the caller's business
        return " ".join(base.__name__ for base in type(error).__mro__), str(error)
    return "", ""
