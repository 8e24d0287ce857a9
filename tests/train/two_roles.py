"""A generator and a critic small enough to follow by hand; runs in a process of its own for kills and devices.

python two_roles.py RUN_DIR STEPS [DEVICES] [ACCUMULATE] [PHASES]
"""

import json
import os
import pathlib
import sys
from typing import Any

if __name__ == "__main__" and len(sys.argv) > 3:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[3]}"

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from train.loop import train
from x2v_jax.config.training import phase, training_config

SIZE = 256  # large enough that matrices are split over devices


class TwoRoles:
    """The critic follows the generator's weights, and the generator flees to the target that it is told."""

    roles = ("generator", "critic")
    averaged = "generator"

    def __init__(self):
        self.frozen = {"target": jnp.ones((SIZE, SIZE))}

    def init(self, key: jax.Array) -> Any:
        names = zip(self.roles, jax.random.split(key), strict=True)
        return {role: {"w": 0.1 * jax.random.normal(of, (SIZE, SIZE)), "b": jnp.zeros(3)} for role, of in names}

    def start_phase(self, params: Any, phase: Any) -> Any:
        return params

    def updates(self, step: int) -> tuple[str, ...]:
        return self.roles if step % 3 == 0 else ("critic",)

    def batch(self, role: str, step: int, phase: Any) -> Any:
        rng = np.random.default_rng([self.roles.index(role), step])
        x = rng.normal(size=(phase.batch_size, SIZE)).astype(np.float32) / SIZE**0.5
        return {"x": x, "sample": np.arange(phase.batch_size, dtype=np.int32)}

    def gradient(self, role: str, params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (SIZE,)))(batch["sample"])

        def loss_of(own: Any) -> jax.Array:
            y = batch["x"] @ own["w"] + 0.01 * noise + own["b"].sum()
            goal = frozen["target"] if role == "generator" else jax.lax.stop_gradient(params["generator"]["w"])
            return jnp.mean((y - batch["x"] @ goal) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(params[role])
        return loss, grads, {}

    def evaluate(self, params: Any, step: int, directory: pathlib.Path) -> dict[str, float]:
        return {"distance": float(jnp.abs(params["w"] - 1.0).mean())}

    def export(self, params: Any, path: pathlib.Path, *, overwrite: bool = False) -> None:
        raise NotImplementedError


def make_config(run_dir: str, steps: int, phases: int = 1, **changes: Any) -> ConfigDict:
    config = training_config("two_roles", run_dir)
    config.phases = tuple(
        phase(
            f"part {i}",
            steps=steps // phases,
            learning_rate=0.02 / (i + 1),
            batch_size=16,
            generator={"every": 3, "learning_rate": 0.05},
        )
        for i in range(phases)
    )
    config.update({"log_every": 5, "save_every": 4, "eval_every": 1000, "ema_start": 5, "ema_decay": 0.9, **changes})
    return config


def run(run_dir: str, steps: int, **changes: Any) -> Any:
    return train(make_config(run_dir, steps, **changes), TwoRoles())


if __name__ == "__main__":
    accumulate, phases = (int(sys.argv[i]) if len(sys.argv) > i else 1 for i in (4, 5))
    state = run(sys.argv[1], int(sys.argv[2]), phases=phases, accumulate=accumulate)
    specs = sorted({str(leaf.sharding.spec) for leaf in jax.tree.leaves(state) if leaf.ndim == 2})
    np.savez(
        pathlib.Path(sys.argv[1]) / "state.npz", **{str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    )
    print(json.dumps({"devices": jax.device_count(), "specs": specs}))
