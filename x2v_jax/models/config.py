"""Sizes of the networks: frozen dataclasses with the published presets. No jax import, so error messages come fast."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

from x2v_jax.errors import UserError


class _FromDict:
    """Reads and writes the dataclass as plain JSON values."""

    _ALIASES: Mapping[str, str] = {}
    _NAME: str  # what a user calls it: as model.json does

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Builds the config from JSON values. Unknown keys are ignored: published config.json files carry many others.

        Raises:
            UserError: a required size is missing.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        known = {}
        for key, value in values.items():
            name = cls._ALIASES.get(key, key)
            if name in fields:
                known[name] = tuple(value) if isinstance(value, list) else value
        missing = [n for n, f in fields.items() if n not in known and f.default is dataclasses.MISSING]
        if missing:
            raise UserError(f"{cls._NAME}: {', '.join(missing)} missing; add it to the checkpoint's config.json")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


# Negative prompts that may be given by name. wan: what Wan2.1's own scripts put against the prompt when guidance is on
# and the user gives nothing.
NEGATIVE_PROMPTS = {
    "wan": (
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
        "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
        "杂乱的背景，三条腿，背景人很多，倒着走"
    ),
}


@dataclasses.dataclass(frozen=True)
class WanConfig(_FromDict):
    """Wan2.1 diffusion transformer (names as in the official config.json)."""

    _NAME = "transformer"

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    model_type: Literal["t2v", "i2v"] = "t2v"
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    clip_dim: int = 1280
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def __post_init__(self):
        if self.model_type not in ("t2v", "i2v"):
            raise UserError(f"model_type is {self.model_type!r}; this project runs 't2v' and 'i2v'")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UserError(f"dim {self.dim} does not split into {self.num_heads} heads of even size; mend num_heads")

    @classmethod
    def t2v_1_3b(cls) -> Self:
        return cls(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)

    @classmethod
    def t2v_14b(cls) -> Self:
        return cls(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

    @classmethod
    def i2v_14b(cls) -> Self:
        return cls(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, model_type="i2v", in_dim=36)


# Channels in, channels out -> relatives of Wan2.1 that have the same layers, by whether they have those for CLIP.
_RELATIVES = {
    (36, 16, False): "Wan2.2 I2V-A14B, one of its two experts",
    (48, 48, False): "Wan2.2 TI2V-5B",
    (100, 48, False): "Wan2.2 Fun-5B-Control",
    (52, 16, False): "Wan2.2 Fun-A14B-Control, one of its two experts",
    (48, 16, False): "Fun-Control",
    (48, 16, True): "Wan2.1 Fun-Control",
    (52, 16, True): "Wan2.1 Fun-Control",
    (32, 16, True): "Wan2.1 Fun-Control-Camera",
}


def relative_by_channels(in_dim: int, out_dim: int, *, image: bool) -> str | None:
    """The name of a model with Wan2.1's layers and other channels; None for Wan2.1 T2V and I2V.

    >>> relative_by_channels(48, 48, image=False)
    'Wan2.2 TI2V-5B'

    Args:
        in_dim, out_dim: channels that the transformer takes and gives.
        image: whether it has layers for CLIP's features, as Wan2.1 I2V does.
    """
    if known := _RELATIVES.get((in_dim, out_dim, image)):
        return known
    # I2V: the noise; a mask, one a frame of the latent frame's four; the first frame.
    if in_dim == (2 * out_dim + 4 if image else out_dim):
        return None
    return f"a relative of Wan2.1 {'I2V' if image else 'T2V'} that takes {in_dim} channels and gives {out_dim}"


_WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def is_published_size(config: WanConfig) -> bool:
    """Whether a transformer has the width and depth of a published one, 1.3B or 14B."""
    return (config.dim, config.num_layers) in ((1536, 30), (5120, 40))


@dataclasses.dataclass(frozen=True)
class VaeConfig(_FromDict):
    """Wan2.1 causal 3-D VAE. Defaults are the published one: stride (4, 8, 8), 16 latent channels."""

    _NAME = "vae"

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = _WAN_LATENTS_STD

    # The published code and diffusers both misspell this key.
    _ALIASES = {"temperal_downsample": "temporal_downsample", "base_dim": "dim"}  # noqa: RUF012

    @property
    def spatial_stride(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)


@dataclasses.dataclass(frozen=True)
class Umt5Config(_FromDict):
    """UMT5 encoder. Defaults are UMT5-XXL's."""

    _NAME = "text_encoder"

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    _ALIASES = {"vocab": "vocab_size"}  # noqa: RUF012


@dataclasses.dataclass(frozen=True)
class ClipConfig(_FromDict):
    """CLIP visual tower. Defaults are ViT-H/14's. Wan uses the features after all blocks but the last."""

    _NAME = "image_encoder"

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    mlp_ratio: int = 4
    num_heads: int = 16
    num_layers: int = 32
    out_dim: int = 1024
    eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class CausalSchedule(_FromDict):
    """How a causal checkpoint goes from block to block. Counts are of latent frames; see `rollout_plan.RolloutPlan`.

    block: frames made together. window: the trained horizon, and what the cache holds. mode: how a longer video is made
    unless the request says otherwise. context_timestep: of a finished block's cache update; None for no update.
    """

    _NAME = "causal"

    block: int = 3
    window: int = 21
    sink: int = 0
    mode: Literal["full", "sliding", "fragments"] = "sliding"
    positions: Literal["relative", "absolute"] = "relative"
    context_timestep: float | None = 0.0
    independent_first_frame: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule(_FromDict):
    """How a checkpoint is meant to be sampled. It travels in model.json: other settings give poor video and no error.

    sampler: "unipc" (order 2, with guidance) or "step_distill" (x0, then noise again; no guidance).
    denoising_step_list: the trained timesteps of a distilled model, in 1..1000, falling; None for "unipc".
    warp_denoising_step: whether the list is still to be warped by `shift` (CausVid's lists already are).
    levels: how a list that is not warped becomes noise levels. "exact": sigma = t / 1000. "table": the nearest of the
        1000 levels of the shifted schedule, while the network is asked at t (Self-Forcing, FastVideo).
    height, width, num_frames: the trained size in pixels and frames; fps: frames a second.
    causal: for models that make a video block by block; None for those that make it whole.
    """

    _NAME = "schedule"

    sampler: Literal["unipc", "step_distill"] = "unipc"
    num_inference_steps: int = 50
    shift: float = 5.0
    guidance_scale: float = 5.0
    denoising_step_list: tuple[int, ...] | None = None
    warp_denoising_step: bool = True
    levels: Literal["exact", "table"] = "exact"
    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: int = 16
    negative_prompt: str = ""
    causal: CausalSchedule | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        causal = values.get("causal")
        if isinstance(causal, Mapping):
            values = {**values, "causal": CausalSchedule.from_dict(causal)}
        return super().from_dict(values)

    @property
    def is_distilled(self) -> bool:
        return self.denoising_step_list is not None


VARIANTS = ("base", "distill", "causvid", "self_forcing")

Config = WanConfig | VaeConfig | Umt5Config | ClipConfig

# The networks of a checkpoint, as model.json names them, and what says their sizes.
COMPONENTS = ("transformer", "vae", "text_encoder", "image_encoder")
CONFIGS = {"transformer": WanConfig, "vae": VaeConfig, "text_encoder": Umt5Config, "image_encoder": ClipConfig}

# 8-bit types of weights, as model.json names them, and the networks whose blocks' matrices can be so.
QUANTIZATIONS = ("int8", "float8_e4m3fn")
QUANTIZABLE = ("transformer", "text_encoder", "image_encoder")
