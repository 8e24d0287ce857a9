"""Where a block-by-block video goes on from: the end of an earlier one, as latents or as frames. No jax import."""

import dataclasses
import hashlib
import json
import os
from collections import deque
from collections.abc import Mapping

import einops
import numpy as np
from jaxtyping import Float, UInt8

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.safetensors import read_metadata, read_safetensors
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.media.frames import NoVideoStream, decoded_frames
from x2v_jax.media.tensor_files import holds_latents
from x2v_jax.models.config import VaeConfig
from x2v_jax.models.vae_pieces import decoder_reach
from x2v_jax.request.request import File, Model

_FORMAT = "x2v-jax block-by-block latents"
_SAMPLES, _SAMPLE_BYTES = 32, 16 << 10


@dataclasses.dataclass(frozen=True)
class EarlierVideo:
    """The end of an earlier video.

    tail: latents, float32 [f, h, w, C], or frames that the VAE is still to encode, uint8 [4n+1, H, W, 3].
    available: so many latent frames it is.
    num_blocks: how many blocks there were before the new one, which numbers the noise.
    """

    tail: Float[np.ndarray, "f h w c"] | UInt8[np.ndarray, "F H W 3"]
    available: int
    num_blocks: int

    @property
    def is_encoded(self) -> bool:
        return self.tail.dtype == np.float32


def header(model: str, plan: RolloutPlan, height: int, width: int) -> dict[str, str]:
    """What a file of latents says about where it comes from; a run adds `blocks`, how many were made so far.

    Args:
        model: its `fingerprint`.
        height, width: of the video in pixels.
    """
    rollout = dataclasses.asdict(plan)
    del rollout["sigmas"]
    return {
        "format": _FORMAT,
        "model": model,
        "height": str(height),
        "width": str(width),
        "block": str(plan.block),
        "schedule": json.dumps(rollout),
    }


def fingerprint(model: Model) -> str:
    """Tells checkpoints apart by sizes, structure and samples of the weights of transformer and VAE; milliseconds."""
    digest = hashlib.sha256()
    configs = {"transformer": model.config("transformer"), "vae": model.config("vae")}
    for component, config in configs.items():
        digest.update(json.dumps({component: config.to_dict()}, sort_keys=True, default=list).encode())
        for path in model.files(component):
            size = path.stat().st_size
            digest.update(str(size).encode())
            with path.open("rb") as file:
                for i in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def given_frames(plan: RolloutPlan, available: int, wanted: int | None) -> int:
    """How many of the last latent frames of a video fill the cache before the next block is made.

    As many whole blocks as fit the window beside a new one. Mode "full" must have room for all `wanted` new frames, and
    "fragments" goes on as it does from one fragment to the next, with one block.
    """
    first = 1 if plan.independent_first_frame else 0
    room = plan.window - plan.block
    if plan.mode == "fragments":
        room = plan.block
    elif plan.mode == "full" and wanted is not None:
        room = plan.window - wanted
    return first + max(0, min(room, available) - first) // plan.block * plan.block


def tail_frames(plan: RolloutPlan, vae: VaeConfig) -> int:
    """Latent frames of an earlier video that can matter: the network's window, and what the VAE's decoder recalls."""
    return max(plan.window - plan.block, decoder_reach(vae) + 1)


def read(
    path: str | os.PathLike[str],
    plan: RolloutPlan,
    vae: VaeConfig,
    expected: Mapping[str, str],
    *,
    allow_mismatch: bool = False,
) -> EarlierVideo:
    """The end of an earlier video, as much of it as can matter.

    Args:
        path: a .safetensors file of `save_latents`, or a video.
        expected: the `header` of the run that goes on from it.
        allow_mismatch: take latents of another transformer.

    Raises:
        UserError: it is neither, of another model or size, too short, or damaged.
    """
    count = tail_frames(plan, vae)
    if holds_latents(path):
        earlier = _from_latents(path, count, vae, expected, allow_mismatch)
    else:
        earlier = _from_video(path, count, plan, vae, expected)
    least = 1 if plan.independent_first_frame else plan.block
    if earlier.available < least:
        raise UserError(
            f"continue_from: {path} has {earlier.available} latent frames, less than one block of {least}; give a "
            "longer video"
        )
    return earlier


