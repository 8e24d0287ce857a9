"""python -m train --config=configs/shapes/base.py"""

import sys

from x2v_jax.cli import streams

from .cli import main

if __name__ == "__main__":
    sys.exit(streams.run(main, sys.argv[1:]))
