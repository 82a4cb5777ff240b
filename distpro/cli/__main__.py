"""``python -m distpro.cli``, which is ``distpro``; for torchrun's ``-m``."""

import sys

from distpro.cli import main

if __name__ == "__main__":
    sys.exit(main())
