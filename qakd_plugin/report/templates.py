"""What drawings and pages are written from: templates, style and script of ``assets/``."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from markupsafe import Markup

from .tables import short

if TYPE_CHECKING:
    import jinja2


@cache
def template(name: str) -> jinja2.Template:
    """A template of ``assets/`` by its name: what it is given is escaped, and ``short`` cuts it to one line."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qakd_plugin.report", "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = short
    return environment.get_template(name)


def static(name: str) -> Markup:
    """A style or a script of ``assets/``."""
    return Markup(resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8").strip())
