"""The command line: ``qakd``, or ``python -m qakd_plugin.cli``."""

from .commands import main as main
