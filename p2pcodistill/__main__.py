"""`python -m p2pcodistill` is the command `p2pcodistill`."""

import sys

from p2pcodistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
