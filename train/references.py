"""How an exported checkpoint names the one that it shares networks with."""

import os
import pathlib


def relative_reference(target: pathlib.Path, folder: pathlib.Path) -> str:
    """The path of checkpoint `target` as seen from the checkpoint in `folder`: both can then be moved together."""
    return os.path.relpath(target.resolve(), folder.resolve())
