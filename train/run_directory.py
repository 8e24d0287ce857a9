"""The folder of a run: one process at a time, one config, and the same run again with more steps."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from x2v_jax import shipped
from x2v_jax.checkpoint.files.atomic import complete_file
from x2v_jax.checkpoint.files.json_file import read_json
from x2v_jax.checkpoint.files.lock import FolderLock
from x2v_jax.errors import UserError

_OTHER = "choose another --config.run_dir"
# Where and how often to write, and how early to read, does not make it another run.
_FREE = ("run_dir", "resume_any", "read_ahead", "log_every", "eval_every", "save_every")


class RunDirectory:
    """The run directory of `config`, made and held by this process.

    Attributes:
        path: the folder.
        before: the phases that it was started or last gone on with, where these are fewer or shorter than now.

    Raises:
        UserError: another process is at work in it, it holds a run of another config, or it cannot be written.
    """

    def __init__(self, config: Any):
        self.path = pathlib.Path(str(config.run_dir))
        self.before: list[Any] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"config.run_dir is {str(self.path)!r}: {error.strerror}; {_OTHER}") from None
        self._lock = FolderLock(self.path, _OTHER)
        try:
            self._claim(_recorded(config), resume_any=config.resume_any)
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        self._lock.release()

    def _claim(self, ours: dict[str, Any], *, resume_any: bool) -> None:
        marker = self.path / "config.json"
        if marker.exists() and not resume_any:
            try:
                theirs = read_json(marker)
            except UserError as error:
                raise UserError(
                    f"{error}: it says which run this is. If it is the same, give --config.resume_any=True, or {_OTHER}"
                ) from None
            if is_longer(theirs, ours):
                self.before = theirs["phases"]  # type: ignore[assignment]  # a list, or it would not be longer
            elif changed := _differences(theirs, ours):
                raise UserError(
                    f"run_dir {self.path} holds a run of another config ({'; '.join(changed[:3])}); "
                    f"{_OTHER}, or pass --config.resume_any=True"
                )
        content = json.dumps(ours, indent=1, sort_keys=True).encode()
        with complete_file(marker, len(content)) as file:
            file.write_at(0, content)


def is_longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a config is the same run with more steps: a longer last phase, or phases behind it."""
    old, new = before.get("phases"), now.get("phases")
    if not isinstance(old, list) or not isinstance(new, list) or not old or len(new) < len(old) or old == new:
        return False
    if {**before, "phases": None} != {**now, "phases": None} or old[:-1] != new[: len(old) - 1]:
        return False
    last, longer = old[-1], new[len(old) - 1]
    if not isinstance(last, dict) or {**last, "steps": 0} != {**longer, "steps": 0}:
        return False
    return longer["steps"] >= last.get("steps", 0)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each key that differs, with both values."""
    old, new = _flat(before), _flat(now)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    result: dict[str, Any] = {}
    for key, entry in inner:
        result |= _flat(entry, f"{name}.{key}" if name else str(key))
    return result or {name: value}


def _recorded(config: Any) -> dict[str, Any]:
    values = json.loads(config.to_json_best_effort())
    for name in _FREE:
        values.pop(name)
    return {name: shipped.recorded(value) if isinstance(value, str) else value for name, value in values.items()}
