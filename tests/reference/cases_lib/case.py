"""A recorded case on disk: case.json, and safetensors of inputs, outputs and (its own or another case's) weights."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file

DEFAULT_CASES = pathlib.Path(__file__).parents[1] / "cases"


@dataclasses.dataclass(frozen=True)
class Case:
    """One case. Tensors are read when asked for, in the layouts and under the names of the recorded implementation.

    Attributes:
        path: the folder.
        kind: which computation was recorded; see `tests.reference.cases_lib.registry.KINDS`.
        config: its settings by the published names.
        source: what was run.
        weights_from: name of the case whose weights it shares, None if it has its own or needs none.
    """

    path: pathlib.Path
    name: str
    kind: str
    config: Mapping[str, Any]
    source: str
    weights_from: str | None = None

    @classmethod
    def load(cls, path: pathlib.Path) -> Self:
        """Reads case.json of the folder `path`."""
        fields = json.loads((path / "case.json").read_text())
        return cls(
            path=path,
            name=fields.get("name", path.name),
            kind=fields["kind"],
            config=fields.get("config", {}),
            source=fields.get("source", ""),
            weights_from=fields.get("weights_from"),
        )

    @functools.cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return load_file(self.inputs_path)

    @functools.cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        return load_file(self.path / "outputs.safetensors")

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        return load_file(self.weights_path)

    @property
    def inputs_path(self) -> pathlib.Path:
        return self.path / "inputs.safetensors"

    @property
    def weights_path(self) -> pathlib.Path:
        """Where the weights are: with the named case beside this one, else with the default case of that name."""
        if self.weights_from is None:
            return self.path / "weights.safetensors"
        places = [folder / self.weights_from / "weights.safetensors" for folder in (self.path.parent, DEFAULT_CASES)]
        for place in places:
            if place.is_file():
                return place
        raise FileNotFoundError(f"{self.path}: weights_from {self.weights_from!r}: none of {[str(p) for p in places]}")


def find_cases(folder: pathlib.Path) -> list[pathlib.Path]:
    """All case folders in `folder`, at any depth, sorted; `folder` itself if it is one."""
    return sorted(file.parent for file in folder.rglob("case.json"))