def _from_latents(
    path: File, count: int, vae: VaeConfig, expected: Mapping[str, str], allow_mismatch: bool
) -> EarlierVideo:
    try:
        found, tensors = read_metadata(path), read_safetensors(path)
    except UserError as error:
        raise UserError(f"continue_from: {error}") from None
    if found.get("format") != _FORMAT or "latents" not in tensors or not found.get("blocks", "").isdecimal():
        raise UserError(
            f"continue_from: {path} was not written by save_latents of a block-by-block run; give such a file, or the "
            "video itself as mp4"
        )
    size, wanted = [f"{h.get('height')}x{h.get('width')}" for h in (found, expected)]
    if size != wanted:
        raise UserError(
            f"continue_from: {path} holds a video of {size} and this one would be {wanted}; set height to "
            f"{found.get('height')} and width to {found.get('width')}"
        )
    if found.get("model") != expected["model"] and not allow_mismatch:
        raise UserError(
            f"continue_from: the latents of {path} are another model's; use the checkpoint that made them, give the "
            "video itself as mp4, or set allow_mismatch to true"
        )
    shape = (vae.z_dim, *(int(expected[name]) // vae.spatial_stride for name in ("height", "width")))
    parts = [_channels_last(path, name, tensors[name], shape) for name in ("context", "latents") if name in tensors]
    tail = np.ascontiguousarray(np.concatenate([part[-count:] for part in parts])[-count:], np.float32)
    if not np.isfinite(tail).all():
        raise UserError(f"continue_from: {path} holds NaN or infinity; give another file")
    return EarlierVideo(tail, len(tail), int(found["blocks"]))


def _channels_last(path: object, name: str, tensor: LazyTensor, shape: tuple[int, ...]) -> np.ndarray:
    """A view of [C, F, h, w] as [F, h, w, C]."""
    found = tensor.shape
    if len(found) != 4 or (found[0], *found[2:]) != shape:
        raise UserError(
            f"continue_from: {name} of {path} is {list(found)}; this model needs "
            f"[{shape[0]}, F, {shape[1]}, {shape[2]}]"
        )
    return einops.rearrange(tensor.read(), "c f h w -> f h w c")


def _from_video(path: File, count: int, plan: RolloutPlan, vae: VaeConfig, expected: Mapping[str, str]) -> EarlierVideo:
    stride = vae.temporal_stride
    frames, total = _last_frames(path, stride * (count - 1) + 1)
    height, width = frames.shape[1:3]
    if (str(height), str(width)) != (expected["height"], expected["width"]):
        raise UserError(
            f"continue_from: {path} is {height}x{width} and this video would be {expected['height']}x"
            f"{expected['width']}; set height to {height} and width to {width}, or scale the file first"
        )
    latents = (len(frames) - 1) // stride + 1
    # Counted from the end, so that the frames fall into the latent frames that they came from.
    frames = frames[len(frames) - (stride * (latents - 1) + 1) :]
    return EarlierVideo(frames, latents, ((total - 1) // stride + 1) // plan.block)


def _last_frames(path: File, count: int) -> tuple[np.ndarray, int]:
    """(the last frames of a video, uint8 [at most count, H, W, 3]; how many it has)."""
    last: deque[np.ndarray] = deque(maxlen=count)
    total = 0
    try:
        for frame in decoded_frames(path):
            last.append(frame)
            total += 1
    except NoVideoStream:
        pass  # said below, as of a stream without frames
    except OSError as error:
        raise UserError(
            f"continue_from: {path} cannot be read as a video ({error.strerror}); give an mp4, or a .safetensors file "
            "of save_latents"
        ) from None
    if not last:
        raise UserError(f"continue_from: {path} holds no video; give an mp4, or a .safetensors file of save_latents")
    return np.stack(last), total
