"""The blocks of the README and of the pages in docs/ run as they stand, in order, page by page.

A comment in front of a block says what it is: ``<!-- file: NAME -->`` a file that the reader makes, ``<!-- run -->`` commands,
and ``<!-- no-run: REASON -->`` what cannot run here.
"""

import dataclasses
import inspect
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from glob import glob
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urldefrag, urlsplit

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

import qakd_plugin as qakd
from qakd_plugin.cli import main
from qakd_plugin.demo.net import DigitNet, train_float

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>file|run|no-run)(?:: (?P<value>[^\n]+))? -->\n(?P=indent))?"
    r"```(?P<language>\w+) *\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block: the line of its first statement, its language, what a comment says of it, and its text."""

    line: int
    language: str
    mark: str
    value: str
    code: str

    @property
    def runs(self):
        return self.mark in ("file", "run") or (self.language == "python" and self.mark == "")


def blocks(text):
    return [
        Block(
            text[: m.start("code")].count("\n") + 1,
            m["language"],
            m["mark"] or "",
            m["value"] or "",
            textwrap.dedent(m["code"]),
        )
        for m in _BLOCK.finditer(text)
    ]


def commands(code):
    """The words of each command: comments are left out, and lines that end in a backslash go on."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def expanded(words):
    """As a shell does it: ``images/*.png`` becomes the files."""
    return [found for word in words for found in (sorted(glob(word)) if "*" in word else [word])]


def run_command(words, monkeypatch):
    """``qakd ...`` and ``python FILE ...`` in this process."""
    words = expanded(words)
    if words[0] == "qakd":
        assert main(words[1:]) == 0, words
        return
    assert words[0] == "python", words
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")


ALL_PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
SLOW = {"command_line.md"}
"""Whose commands tests/cli runs."""
PAGES = [
    pytest.param(path, marks=pytest.mark.matrix if path.name in SLOW else ())
    for path in ALL_PAGES
    if any(block.runs for block in blocks(path.read_text()))
]


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


@pytest.fixture
def folder(digits, tmp_path, monkeypatch):
    """The reader's working directory, with folders of images: ``images/train/3/17.png``."""
    for split, (images, labels) in {"train": digits.train, "val": digits.validation}.items():
        for index in range(64):
            path = tmp_path / "images" / split / str(int(labels[index])) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(images[index], path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_block_of_a_page_runs(page, prelude, folder, monkeypatch):
    names = {"__name__": "page"} | prelude()
    for block in filter(lambda block: block.runs, blocks(page.read_text())):
        if block.mark == "file":
            (folder / block.value).write_text(block.code)
        elif block.mark == "run":
            for words in commands(block.code):
                run_command(words, monkeypatch)
        else:
            # As many lines in front as the page has, so that a traceback names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


def test_a_comment_in_front_of_a_block_says_all_that_it_must():
    for page in ALL_PAGES:
        text = page.read_text()
        found = blocks(text)
        assert len(re.findall(r"<!-- (?:file|run|no-run)\b", text)) == sum(bool(b.mark) for b in found), (
            f"{page.name}: a comment stands alone"
        )
        for block in found:
            assert bool(block.value) == (block.mark in ("file", "no-run")), (
                f"{page.name}:{block.line}: name the file, or the reason"
            )


def documented():
    """What reference.md lists, by its path there."""
    listed = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    found = {path: pydoc.locate(path) for path in listed}
    assert None not in found.values(), [path for path, value in found.items() if value is None]
    return found


def test_the_reference_holds_every_public_name_where_it_lives():
    found = documented().values()
    for name in qakd.__all__:
        if name != "__version__":
            assert any(getattr(qakd, name) is one for one in found), name


METADATA = {"fixed", "images", "method", "toolkit", "bits", "target", "parity", "training"}  # of files: "qakd.fixed"


def names_used(text):
    """Paths of the package's names in a page: ``qakd.x``, ``from qakd_plugin.a import b``, ``qakd_plugin.a.b``."""
    paths = {f"qakd_plugin.{name}" for name in re.findall(r"\bqakd\.([A-Za-z]\w*)", text) if name not in METADATA}
    paths |= {path.rstrip(".") for path in re.findall(r"\bqakd_plugin\.[\w.]+", re.sub(r"from qakd_plugin.*", "", text))}
    for module, names in re.findall(r"from (qakd_plugin[\w.]*) import ([\w, ]+)", text):
        paths |= {f"{module}.{name.strip()}" for name in names.split(",")}
    return paths


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda path: path.name)
def test_every_name_that_a_page_uses_is_in_the_reference(page):
    found = list(documented().values())
    for path in names_used(page.read_text()):
        if path.startswith(("qakd_plugin.demo", "qakd_plugin.cli", "qakd_plugin.__")) or page.name == "reference.md":
            continue
        used = pydoc.locate(path)
        assert used is not None, path
        inside = getattr(used, "__module__", None) == qakd.losses.__name__  # documented as a whole
        assert inside or any(used is one for one in found), f"{path} is not in reference.md"


def described(record):
    """What the docstrings of a dataclass say, its bases' included."""
    if record is qakd.Settings:  # its fields have the names and meanings of distill's arguments
        return inspect.getdoc(qakd.distill)
    return "\n".join(inspect.cleandoc(kind.__doc__ or "") for kind in record.__mro__)


def test_the_reference_says_what_each_field_means():
    records = {
        path: found for path, found in documented().items() if isinstance(found, type) and dataclasses.is_dataclass(found)
    }
    assert len(records) > 20
    silent = [
        f"{path}.{field.name}"
        for path, found in records.items()
        for field in dataclasses.fields(found)
        if not re.search(rf"^ +{field.name}: \S", described(found), re.MULTILINE)
    ]
    assert not silent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a link that leads nowhere, or a page that is in no menu, is an error."""
    pytest.importorskip("mkdocstrings", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_reference_is_made_of_the_docstrings(site):
    reference = (site / "reference.html").read_text()
    assert "Train a model that a quantization toolkit has prepared" in reference
    assert ":func:" not in reference


class Resources(HTMLParser):
    """What a browser loads for a page without being asked: everything but links that a reader follows."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.found += [values[name] for name in ("src", "data", "poster") if values.get(name)]
        self.found += [part.split()[0] for part in (values.get("srcset") or "").split(",") if part.strip()]
        if tag == "link" and values.get("href"):
            self.found.append(values["href"])
        self.found += urls_of_style(values.get("style") or "")


def urls_of_style(text):
    urls = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
    return [one or other for one, other in urls]


def outside(urls):
    return [url for url in urls if (urlsplit(url).scheme or urlsplit(url).netloc) and urlsplit(url).scheme != "data"]


def test_the_site_asks_no_other_host_for_anything(site):
    pages = {path: Resources(path.read_text()).found for path in site.rglob("*.html")}
    styles = {path: urls_of_style(path.read_text()) for path in site.rglob("*.css")}
    drawings = {path: re.findall(r"(?:href|src)=['\"]([^'\"]+)", path.read_text()) for path in site.rglob("*.svg")}
    assert len(pages) > 15
    for path, urls in (pages | styles | drawings).items():
        assert not outside(urls), path.name
    for page, urls in pages.items():  # and what they ask their own host for is there
        for url in urls:
            assert url.startswith(("data:", "/")) or (page.parent / urlsplit(url).path).is_file(), (page.name, url)
    assert any(url.endswith(".js") for url in pages[site / "index.html"])
    assert any(styles.values())


def test_a_request_to_another_host_is_found():
    page = (
        '<script src="//cdn.io/a.js"></script><link rel="stylesheet" href="https://c.io/b.css">'
        '<img srcset="http://d.io/c.png 2x"><a href="https://x.io">'
    )
    assert outside(Resources(page).found) == ["//cdn.io/a.js", "https://c.io/b.css", "http://d.io/c.png"]
    assert outside(urls_of_style("a {b: url(https://e.io/d.woff)} @import '//f.io/e.css'; c {d: url(g.woff?1)}")) == [
        "https://e.io/d.woff",
        "//f.io/e.css",
    ]


JOBS = {  # a word that somebody with this job looks for
    "calibrate, train and export": "export_onnx",
    "a model prepared by hand": "mtq.quantize",
    "run the file in a service": "InferenceSession",
    "an engine": "build_engine",
    "a GPU": "torch.cuda.is_available",
    "rate, epochs, calibration batches": "## Calibration batches",
    "save, load, share": "load_state_dict",
    "a folder of images": "ImageFolder",
    "a schedule, EMA, early stopping": "ReduceLROnPlateau",
    "detection and segmentation": "Detectors",
}


@pytest.mark.parametrize("job", JOBS)
def test_a_common_job_is_one_click_from_the_front_page(job):
    index = (DOCS / "index.md").read_text()
    links = [urldefrag(link) for link in re.findall(r"\]\(([^)#\s]+\.md(?:#[\w-]+)?)\)", index)]
    found = [link for link in links if JOBS[job] in (DOCS / link.url).read_text()]
    assert found, f"no page that index.md links to has {JOBS[job]!r}"


def test_the_pages_mention_files_that_exist_only():
    for page in DOCS.glob("*.md"):
        for path in re.findall(r"(?:examples|benchmarks|tests)/[\w/]+\.(?:py|yaml)", page.read_text()):
            assert (DOCS.parent / path).is_file(), f"{page.name}: {path}"


def test_the_readme_is_a_front_page():
    text = (DOCS.parent / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert [block.language for block in blocks(text)] == ["bash", "python"]
    assert text.count("![") == 1
    assert len(re.findall(r"^\|(?:---\|)+$", text, re.MULTILINE)) == 1
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        assert (DOCS.parent / link).is_file(), link


def test_blocks_are_found_with_their_lines_and_what_is_said_of_them():
    text = (
        "a\n```python\none\n```\n```bash\nno\n```\n- ```\n  <!-- no-run: needs a GPU -->\n  ```python\n  two\n  ```\n"
        "<!-- file: a.yaml -->\n```yaml\nb: 1\n```\n<!-- run -->\n```bash\nqakd x \\\n  --y  # why\n```\n"
    )
    found = blocks(text)
    assert found[0] == Block(3, "python", "", "", "one\n")
    assert found[2] == Block(11, "python", "no-run", "needs a GPU", "two\n")
    assert found[3] == Block(15, "yaml", "file", "a.yaml", "b: 1\n")
    assert [block.runs for block in found] == [True, False, False, True, True]
    assert commands(found[4].code) == [["qakd", "x", "--y"]]
