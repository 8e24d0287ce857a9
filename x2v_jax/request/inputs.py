"""The files that requests name, opened once a run and shared. No jax import."""

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from jaxtyping import Float, UInt8

from x2v_jax.diffusion import image_condition
from x2v_jax.diffusion.rollout_plan import RolloutPlan
from x2v_jax.errors import UserError
from x2v_jax.media.image import load_image
from x2v_jax.media.tensor_files import BlockNoise, checked_noise, read_noise, read_text_embeddings
from x2v_jax.request import earlier_video
from x2v_jax.request.request import File, Model, Request

_KEPT = 8  # a request names at most four files, some of which are needed in two forms


class InputFiles:
    """What files hold, each read and decoded once however many requests name it.

    The latest few are kept: a thousand prompts with one picture hold it once, and a thousand pictures are not all in
    memory. A file that has changed on disk is read again.
    """

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, object] = OrderedDict()

    def once[T](self, path: File, form: Hashable, read: Callable[[], T]) -> T:
        """`read()`, or what it gave before for the same file.

        Args:
            form: tells apart what is made of one file.
        """
        try:
            about = os.stat(path)
        except OSError:
            return read()  # which says in its own words what is wrong
        key = (os.path.abspath(path), about.st_mtime_ns, about.st_size, form)
        if key not in self._found:
            self._found[key] = read()
        self._found.move_to_end(key)
        while len(self._found) > _KEPT:
            self._found.popitem(last=False)
        return self._found[key]  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """What a block-by-block video starts from. Counts are of latent frames.

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
    picture: UInt8[np.ndarray, "H W 3"] | None
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


class Inputs:
    """The files of one request, each opened when it is first asked for.

    Args:
        request: names them.
        size: height and width of the video in pixels; for image-to-video their product counts.
        model: the checkpoint that they have to fit.
        files: shared with other requests.
        allow_mismatch: take latents of another transformer.
    """

    def __init__(self, request: Request, size: tuple[int, int], model: Model, files: InputFiles, allow_mismatch: bool):
        self._image, self._text, self._noise = request.image, request.text_embeddings, request.initial_noise
        self._earlier, self._is_exact = request.continue_from, request.size_rule == "exact"
        self._size, self._model, self._files, self._allow_mismatch = size, model, files, allow_mismatch

    @property
    def replaces_text_encoder(self) -> bool:
        return self._text is not None

    @property
    def encoded_frames_from(self) -> str:
        """Which file the VAE encodes before a block-by-block video: "image", "video" or ""."""
        if self._image is not None:
            return "image"
        is_video = self._earlier is not None and not earlier_video.holds_latents(self._earlier)
        return "video" if is_video else ""

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        """The image as it is, or where the size is to be exact, cut to that.

        Raises:
            UserError: it cannot be read.
        """
        return self._fitted() if self._is_exact and self._model.task == "i2v" else self._opened()

    def _opened(self) -> UInt8[np.ndarray, "H W 3"]:
        if isinstance(self._image, str | os.PathLike):
            path = self._image
            return self._files.once(path, "picture", lambda: load_image(path))
        return load_image(self._image)

    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents: of image-to-video from the picture, see `image_condition.latent_size`.

        Raises:
            UserError: the picture cannot be read, or is too long for the area.
        """
        height, width = self._size
        stride = self._model.config("vae").spatial_stride
        if self._model.task != "i2v" or self._is_exact:
            return height // stride, width // stride
        rows, columns, _ = self.picture().shape
        patch_size = self._model.config("transformer").patch_size
        return image_condition.latent_size(rows, columns, height * width, spatial_stride=stride, patch_size=patch_size)

    def text(self) -> dict[str, Float[np.ndarray, "l d"]]:
        """`text` and perhaps `negative_text` of the file, nothing without one; see `read_text_embeddings`."""
        path, sizes = self._text, self._model.config("transformer")
        if path is None:
            return {}
        form = ("text", sizes.text_len, sizes.text_dim)
        return self._files.once(path, form, lambda: read_text_embeddings(path, sizes.text_len, sizes.text_dim))

    def noise(
        self, shape: tuple[int, int, int, int], num_steps: int | None
    ) -> tuple[Float[np.ndarray, "f h w c"], Float[np.ndarray, "s f h w c"] | None] | None:
        """What the file of noise holds, None without one; see `read_noise`."""
        path = self._noise
        if path is None:
            return None
        if isinstance(path, np.ndarray):
            return checked_noise(path, shape), None
        return self._files.once(path, ("noise", shape, num_steps), lambda: read_noise(path, shape, num_steps))

    def blocks(self, plan: RolloutPlan, latent_frames: int) -> BlockInputs:
        """What a block-by-block video starts from.

        Args:
            latent_frames: of the video; 0: endless.

        Raises:
            UserError: a file does not fit the checkpoint or the size, or is damaged.
        """
        vae = self._model.config("vae")
        (height, width), (rows, columns) = self._size, self.latent_size()
        model_file = self._model.path / "model.json"
        fingerprint = self._files.once(model_file, "fingerprint", lambda: earlier_video.fingerprint(self._model))
        header = earlier_video.header(fingerprint, plan, height, width)
        picture = earlier = None
        given, new = 0, latent_frames
        if self._image is not None:
            picture = self._fitted()
            given = 1 if plan.independent_first_frame else plan.block
            new -= given
        elif self._earlier is not None:
            earlier = self._opened_earlier(self._earlier, plan, header)
            given = earlier_video.given_frames(plan, earlier.available, latent_frames or None)
        inputs = BlockInputs(
            plan, (rows, columns), picture, earlier, given, given + new if latent_frames else None, None, header
        )
        path, count = self._noise, inputs.num_blocks
        if isinstance(path, np.ndarray):
            raise UserError("initial_noise is an array; a video that is made block by block takes a file of noise")
        if path is None or count is None:
            return inputs
        shape = (plan.block, rows, columns, vae.z_dim)
        form = ("block noise", count, shape, plan.num_steps)
        noise = self._files.once(path, form, lambda: BlockNoise(path, count, shape, plan.num_steps))
        return dataclasses.replace(inputs, noise=noise)

    def _fitted(self) -> UInt8[np.ndarray, "H W 3"]:
        height, width = self._size
        if isinstance(self._image, str | os.PathLike):
            return self._files.once(self._image, ("fitted", height, width), lambda: fit(self._opened(), height, width))
        return fit(self._opened(), height, width)

    def _opened_earlier(self, path: File, plan: RolloutPlan, header: dict[str, str]) -> earlier_video.EarlierVideo:
        form = ("earlier", plan, tuple(header.items()), self._allow_mismatch)
        vae, anyway = self._model.config("vae"), self._allow_mismatch
        return self._files.once(path, form, lambda: earlier_video.read(path, plan, vae, header, allow_mismatch=anyway))


def fit(picture: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Scales a picture until it fills height x width, and cuts off what sticks out, the same on both sides."""
    from PIL import Image, ImageOps

    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.LANCZOS))
