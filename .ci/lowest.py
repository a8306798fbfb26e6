"""Prints pyproject.toml's lower bounds as pins, a constraints file: ``python .ci/lowest.py > lowest.txt``."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
    for requirement in requirements:
        if bound := re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement):
            print(f"{bound[1]}=={bound[2]}")
