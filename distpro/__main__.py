"""``python -m distpro``: the command line."""

import sys

from distpro.cli import main

if __name__ == "__main__":
    sys.exit(main())
