"""Pictures as what image-to-video conditions on: CLIP's features and the encoded first frame, with captions."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Float

from x2v_jax.diffusion.image_condition import condition_mask
from x2v_jax.errors import UserError
from x2v_jax.media.image import load_image

from .cache import Cache, CacheWriter
from .cache_format import DTYPES, Plan, TensorSpec, fingerprint, require_same, rows_for
from .clips import crop_to_aspect
from .items import CaptionedFile
from .latents import LatentSize, Progress, fill, latent_size_of, make_vae_runner, require_latent_size

if TYPE_CHECKING:
    from x2v_jax.checkpoint.native.reader import NativeCheckpoint


class ImageCache:
    """First-frame conditions of pictures.

    Attributes:
        path: the folder.
        captions: by row.
        latent_size: frames, height, width and channels of the latents (without the mask).
    """

    def __init__(self, cache: Cache):
        """See `open`."""
        self._cache = cache
        self.path = cache.path
        self.captions: list[str] = [item["text"] for item in cache.items]
        f, h, w, c = cache.tensors["latents"].shape
        self.latent_size: LatentSize = (f, h, w, c)
        self._mask_channels: int = cache.settings["mask_channels"]

    @classmethod
    def open(cls, path: str | os.PathLike[str], latent_size: Sequence[int] | None = None) -> Self:
        """Opens what `python -m train.prepare images` made.

        Args:
            latent_size: what the trainer needs; None takes any.

        Raises:
            UserError: no such cache, not complete or damaged, or latents of another size.
        """
        cache = cls(Cache.open(path, "images"))
        require_latent_size(str(path), cache.latent_size, latent_size)
        return cache

    def __len__(self) -> int:
        return len(self._cache)

    def conditions(self, rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "n f h w c"]:
        """What goes beside the noisy latents: float32 [n, f, h, w, 4 + C], the mask and then the first frame's latents.

        Raises:
            IndexError: there is no such row.
            UserError: a shard is missing or damaged.
        """
        latents = self._cache.gather("latents", rows).astype(np.float32)
        mask = condition_mask(*self.latent_size[:3], channels=self._mask_channels)
        return np.concatenate([np.broadcast_to(mask, (len(latents), *mask.shape)), latents], axis=-1)

    def features(self, rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "n t d"]:
        """CLIP's features, float32 [n, 1 + N, D].

        Raises:
            IndexError: there is no such row.
            UserError: a shard is missing or damaged.
        """
        return self._cache.gather("features", rows).astype(np.float32)

    def require(self, checkpoint: "NativeCheckpoint") -> None:
        """Refuses to be used with a checkpoint of another VAE or image encoder.

        Raises:
            UserError: it has another.
        """
        for component in ("vae", "image_encoder"):
            if checkpoint.has(component):
                recorded = self._cache.settings[component]
                require_same(str(self.path), recorded, checkpoint, component, "images")


def make_image_cache(
    path: str | os.PathLike[str],
    images: Sequence[CaptionedFile],
    checkpoint: "NativeCheckpoint",
    *,
    height: int,
    width: int,
    num_frames: int,
    dtype: str = "float16",
    compute: str = "bfloat16",
    skip_bad: bool = False,
    rows_per_shard: int | None = None,
    progress: Progress = lambda done, total: None,
) -> ImageCache:
    """Encodes pictures, or goes on with it where it was interrupted.

    A picture is cut to the aspect ratio height : width around its middle; then it goes the way of `python -m infer`,
    which also shows CLIP exactly what the first frame shows.

    Args:
        path: the folder to make.
        images: `items.read_items(…, "image")`.
        checkpoint: whose VAE and image encoder are used.
        height, width, num_frames: of the videos to be made from them.
        dtype: of what is stored, "float16" or "float32".
        compute: of the image encoder's matmuls.
        skip_bad: leave out files that are no pictures, with a warning each.
        progress: called with (pictures done, pictures in all).

    Raises:
        UserError: the checkpoint has no image encoder, a size that the VAE does not take, a file that is no picture.
    """
    if not checkpoint.has("image_encoder"):
        raise UserError(f"{checkpoint.path} has no image encoder; give the checkpoint of an image-to-video model")
    vae, clip = checkpoint.config("vae"), checkpoint.config("image_encoder")
    size = latent_size_of(vae, height=height, width=width, num_frames=num_frames)
    tokens = (clip.image_size // clip.patch_size) ** 2 + 1
    specs = {"latents": TensorSpec(dtype, size), "features": TensorSpec(dtype, (tokens, clip.dim))}
    settings = {"height": height, "width": width, "num_frames": num_frames, "mask_channels": vae.temporal_stride}
    settings |= {"compute": compute}
    settings |= {component: fingerprint(checkpoint, component) for component in ("vae", "image_encoder")}
    per_shard = rows_per_shard or rows_for(sum(spec.row_bytes for spec in specs.values()))
    plan = Plan("images", settings, specs, [image.item() for image in images], per_shard)
    conditioner: Any = None

    def encode(row: int) -> dict[str, np.ndarray]:
        nonlocal conditioner
        from x2v_jax.generate.clock import Clock

        picture = crop_to_aspect(load_image(images[row].path), height, width)
        if conditioner is None:
            conditioner = _conditioner(checkpoint, compute)
        features, condition = conditioner(picture, (num_frames, height, width), Clock())
        stored = DTYPES[dtype]
        latents = np.asarray(condition)[0, ..., vae.temporal_stride :]  # the mask is the same for all
        return {"latents": latents.astype(stored), "features": np.asarray(features)[0].astype(stored)}

    fill(CacheWriter(path, plan), encode, skip_bad=skip_bad, progress=progress)
    return ImageCache.open(path)


def _conditioner(checkpoint: "NativeCheckpoint", compute: str) -> Any:
    from x2v_jax.generate.image import ImageConditioner
    from x2v_jax.generate.network import Network

    clip = Network.of(checkpoint, "image_encoder", dtype=compute)
    return ImageConditioner(clip, make_vae_runner(checkpoint))
