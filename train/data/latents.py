"""Videos as normalised VAE latents with their captions, made once."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Float

from x2v_jax.errors import UserError

from .cache import Cache, CacheWriter
from .cache_format import DTYPES, Plan, TensorSpec, fingerprint, require_same, rows_for
from .clips import read_clip
from .items import CaptionedFile

if TYPE_CHECKING:
    from x2v_jax.checkpoint.native.reader import NativeCheckpoint
    from x2v_jax.models.config import VaeConfig

Progress = Callable[[int, int], None]
LatentSize = tuple[int, int, int, int]


class LatentCache:
    """Latents of videos and their captions.

    Attributes:
        path: the folder.
        captions: by row.
        latent_size: frames, height, width and channels of each.
    """

    def __init__(self, cache: Cache):
        """See `open`."""
        self._cache = cache
        self.path = cache.path
        self.captions: list[str] = [item["text"] for item in cache.items]
        f, h, w, c = cache.tensors["latents"].shape
        self.latent_size: LatentSize = (f, h, w, c)

    @classmethod
    def open(cls, path: str | os.PathLike[str], latent_size: Sequence[int] | None = None) -> Self:
        """Opens what `python -m train.prepare videos` or `lmdb` made.

        Args:
            latent_size: what the trainer needs; None takes any.

        Raises:
            UserError: no such cache, not complete or damaged, or latents of another size.
        """
        cache = cls(Cache.open(path, "latents"))
        require_latent_size(str(path), cache.latent_size, latent_size)
        return cache

    def __len__(self) -> int:
        return len(self._cache)

    def latents(self, rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "n f h w c"]:
        """float32 [n, f, h, w, C].

        Raises:
            IndexError: there is no such row.
            UserError: a shard is missing or damaged.
        """
        return self._cache.gather("latents", rows).astype(np.float32)

    def require(self, checkpoint: "NativeCheckpoint") -> None:
        """Refuses to be used with a checkpoint of another VAE. Imported latents do not say whose they are.

        Raises:
            UserError: it has another.
        """
        recorded = self._cache.settings.get("vae")
        if recorded is not None and checkpoint.has("vae"):
            require_same(str(self.path), recorded, checkpoint, "vae", "videos")


def require_latent_size(where: str, found: Sequence[int], wanted: Sequence[int] | None) -> None:
    """Refuses latents of another size than a trainer needs.

    Raises:
        UserError: the sizes differ; the message names both.
    """
    if wanted is not None and tuple(found) != tuple(wanted):
        raise UserError(
            f"{where} has latents of {_text(found)} (frames x height x width x channels), and this training needs "
            f"{_text(wanted)}; prepare the data at that size, or train at the data's"
        )


def _text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def latent_size_of(vae: "VaeConfig", *, height: int, width: int, num_frames: int) -> LatentSize:
    """Frames, height, width and channels of the latents of a video.

    Raises:
        UserError: the VAE cannot encode a video of this size.
    """
    if num_frames < 1 or (num_frames - 1) % vae.temporal_stride:
        nearest = max(0, round((num_frames - 1) / vae.temporal_stride)) * vae.temporal_stride + 1
        raise UserError(f"num_frames is {num_frames}; this VAE takes {vae.temporal_stride}n + 1: give {nearest}")
    for name, value in (("height", height), ("width", width)):
        if value < vae.spatial_stride or value % vae.spatial_stride:
            nearest = max(1, round(value / vae.spatial_stride)) * vae.spatial_stride
            raise UserError(f"{name} is {value}; this VAE takes multiples of {vae.spatial_stride}: give {nearest}")
    stride = vae.spatial_stride
    return (num_frames - 1) // vae.temporal_stride + 1, height // stride, width // stride, vae.z_dim


def make_latent_cache(
    path: str | os.PathLike[str],
    videos: Sequence[CaptionedFile],
    checkpoint: "NativeCheckpoint",
    *,
    height: int,
    width: int,
    num_frames: int,
    fps: float,
    dtype: str = "float16",
    skip_bad: bool = False,
    rows_per_shard: int | None = None,
    progress: Progress = lambda done, total: None,
) -> LatentCache:
    """Encodes videos, or goes on with it where it was interrupted. How a video is cut and scaled: `clips.read_clip`.

    Args:
        path: the folder to make.
        videos: `items.read_items(…, "video")`.
        checkpoint: whose VAE is used.
        height, width, num_frames, fps: of the clips, in pixels and frames a second.
        dtype: of the stored latents, "float16" or "float32".
        skip_bad: leave out videos that are too short or cannot be read, with a warning each.
        progress: called with (videos done, videos in all).

    Raises:
        UserError: a size that the VAE does not take, a video that cannot be used, or the folder holds something else.
    """
    size = latent_size_of(checkpoint.config("vae"), height=height, width=width, num_frames=num_frames)
    spec = TensorSpec(dtype, size)
    settings = {"height": height, "width": width, "num_frames": num_frames, "fps": float(fps)}
    settings |= {"vae": fingerprint(checkpoint, "vae")}
    items = [video.item() for video in videos]
    plan = Plan("latents", settings, {"latents": spec}, items, rows_per_shard or rows_for(spec.row_bytes))
    runner: Any = None

    def encode(row: int) -> dict[str, np.ndarray]:
        nonlocal runner
        clip = read_clip(videos[row].path, height=height, width=width, num_frames=num_frames, fps=fps)
        if runner is None:
            runner = make_vae_runner(checkpoint)
        video = clip[None].astype(np.float32) / 127.5 - 1.0
        return {"latents": np.asarray(runner.encode(video))[0].astype(DTYPES[dtype])}

    fill(CacheWriter(path, plan), encode, skip_bad=skip_bad, progress=progress)
    return LatentCache.open(path)


def make_vae_runner(checkpoint: "NativeCheckpoint") -> Any:
    """The VAE of a checkpoint at work."""
    from x2v_jax.generate.network import Network
    from x2v_jax.generate.vae import VaeRunner

    return VaeRunner(Network.of(checkpoint, "vae", dtype="float32"))


def fill(
    writer: CacheWriter,
    make_row: Callable[[int], dict[str, np.ndarray]],
    *,
    skip_bad: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Makes the shards that are not there yet, a row at a time, and completes the cache.

    Args:
        make_row: item number -> its tensors, in their stored types.
        skip_bad: a UserError of `make_row` leaves the item out with a warning.
    """
    plan = writer.plan
    pending = writer.pending()
    done = len(plan.items) - sum(len(plan.rows(shard)) for shard in pending)
    progress(done, len(plan.items))
    for shard in pending:
        kept: dict[int, dict[str, np.ndarray]] = {}
        for row in plan.rows(shard):
            try:
                made = make_row(row)
                for name, values in made.items():
                    if not np.isfinite(values).all():
                        raise UserError(f"{plan.items[row].get('file')}: its {name} hold NaN or infinity")
                kept[row] = made
            except UserError as error:
                if not skip_bad:
                    raise
                warnings.warn(f"left out: {error}", stacklevel=2)
            done += 1
            progress(done, len(plan.items))
        tensors = {
            name: np.stack([kept[row][name] for row in kept])
            if kept
            else np.empty((0, *spec.shape), DTYPES[spec.dtype])
            for name, spec in plan.tensors.items()
        }
        writer.write(shard, tensors, list(kept))
    writer.finish()
