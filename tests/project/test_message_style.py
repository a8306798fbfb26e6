"""Errors speak in one style: what is wrong and where, in whole sentences, and what to do."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import qakd_plugin
from qakd_plugin.cli.commands import main as _loads_every_class  # noqa: F401
from qakd_plugin.errors import QakdError

PACKAGE = Path(qakd_plugin.__file__).parent

VERBS = """pass use call choose name leave make take yield build export launch install write lower set give put train calibrate
clean load look prepare save remove delete wait finish check add clamp quantize exclude rank adapt keep correct compute free
average say record update raise return move replace merge count compare match disable deploy read start open divide import
convert declare run rename spell"""

REMEDY = re.compile(
    rf"((^|[.:;,()}}?] )(either )?|\b(or|and|to|then|first|with|again|export) )({'|'.join(VERBS.split())})\b"
    r"|(?-i:{_?[A-Z_]+})",
    re.IGNORECASE,
)
"""An imperative where a sentence or a clause begins; or a constant that holds one."""

EXPECTED = re.compile(
    r"\b(must|expected|needs?|needed|known?|takes|allowed are|are called|there are|was meant|which knows|is for)\b",
    re.IGNORECASE,
)
"""What says which values would do, and so what to do."""

FRAGMENT = re.compile(r"(it|its|this package|what it holds) ")
"""How a reason begins that whoever catches the error puts into a sentence of its own."""


@dataclass(frozen=True)
class Site:
    """A place that raises one of the package's errors.

    Attributes:
        where: file and line.
        text: of the message; what is put in stands as {expression}.
        passes_on: whether it ends with a message, or a sentence, that was made elsewhere.
    """

    where: str
    text: str
    passes_on: bool


def test_every_message_says_what_to_do():
    silent = [site for site in whole_messages() if not site.passes_on and not says_what_to_do(site.text)]
    assert not silent, "\n".join(f"{site.where}: {site.text}" for site in silent)


def test_every_message_is_a_sentence():
    cut = [site for site in whole_messages() if not site.passes_on and not site.text.endswith((".", "}"))]
    assert not cut, "\n".join(f"{site.where}: {site.text}" for site in cut)


def test_reasons_that_are_put_into_sentences_have_no_full_stop():
    stopped = [site for site in sites() if FRAGMENT.match(site.text) and site.text.endswith(".")]
    assert not stopped, "\n".join(f"{site.where}: {site.text}" for site in stopped)


def test_every_message_names_something_of_this_call():
    """A value, or an argument or flag by name: never a bare statement."""
    bare = [
        site
        for site in whole_messages()
        if "{" not in site.text and not re.search(r"[a-z]_[a-z]|=|\(|--|^\w+(:| is )|[A-Z][a-z]+[A-Z]", site.text)
    ]
    assert not bare, "\n".join(f"{site.where}: {site.text}" for site in bare)


@pytest.mark.parametrize(
    ("code", "passes"),
    [
        ("raise QakdError(f'lr={lr!r} must be positive.')", True),
        ("raise QakdError(f'{path} does not exist.')", False),
        ("raise QakdError(f'{path} does not exist. Check the path.')", True),
        ("raise ExportError(f'{path}: the graph has no input: export it again.')", True),
        ("raise ParityError(f'{problem} {advice}', layer)", True),
        ("raise ValueError('no error of the package')", None),
        ("raise QakdError('part ' f'of {it}. ' + 'Pass another.')", True),
        ("raise QakdError(f'the runtime failed: {str(error)}')", False),
    ],
)
def test_the_rule_tells_messages_apart(code, passes):
    found = list(_sites(ast.parse(code), "here", names()))
    assert [site.passes_on or says_what_to_do(site.text) for site in found] == ([] if passes is None else [passes])


def says_what_to_do(text):
    return bool(REMEDY.search(text) or EXPECTED.search(text))


def whole_messages():
    return [site for site in sites() if not FRAGMENT.match(site.text)]


@cache
def trees():
    """Of all files of the package, by their path within it."""
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def sites():
    found = [site for path, tree in trees().items() for site in _sites(tree, path, names())]
    assert len(found) > 400
    return found


@cache
def names():
    """Of the error classes, and of parameters that stand for one."""
    classes = [node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found, before = {"error", "kind", QakdError.__name__}, set()
    while found != before:
        before = set(found)
        found |= {one.name for one in classes if {ast.unparse(base).rpartition(".")[2] for base in one.bases} & before}
    return found


def _sites(tree, where, known):
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
            continue
        if ast.unparse(node.exc.func).rpartition(".")[2] in known:
            message = node.exc.args[0]
            yield Site(f"{where}:{node.lineno}", _text(message).strip(), _passes_on(message))


def _text(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "{" + ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node) + "}"


def _passes_on(node):
    """Whether a message ends with a name, an attribute or what a function of the package returns; of texts of others, never."""
    if isinstance(node, ast.Call):  # the whole message
        return True
    if isinstance(node, ast.JoinedStr):
        *_, before, last = [None, None, *node.values]
        is_stop = isinstance(last, ast.Constant) and last.value == "."
        node = before if is_stop and before is not None else last
    if isinstance(node, ast.BinOp):
        return _passes_on(node.right)
    value = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name | ast.Attribute) and ast.unparse(value.func) not in {
            "str",
            "repr",
            "' '.join",
            "last",
        }
    return isinstance(value, ast.Name | ast.Attribute)
