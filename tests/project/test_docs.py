"""Every Python block of the README and of the pages in docs/ runs, in order, page by page."""

import pydoc
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import qakd_plugin as qakd
from qakd_plugin.demo.net import DigitNet, train_float

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
_BLOCK = re.compile(r"^(?P<indent> *)```python *(?P<mark>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def blocks(text):
    """(line of the first statement, mark behind ``python``, code) of each block; "no-run: ..." marks those that cannot run."""
    found = _BLOCK.finditer(text)
    return [(text[: m.start("code")].count("\n") + 1, m["mark"].strip(), textwrap.dedent(m["code"])) for m in found]


def runnable(text):
    return [(line, code) for line, mark, code in blocks(text) if not mark.startswith("no-run")]


PAGES = [path for path in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))) if runnable(path.read_text())]


@pytest.fixture(scope="module")
def prelude(digits):
    """What a page may take for granted; each page gets its own."""
    images, labels = digits.train[0][:128], digits.train[1][:128]
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)

    def make():
        torch.manual_seed(0)
        teacher = train_float(DigitNet(width=4), loader, epochs=1)
        prepared = qakd.prepare(teacher, [images[:64]])
        return {
            "qakd": qakd,
            "torch": torch,
            "model": teacher,
            "teacher": teacher,
            "prepared": prepared,
            "result": qakd.DistillResult(prepared, [], {}, teacher),
            "calibration_batches": [images[:64]],
            "images": images[:8],
            "loader": loader,
            "dataset": loader.dataset,
            "held_out": DataLoader(TensorDataset(*(part[:64] for part in digits.validation)), batch_size=64),
            "test_loader": DataLoader(TensorDataset(*(part[:64] for part in digits.test)), batch_size=64),
        }

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_block_of_a_page_runs(page, prelude, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"} | prelude()
    for line, code in runnable(page.read_text()):
        # As many lines in front as the page has, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def test_a_block_that_cannot_run_says_why():
    for page in DOCS.glob("*.md"):
        for line, mark, _ in blocks(page.read_text()):
            assert re.fullmatch(r"|no-run: \S.*", mark), f"{page.name}:{line}: write ```python no-run: the reason"


def test_the_reference_holds_every_public_name_where_it_lives():
    listed = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    documented = [pydoc.locate(path) for path in listed]
    assert None not in documented, listed[documented.index(None)]
    for name in qakd.__all__:
        if name != "__version__":
            assert any(getattr(qakd, name) is found for found in documented), name


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="pip install 'qakd-plugin[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference.html").read_text()
    assert "Train a model that a quantization toolkit has prepared" in reference
    assert ":func:" not in reference


def test_the_pages_mention_files_that_exist_only():
    for page in DOCS.glob("*.md"):
        for path in re.findall(r"(?:examples|benchmarks|tests)/[\w/]+\.(?:py|yaml)", page.read_text()):
            assert (DOCS.parent / path).is_file(), f"{page.name}: {path}"


def test_blocks_are_found_with_their_lines():
    text = "a\n```python\none\n```\n```bash\nno\n```\n- ```\n  ```python no-run: needs a GPU\n  two\n  ```\n"
    assert blocks(text) == [(3, "", "one\n"), (10, "no-run: needs a GPU", "two\n")]
    assert runnable(text) == [(3, "one\n")]
