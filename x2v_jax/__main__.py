"""`python -m x2v_jax`: the same as `x2v`."""

import sys

from x2v_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
