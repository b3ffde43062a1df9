"""`python -m tastemaker`, which `torchrun` starts as `torchrun -m tastemaker`."""

import sys

from tastemaker.cli import main

if __name__ == "__main__":
    sys.exit(main())
