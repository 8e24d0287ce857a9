"""Training checkpoints: asynchronous, complete or absent, restored exactly (Orbax). And how exports name each other."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from x2v_jax.errors import UserError

from .state import TrainState


class Checkpoints:
    """The checkpoints of one run directory. `config.json` beside them says which run it is."""

    def __init__(self, directory: pathlib.Path, *, keep: int = 2):
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def save(self, state: TrainState) -> None:
        """Begins to write a checkpoint; it is complete when the next `save` or `wait` returns.

        Raises:
            UserError: this or the one before could not be written. Those that are complete stay.
        """
        with self._explained():
            self._manager.save(int(state.step), args=ocp.args.StandardSave(_leaves(state)))

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint that reads back, or None if there are none.

        Args:
            like: gives structure and shapes.

        Raises:
            UserError: there are checkpoints, and none of them reads back.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _leaves(like))
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                leaves = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except (OSError, ValueError, KeyError) as error:
                print(f"warning: checkpoint {step} does not read back; trying the one before ({error})")
                continue
            return jax.tree.unflatten(jax.tree.structure(like), [leaves[key] for key in sorted(leaves)])
        if steps:
            # To begin again here would end in their deletion, one by one.
            raise UserError(
                f"run_dir {self.directory} holds checkpoints of steps {', '.join(map(str, sorted(steps)))}, and none "
                "reads back: they are damaged, or of a network of other sizes; choose another --config.run_dir"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Moves checkpoints newer than `step`, which did not read back, to the folder `unreadable`.

        Orbax saves nothing at or before the newest step it knows, so they would keep the resumed run from being saved.
        """
        newer = [known for known in self._manager.all_steps() if known > step]
        for known in newer:
            place = self.directory / "unreadable" / str(known)
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(exist_ok=True)
            (self.directory / "checkpoints" / str(known)).rename(place)
        if newer:
            self._manager.reload()

    def wait(self) -> None:
        """Until everything is written. Raises as `save`."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # what Orbax and its storage raise on a full or failing disk
            place = self.directory / "checkpoints"
            complete = [int(p.name) for p in place.iterdir() if p.name.isdecimal()]
            start = f"step {max(complete)}" if complete else "the beginning"
            raise UserError(
                f"a checkpoint could not be saved in {place} ({str(error)[:300]}); free some space there and run the "
                f"same command again, which goes on from {start}"
            ) from error


def _leaves(state: TrainState) -> dict[str, Any]:
    # Optimizer states are nested tuples with empty nodes; numbered leaves restore the same everywhere.
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def relative_reference(target: pathlib.Path, folder: pathlib.Path) -> str:
    """The path of checkpoint `target` as seen from the checkpoint in `folder`: both can then be moved together."""
    return os.path.relpath(target.resolve(), folder.resolve())
