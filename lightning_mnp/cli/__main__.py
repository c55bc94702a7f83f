"""`python -m lightning_mnp.cli`, where the script `lightning-mnp` is not on the path."""

import sys

from lightning_mnp.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
