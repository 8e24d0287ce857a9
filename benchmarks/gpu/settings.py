"""What a measurement is asked for, and the sizes of networks and videos that are measured. No jax import."""

import dataclasses
import pathlib
import time

from x2v_jax.models.config import ClipConfig, Umt5Config, VaeConfig, WanConfig

STEP_LIST, SHIFT = (1000, 750, 500, 250), 5.0

_TINY_VAE = VaeConfig(dim=4, dim_mult=(1, 1, 1, 2), num_res_blocks=1)
_TINY_TEXT = Umt5Config(vocab_size=64, dim=24, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1, num_buckets=8)
_TINY_CLIP = ClipConfig(image_size=28, dim=20, mlp_ratio=2, num_heads=2, num_layers=2, out_dim=6)
_PIXELS = {"480P": (480, 832), "720P": (720, 1280)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes:

    quick: fewer runs and only the headline shapes, so that everything together takes less than ten minutes.
    tiny: networks and shapes that a CPU runs in seconds, to try the programs out; such numbers say nothing.
    seed: of weights and inputs. What is reported as correct was so on this data.
    out: folder of the reports.
    profile: record one run of each model with the profiler.
    deadline: time.monotonic() after which no further case is begun; None: no limit.
    """

    out: pathlib.Path
    quick: bool = False
    tiny: bool = False
    seed: int = 0
    profile: bool = False
    deadline: float | None = None

    @property
    def rounds(self) -> int:
        """Samples of a time."""
        return 3 if self.tiny else 5 if self.quick else 15

    @property
    def sample_seconds(self) -> float:
        """How long a sample lasts at least: short kernels are called several times in it."""
        return 0.0 if self.tiny else 0.02 if self.quick else 0.1

    def time_is_up(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclasses.dataclass(frozen=True)
class Models:
    """All networks of a model, and the video that it makes."""

    transformer: WanConfig
    height: int
    width: int
    frames: int = 81
    vae: VaeConfig = dataclasses.field(default_factory=VaeConfig)
    text: Umt5Config = dataclasses.field(default_factory=Umt5Config)
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        stride = self.vae.spatial_stride
        return (self.frames - 1) // self.vae.temporal_stride + 1, self.height // stride, self.width // stride


def models(name: str, size: str, settings: Settings) -> Models:
    """name: "T2V-1.3B", "T2V-14B" or "I2V-14B"; size: "480P" or "720P"."""
    if settings.tiny:
        i2v = {"model_type": "i2v", "in_dim": 36, "clip_dim": 20} if name.startswith("I2V") else {}
        tiny = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=24, freq_dim=16, text_len=12, **i2v)  # pyright: ignore[reportArgumentType]
        return Models(tiny, 32, 48, 9, _TINY_VAE, _TINY_TEXT, _TINY_CLIP)
    presets = {"T2V-1.3B": WanConfig.t2v_1_3b, "T2V-14B": WanConfig.t2v_14b, "I2V-14B": WanConfig.i2v_14b}
    return Models(presets[name](), *_PIXELS[size])
