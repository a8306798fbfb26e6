"""Prints pyproject.toml's lower bounds as pins, a constraints file: ``python .ci/lowest.py > lowest.txt``.

Of the extras, those that ``dev`` installs: the others' bounds would be pins of what torch's own wheels bring.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]


def requirements(extra: str) -> list[str]:
    """What an extra installs, the extras it names included."""
    found = []
    for requirement in extras[extra]:
        own = re.fullmatch(rf"{project['name']}\[(.*)\]", requirement)
        found += [inner for name in own[1].split(",") for inner in requirements(name)] if own else [requirement]
    return found


for requirement in dict.fromkeys([*project["dependencies"], *requirements("dev")]):
    if bound := re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
