"""Entry of the command `python -m pyrogaps.eval [RECIPE] [options]`."""

import sys

from pyrogaps.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
