"""Entry of the command `python -m pyrogaps.eval [RECIPE] [options]`."""

import sys

from pyrogaps.cli.command import main as command
from pyrogaps.cli.main import main as main

if __name__ == "__main__":
    sys.exit(command())
