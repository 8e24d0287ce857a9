"""What a request is decided from: the checkpoint, as far as requests ask it. No jax import."""

import pathlib
from collections.abc import Sequence
from typing import Literal, Protocol, overload, runtime_checkable

from x2v_jax.models.config import Schedule, VaeConfig, WanConfig


@runtime_checkable
class Model(Protocol):
    """What `resolve` asks of a checkpoint; `checkpoint.native.reader.NativeCheckpoint` answers it."""

    @property
    def path(self) -> pathlib.Path: ...
    @property
    def task(self) -> str | None: ...
    @property
    def variant(self) -> str: ...
    @property
    def schedule(self) -> Schedule: ...
    @overload
    def config(self, component: Literal["transformer"], /) -> WanConfig: ...
    @overload
    def config(self, component: Literal["vae"], /) -> VaeConfig: ...
    def has(self, component: str, /) -> bool: ...
    def files(self, component: str, /) -> Sequence[pathlib.Path]: ...
