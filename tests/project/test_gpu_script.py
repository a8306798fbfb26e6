"""benchmarks/gpu.py: whatever a stage does, it ends in time, what was found is kept, and all that is imported is there."""

import json
import re
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import gpu
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(gpu.__file__).parents[1]


def stage(name, *programs, seconds=30.0):
    """Each program is run in the stage's folder's parent process; results are what lies in the folder."""
    return gpu.Stage(
        name, seconds, lambda run: [[sys.executable, "-c", code, str(run.folder)] for code in programs], gpu._json_files
    )


LEAVES = "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'found.json').write_text('[{}]')"


def carry_out(stages, out, budget=60.0, **options):
    environment = gpu.environment_for("cuda", None)  # limits as they are there
    return gpu.carry_out(stages, out, device="cuda", dry=True, budget=budget, data=out, environment=environment, **options)


def test_a_stage_that_hangs_is_cut_with_all_that_it_started_and_leaves_what_it_found(tmp_path):
    alive = tmp_path / "alive"
    child = f"import pathlib, time\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    hangs = f"{LEAVES.format(1)}\nimport subprocess, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    started = time.monotonic()
    document = carry_out([stage("hangs", hangs, "never", seconds=3), stage("next", LEAVES.format(2))], tmp_path)
    assert time.monotonic() - started < 20
    assert document["stages"]["hangs"]["ended"].startswith("cut after")
    assert document["stages"]["hangs"]["results"] == {"found.json": [1]}
    assert document["stages"]["next"] | {"seconds": 0, "output": ""} == {
        "ended": "well",
        "seconds": 0,
        "output": "",
        "results": {"found.json": [2]},
    }
    assert alive.exists()
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists(), "the child is gone, too"


def test_results_are_written_as_each_stage_ends(tmp_path):
    looks = (
        "import pathlib, sys, shutil\n"
        f"shutil.copy({str(tmp_path / 'gpu.json')!r}, pathlib.Path(sys.argv[1]) / 'seen.json')\nsys.exit(3)"
    )
    document = carry_out([stage("first", LEAVES.format(1)), stage("second", looks)], tmp_path)
    seen = document["stages"]["second"]["results"]["seen.json"]
    assert list(seen["stages"]) == ["first"]
    assert document["stages"]["second"]["ended"] == "with code 3"
    assert json.loads((tmp_path / "gpu.json").read_text()) == document


def test_where_no_time_is_left_stages_are_left_out_by_name(tmp_path):
    document = carry_out([stage("slow", "import time; time.sleep(60)"), stage("late", LEAVES.format(1))], tmp_path, budget=2.0)
    assert document["stages"]["slow"]["ended"].startswith("cut after")
    assert document["stages"]["late"] == {"ended": "left out: no time was left"}


def test_an_unknown_stage_is_refused_by_name():
    run = [sys.executable, gpu.__file__, "--stages", "tests,speed"]
    found = subprocess.run(run, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "speed is none of tests, steps" in found.stderr


def test_wheels_that_are_too_large_to_be_carried_are_refused(tmp_path, monkeypatch):
    def downloaded(command, check):
        with open(tmp_path / "large-1.0-py3-none-any.whl", "wb") as file:
            file.truncate(gpu.LARGEST + 1)

    monkeypatch.setattr(gpu.subprocess, "run", downloaded)
    with pytest.raises(SystemExit, match="too large"):
        gpu.collect(tmp_path, tmp_path / "images")


def test_an_empty_folder_of_wheels_is_refused_with_the_line_to_write(tmp_path):
    with pytest.raises(SystemExit, match=r"--collect"):
        gpu.install(tmp_path, tmp_path / "site")


def test_what_the_package_and_its_toolkits_need_is_carried_or_there():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    needed = {Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["modelopt"]}
    for name in ("nvidia-modelopt", "torchao", "pydantic", "jsonargparse", "omegaconf"):
        needed |= {Requirement(text) for text in metadata.requires(name) or ()}
    wanted = {canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})}
    known = {canonicalize_name(re.split(r"[<>=]", name)[0]) for name in (*gpu.WHEELS, *gpu.THERE)}
    assert wanted - known == set()


@pytest.mark.slow
@pytest.mark.matrix
def test_every_stage_runs_on_tiny_sizes(tmp_path, garments):
    run = [sys.executable, gpu.__file__, "--device", "cpu", "--dry", "--data", str(garments), "--out", str(tmp_path)]
    found = subprocess.run(run, capture_output=True, text=True, check=False)
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: stage["ended"] for name, stage in document["stages"].items()} == dict.fromkeys(
        (stage.name for stage in gpu.STAGES), "well"
    )
    assert found.returncode == 0
    assert document["stages"]["tests"]["results"]["passed"] > 0
    assert "SQAKD, LSQ" in json.dumps(document["stages"]["steps"]["results"])
    (student,) = (found for name, found in document["stages"]["evidence"]["results"].items() if "QAT" in name)
    assert 0 <= student["accuracy"] <= 1


@pytest.mark.matrix
def test_evidence_leaves_each_student_and_teacher_as_a_file_of_its_own(tmp_path, garments):
    (evidence,) = (one for one in gpu.STAGES if one.name == "evidence")
    environment = gpu.environment_for("cpu", None)
    document = gpu.carry_out([evidence], tmp_path, device="cpu", dry=True, budget=300, data=garments, environment=environment)
    found = document["stages"]["evidence"]
    assert found["ended"] == "well", found["output"]
    names = {Path(name).name for name in found["results"]}
    assert {"teacher-ResNet-20.json", "ResNet-20-LSQ-w2-QAT-0.005-1.json", "fashion.json"} <= names
    assert found["results"]["fashion.json"]["teachers"]["ResNet-20"]["epochs"] == 1


def test_images_are_carried_beside_the_wheels(tmp_path, monkeypatch):
    images, wheels = tmp_path / "images", tmp_path / "wheels"
    images.mkdir()
    (images / "train-images-idx3-ubyte.gz").write_bytes(b"12345")
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, check: (wheels / "a-1.0-py3-none-any.whl").write_bytes(b"123"))
    assert gpu.collect(wheels, images) == 8
    assert (wheels / gpu.IMAGES / "train-images-idx3-ubyte.gz").read_bytes() == b"12345"
