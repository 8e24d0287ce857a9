"""What every report says about how it was made."""

import datetime
import platform
import shlex
from collections.abc import Sequence
from typing import Any

from x2v_jax.shipped import VERSION


def circumstances(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Command, date, device and versions."""
    import jax
    import numpy as np

    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "versions": {
            "x2v-jax": VERSION,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
