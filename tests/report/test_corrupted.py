"""Damaged files: each is refused with a clear error within moments, or is read as the valid file that it still is."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import corruption
import pytest
from corruption import Damage, Reader
from qdq_graphs import residual_net

from qakd_plugin import benchmark, build_engine, write_report
from qakd_plugin.bench.schema import validate
from qakd_plugin.deploy.engine.manifest import load_engine, read_manifest, verify_engine
from qakd_plugin.errors import QakdError
from qakd_plugin.report import read_report
from qakd_plugin.runtimes.onnxruntime import OnnxRuntimeRunner

pytest.importorskip("tensorrt_rtx_bindings")
SECONDS = 5.0
"""Of the processor, which is what other work on the machine does not change; it takes a few hundredths."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file, its engine and manifest, and a report."""
    folder = tmp_path_factory.mktemp("sound")
    source = residual_net(folder / "net.onnx")
    build_engine(source, folder / "net.engine", "tensorrt_rtx", capabilities=["SM86"])
    write_report(benchmark([source], calls=3), folder / "report.html")
    return folder


def damaged(data: bytes, damages: tuple[Damage, ...], seeds: range) -> Iterator[tuple[str, bytes]]:
    for seed in seeds:
        chance = random.Random(seed)
        damage = chance.choice(damages)
        yield f"{damage.__name__}, seed {seed}", damage(data, chance)


def refused(read: Callable[[Path], object], path: Path, name: str) -> bool:
    """Whether ``read`` raises, which must be this package's error, soon, and say what is wrong."""
    started, message = time.process_time(), None
    try:
        read(path)
    except QakdError as error:
        message = str(error)
    assert time.process_time() - started < SECONDS, name
    assert message is None or path.stem in message or "report: " in message, f"{name}: {message}"
    assert message is None or len(message) < 2000, f"{name}: the message has {len(message)} characters"
    return message is not None


def build(path: Path) -> None:
    """In a child: an accepted file becomes an engine with its manifest."""
    verify_engine(build_engine(path, path.with_suffix(".engine"), "tensorrt_rtx", capabilities=["SM86"], allow_float=True))


def load(path: Path) -> None:
    """In a child: an accepted file can be loaded."""
    OnnxRuntimeRunner(path, 1)


@pytest.mark.parametrize(("read", "seeds"), [(build, range(60)), (load, range(100, 160))], ids=["tensorrt", "onnxruntime"])
def test_damaged_onnx_files_never_bring_a_native_parser_down(
    read: Callable[[Path], None], seeds: range, sound: Path, tmp_path: Path
) -> None:
    path, reader = tmp_path / "net.onnx", Reader(read, limit=30.0)
    found = 0
    try:
        for name, data in damaged((sound / "net.onnx").read_bytes(), corruption.ONNX, seeds):
            path.write_bytes(data)
            started = time.monotonic()
            kinds, message = reader(path)
            assert not kinds or "QakdError" in kinds.split(), f"{name}: {kinds}: {message}"
            assert not kinds or len(message) > 30, f"{name}: {message!r} says too little"
            assert time.monotonic() - started < 30, name
            found += bool(kinds)
    finally:
        reader.close()
    assert found > len(seeds) / 2


def test_damaged_engines_are_refused_before_anything_is_loaded(sound: Path, tmp_path: Path) -> None:
    original, path = (sound / "net.engine").read_bytes(), tmp_path / "net.engine"
    (tmp_path / "net.engine.json").write_bytes((sound / "net.engine.json").read_bytes())
    for name, data in damaged(original, corruption.BYTES, range(40)):
        path.write_bytes(data)
        for read in (verify_engine, load_engine):
            assert refused(read, path, name) or data == original, name


def test_damaged_manifests_are_refused_or_say_the_same(sound: Path, tmp_path: Path) -> None:
    original, path = (sound / "net.engine.json").read_bytes(), tmp_path / "net.engine"
    path.write_bytes((sound / "net.engine").read_bytes())
    for name, data in damaged(original, corruption.JSON, range(60)):
        (tmp_path / "net.engine.json").write_bytes(data)
        if not refused(verify_engine, path, name):
            assert read_manifest(path) == json.loads(original), name


def test_damaged_reports_are_refused_or_still_fit_the_schema(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for name, data in damaged((sound / "report.json").read_bytes(), corruption.JSON, range(60)):
        path.write_bytes(data)
        if not refused(read_report, path, name):
            document = read_report(path)
            validate(json.loads(json.dumps(document, allow_nan=False)))


@pytest.mark.parametrize("read", [read_report, verify_engine, build_engine])
def test_a_folder_in_the_place_of_a_file_is_named(read: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "net.engine.json").mkdir()
    with pytest.raises(QakdError, match="net"):
        read(
            *[tmp_path / "net.engine.json"] if read is read_report else [tmp_path / "net.engine"] * (1 + (read is build_engine))
        )
