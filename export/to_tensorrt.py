"""`qakd engine` for those who have only a checkout: see `python export/to_tensorrt.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qakd_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main(["engine", *sys.argv[1:]]))
