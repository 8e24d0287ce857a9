"""What a run would be: its config, its parameters and the memory that it takes, worked out without reading weights."""

import json
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from x2v_jax.models.config import WanConfig
from x2v_jax.models.functional import parameter_count
from x2v_jax.models.networks import abstract_network
from x2v_jax.parallel import Mesh

from .loop import optimizer_of
from .lora import init_lora
from .state import init_state

if TYPE_CHECKING:
    from .tasks.distillation import Distillation

# Arrays of [tokens, dim] that a gradient keeps of a block when it keeps all, counted on compiled programs' buffers.
_KEPT_OF_A_BLOCK = 18


def describe(config: Any, task: "Distillation") -> str:
    """The resolved config, the parameters of every role, and bytes a device, as text.

    Raises:
        UserError: a batch that does not split over the devices.
    """
    mesh = Mesh.of(config.devices or None)
    for phase in config.phases:
        mesh.check_batch(phase.batch_size, config.accumulate)
    sizes: WanConfig = task.model_config
    shapes = abstract_network(sizes)[1]
    teacher = abstract_network(task.teacher.config("transformer"))[1]
    lora = task.lora
    trained: Any = {"generator": shapes}
    if lora is not None:
        trained["generator"] = jax.eval_shape(lambda key: init_lora(shapes, lora, key), jax.random.key(0))
    frozen = {"student": (shapes, config.dtype)} if lora is not None else {}
    if "critic" in task.roles:
        trained["critic"] = teacher
        frozen["teacher"] = (teacher, config.teacher_dtype)
    optimizers = {role: optimizer_of(config, role, config.phases[0]) for role in task.roles}
    state = jax.eval_shape(lambda params: init_state(params, optimizers, task.averaged), trained)
    gradients = max(parameter_count(trained[role]) for role in task.roles) * 4
    parts = {
        "weights, optimizers and average": _bytes(state) / mesh.size,
        "gradients": gradients / mesh.size,
        "frozen networks": sum(_bytes(tree, dtype) for tree, dtype in frozen.values()) / mesh.size,
        "activations (estimate)": _activations(task, sizes, config, mesh),
    }
    lines = [json.dumps(json.loads(config.to_json_best_effort()), indent=1), ""]
    lines += [f"{role}: {parameter_count(tree):,} trained parameters" for role, tree in trained.items()]
    lines += [f"{name}: {parameter_count(tree):,} frozen parameters, {dtype}" for name, (tree, dtype) in frozen.items()]
    lines += ["", f"memory of each of {mesh.size} device(s):"]
    lines += [f"  {name:34s} {size / 1e9:9.2f} GB" for name, size in parts.items()]
    lines += [f"  {'in all':34s} {sum(parts.values()) / 1e9:9.2f} GB"]
    return "\n".join(lines)


def _bytes(tree: Any, dtype: str | None = None) -> float:
    size = lambda leaf: leaf.size * jnp.dtype(dtype or leaf.dtype).itemsize  # noqa: E731
    return float(sum(size(leaf) for leaf in jax.tree.leaves(tree)))


def _activations(task: "Distillation", sizes: WanConfig, config: Any, mesh: Mesh) -> float:
    """Of one backward pass through the network: what every block keeps, and what one block takes while it is redone."""
    frames, height, width, _ = task.shape
    if task.is_causal and hasattr(task.rollout, "sigmas") and config.task == "dmd":
        frames = config.causal.block
    tokens = frames * height * width // math.prod(sizes.patch_size)
    samples = max(phase.batch_size for phase in config.phases) / config.accumulate / mesh.size
    item = jnp.dtype(config.dtype).itemsize
    whole = tokens * (_KEPT_OF_A_BLOCK * sizes.dim + 2 * sizes.ffn_dim) * item
    kept = {
        "none": whole,
        "attention": tokens * sizes.dim * (4 + 2 * item),
        "block": tokens * sizes.dim * 4,
    }[config.remat]
    return samples * (sizes.num_layers * kept + whole)
