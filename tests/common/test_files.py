"""Files appear whole or not at all, under the name that was asked for, and an error names the file that it is about."""

from __future__ import annotations

import os
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qakd_plugin._common.files import atomic_path, read_whole, require_writable, with_extension, write_atomic
from qakd_plugin.errors import CheckpointError, QakdError


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can grow beyond a thousand bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_what_the_block_raises_about_another_file_names_that_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"timing\.cache"), atomic_path(tmp_path / "net.engine"):
        (tmp_path / "timing.cache").read_bytes()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*folder: Is a directory"):
        write_atomic(tmp_path / "folder", b"", CheckpointError)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*file/under: .*Choose a folder that can be written"):
        write_atomic(tmp_path / "file" / "under", b"", CheckpointError)
    with pytest.raises(CheckpointError, match=r"cannot write .*gone: No such file"):
        write_atomic(tmp_path / "gone", Path.unlink, CheckpointError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("content", [bytes(5000), "x" * 5000, lambda file: torch.save(torch.zeros(5000), file)])
def test_a_full_disk_is_one_error_in_one_line(content: object, tmp_path: Path) -> None:
    (tmp_path / "logits.pt").write_bytes(b"as it was")
    with pytest.raises(CheckpointError, match=r"cannot write .*logits\.pt: ") as caught:
        write_atomic(tmp_path / "logits.pt", content, CheckpointError)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["logits.pt"]
    assert (tmp_path / "logits.pt").read_bytes() == b"as it was"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_permissions_that_the_umask_leaves(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_writing_does_not_open_other_threads_files_to_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[int] = []
    monkeypatch.setattr(os, "umask", lambda mask: masks.append(mask) or 0)
    threads = [threading.Thread(target=write_atomic, args=(tmp_path / f"{index}", b"x")) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert masks == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_what_is_replaced_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(mode)
    write_atomic(tmp_path / "file", b"new")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("there", [True, False])
def test_of_a_link_the_file_that_it_leads_to_is_written(there: bool, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    if there:
        (tmp_path / "other" / "file").write_text("old")
    (tmp_path / "link").symlink_to(Path("other") / "file")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "other" / "file").read_text() == "new"


def test_a_pipe_a_device_and_a_circle_of_links_are_never_written_or_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    for path, reason in [
        (tmp_path / "pipe", "It is a pipe"),
        (Path("/dev/zero"), "It is a pipe"),
        (tmp_path / "circle", "Too many"),
    ]:
        with pytest.raises(QakdError, match=f"cannot write {path}: {reason}"):
            write_atomic(path, b"x")
        with pytest.raises(QakdError, match=f"cannot write {path}: {reason}"):
            require_writable(path)
        with pytest.raises(OSError, match=reason):
            read_whole(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(OSError, match="Is a directory"):
        read_whole(tmp_path)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "net." + "x" * 240 + ".onnx"])
def test_the_longest_names_are_written(name: str, tmp_path: Path) -> None:
    write_atomic(tmp_path / name, b"x")
    assert read_whole(tmp_path / name) == b"x"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x" * 256, "nul\0byte", "\ud800"])
def test_names_that_no_system_can_have_are_one_error(name: str, tmp_path: Path) -> None:
    for write in (lambda path: write_atomic(path, b"x"), require_writable):
        with pytest.raises(QakdError, match="cannot write"):
            write(tmp_path / name)
    with pytest.raises(OSError):
        read_whole(tmp_path / name)


def test_trying_whether_a_file_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "folder" / "file")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]
    (tmp_path / "file").write_text("as it was")
    require_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "as it was"


@pytest.mark.parametrize(
    ("path", "extension", "expected"),
    [
        ("resnet18.v2", ".html", "resnet18.v2.html"),
        ("runs/resnet18.v3", ".json", "runs/resnet18.v3.json"),
        ("net.onnx", ".tuned.onnx", "net.tuned.onnx"),
        ("net.v2.onnx", ".engine", "net.v2.engine"),
        ("net.tuned.onnx", ".tuning.json", "net.tuned.tuning.json"),
        ("Report.HTML", ".md", "Report.md"),
        ("report", ".md", "report.md"),
        ("report.", ".md", "report..md"),
    ],
)
def test_only_extensions_of_what_is_written_here_are_replaced(path: str, extension: str, expected: str) -> None:
    assert with_extension(path, extension) == Path(expected)


@pytest.mark.parametrize("path", ["", ".", "folder/..", "/"])
def test_a_path_without_a_name_is_refused(path: str) -> None:
    with pytest.raises(QakdError, match="names no file"):
        with_extension(path, ".json")
