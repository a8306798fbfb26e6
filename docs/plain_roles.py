"""For the reference: ``:func:`qakd_plugin.distill``` in a docstring is shown as ``qakd_plugin.distill``."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod):`~?\.?([\w.]+)`")


class PlainRoles(griffe.Extension):
    """Takes Sphinx's roles off docstrings as they are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value).replace("``", "`")
