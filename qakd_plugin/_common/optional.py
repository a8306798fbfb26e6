"""Optional packages are imported where they are used, through one helper."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import MissingPackageError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: dotted name, ``"modelopt.torch.quantization"``.
        extra: the extra of this package that installs it.
        purpose: what it is needed for, completing "is needed to ...".

    Raises:
        MissingPackageError: it, or something it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{module.partition('.')[0]} is needed to {purpose}, but importing {module} failed because "
            f"{error.name!r} is not installed. Install it with: {pip_line(extra)}"
        ) from error


def pip_line(extra: str) -> str:
    """What to type for an extra. No index has the package, so that only a checkout can be installed."""
    return f"pip install -e '.[{extra}]' in a checkout of qakd-plugin"
