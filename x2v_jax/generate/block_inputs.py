"""The files that a block-by-block request names, read and checked before anything is loaded. No jax import."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.generate import earlier_video
from x2v_jax.media.image import load_image
from x2v_jax.media.tensor_files import BlockNoise
from x2v_jax.request import causal as request_rollout

if TYPE_CHECKING:
    from x2v_jax.checkpoint.native.reader import NativeCheckpoint
    from x2v_jax.request import Request


@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """What a block-by-block video starts from. Counts are of latent frames.

    plan: the order of work.
    latent_size: rows and columns.
    picture: uint8 [H, W, 3] of the video's size, its first frame; None without.
    earlier: the end of the video that it continues; None without.
    given: how many frames the network is given, of the picture or the earlier video.
    num_frames: of the rollout, those of `given` included; None: endless.
    noise: from a file; None: from the seed.
    header: what a file of its latents says about them, but `blocks`.
    """

    plan: RolloutPlan
    latent_size: tuple[int, int]
    picture: np.ndarray | None
    earlier: earlier_video.EarlierVideo | None
    given: int
    num_frames: int | None
    noise: BlockNoise | None
    header: dict[str, str]

    @property
    def num_blocks(self) -> int | None:
        """Blocks that are made; None: endless."""
        return None if self.num_frames is None else self.blocks_of(self.num_frames) - self.blocks_of(self.given)

    def blocks_of(self, frames: int) -> int:
        """How many blocks the first frames of a rollout are."""
        alone = 1 if self.plan.independent_first_frame and frames else 0
        return alone + (frames - alone) // self.plan.block


def read_inputs(request: "Request", checkpoint: "NativeCheckpoint", *, allow_mismatch: bool = False) -> BlockInputs:
    """Reads what a resolved request names.

    Raises:
        UserError: a file does not fit the checkpoint or the size, or is damaged.
    """
    causal = checkpoint.schedule.causal
    if causal is None:
        raise UserError(f"{checkpoint.path} does not make videos block by block; use a causal checkpoint")
    assert request.height and request.width  # resolved
    plan = request_rollout.rollout_plan(request, causal)
    vae = checkpoint.config("vae")
    header = earlier_video.header(checkpoint, plan, request.height, request.width)
    new = request_rollout.new_latent_frames(request, checkpoint)
    picture = earlier = None
    given = 0
    if request.image is not None:
        picture = fit(load_image(request.image), request.height, request.width)
        given = 1 if plan.independent_first_frame else plan.block
        new = None if new is None else new - given
    elif request.continue_from is not None:
        earlier = earlier_video.read(request.continue_from, plan, vae, header, allow_mismatch=allow_mismatch)
        given = earlier_video.given_frames(plan, earlier.available, new)
    latent_size = request.height // vae.spatial_stride, request.width // vae.spatial_stride
    total = None if new is None else given + new
    inputs = BlockInputs(plan, latent_size, picture, earlier, given, total, None, header)
    if request.initial_noise is None:
        return inputs
    assert inputs.num_blocks is not None  # resolved: not endless
    shape = (plan.block, *latent_size, vae.z_dim)
    noise = BlockNoise(request.initial_noise, inputs.num_blocks, shape, plan.num_steps)
    return dataclasses.replace(inputs, noise=noise)


def fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales a picture until it fills height x width, and cuts off what sticks out, the same on both sides."""
    from PIL import Image, ImageOps

    if picture.shape[:2] == (height, width):
        return picture
    image: Any = Image.fromarray(picture)
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
