"""Seconds and memory of a distillation step of the 1.3B model, with random weights and random text embeddings.

The tasks are the trainer's own with the published recipes' settings, on one sample: a recipe's batch of 64 is so many
of them, one after the other or on as many GPUs. Every update runs to the last of the four steps, the dearest case.
"""

import functools
import importlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.sections import Row, message
from benchmarks.gpu.settings import Models, Settings, models
from benchmarks.gpu.timing import Parts, peak_bytes
from benchmarks.gpu.weights import random_params
from train.data.sources import Batch, Conditions
from train.loop import optimizer_of
from train.state import Averaging, init_state, make_update
from train.tasks.dmd import DmdTask
from x2v_jax.models.config import Schedule
from x2v_jax.models.functional import Params
from x2v_jax.models.networks import abstract_network

RECIPES = {"dmd": "configs.train.wan_t2v_dmd", "self_forcing": "configs.train.wan_self_forcing"}


class RandomDmd(DmdTask):
    """The task with weights drawn on the device instead of read."""

    def load(self, checkpoint: Any, dtype: str) -> Params:
        shapes = abstract_network(self.model_config, param_dtype=jnp.dtype(dtype))[1]
        return random_params(shapes)

    def one_batch(self, seed: int) -> Any:
        """As `DmdTask.batch` gives it, of one sample."""
        rng = np.random.default_rng(seed)
        size = (1, self.model_config.text_len, self.model_config.text_dim)
        text, negative = (rng.standard_normal(size, np.float32) for _ in range(2))
        batch = Batch(Conditions(text), np.zeros(1, np.int32))
        return {"data": batch, "negative": negative, "exit_step": np.full(1, len(self.sigmas) - 1, np.int32)}


def training_rows(recipe: str, settings: Settings) -> Iterator[Row]:
    """A row for the update of each role, then one of the step that they make up on average."""
    about = {"recipe": recipe, "model": "T2V-1.3B", "size": "480x832x81", "samples": 1}
    parts = Parts(settings)
    try:
        every = _measure(settings, recipe, parts)
    except Exception as error:
        yield {**about, "part": "step", "peak_bytes": peak_bytes(), "failed": message(error)}
        return
    for part in parts.found:
        yield {**about, **part.row()}
    seconds = {part.name: part.median for part in parts.found}
    step = seconds["critic"] + seconds["generator"] / every
    yield {
        **about,
        "part": "step",
        "seconds": float(f"{step:.4g}"),
        "critic_updates": every,
        "peak_bytes": peak_bytes(),
    }


def _measure(settings: Settings, recipe: str, parts: Parts) -> int:
    with tempfile.TemporaryDirectory() as folder:
        config = recipe_config(recipe, pathlib.Path(folder), models("T2V-1.3B", "480P", settings))
        task = RandomDmd(config)
        optimizers = {role: optimizer_of(config, role, config.phases[0]) for role in task.roles}
        state = init_state(task.init(jax.random.key(settings.seed)), optimizers, task.averaged)
        frozen, batch = task.frozen, task.one_batch(settings.seed)
        averaging = Averaging(task.averaged, config.ema_decay, config.ema_start)
        for role in task.roles:
            update = make_update(role, functools.partial(task.gradient, role), optimizers[role], averaging)

            def one(update: Any = update) -> Any:
                nonlocal state
                # The state's memory is taken by the next one.
                state, metrics = update(state, frozen, batch, jax.random.key(1))
                return metrics

            parts(role, one)
        return config.generator_every


def recipe_config(recipe: str, folder: pathlib.Path, sizes: Models) -> Any:
    """The recipe's config for networks of these sizes. `folder` gets what says so in a checkpoint's place."""
    checkpoint = folder / "sizes"
    checkpoint.mkdir()
    entries = {
        name: {"config": config.to_dict(), "dtype": "bfloat16", "files": [f"{name}.safetensors"]}
        for name, config in (("transformer", sizes.transformer), ("vae", sizes.vae))
    }
    model = {"format": "x2v-jax", "format_version": 1, "family": "wan2.1", "task": "t2v", "variant": "base"}
    model |= {"components": entries, "schedule": Schedule().to_dict(), "quantization": None, "provenance": {}}
    (checkpoint / "model.json").write_text(json.dumps(model))
    config = importlib.import_module(RECIPES[recipe]).get_config()
    config.teacher, config.run_dir = str(checkpoint), str(folder / "run")
    config.size = {"height": sizes.height, "width": sizes.width, "num_frames": sizes.frames}
    return config
