"""What a request is decided from: the checkpoint, as far as requests ask it. No jax import."""

from typing import Any, Protocol

from x2v_jax.models.config import Schedule


class Model(Protocol):
    """What `resolve` asks of a checkpoint; `checkpoint.store.NativeCheckpoint` answers it."""

    @property
    def task(self) -> str | None: ...
    @property
    def variant(self) -> str: ...
    @property
    def schedule(self) -> Schedule: ...
    def config(self, component: str) -> Any: ...
    def has(self, component: str) -> bool: ...
