"""Entry of `python -m pyrogaps`, the command `pyrogaps` by another way."""

import sys

from pyrogaps.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
