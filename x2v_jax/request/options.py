"""How a pipeline runs, apart from what a request asks for. Checked without jax."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Self, TypedDict, cast, get_args

import numpy as np
from numpy.typing import DTypeLike

from x2v_jax.diffusion.schedules import Loop
from x2v_jax.errors import UserError, did_you_mean, is_number
from x2v_jax.ops.choice import CHOICES, OpChoice
from x2v_jax.request.diffusers_names import OPTIONS

DTYPES = ("bfloat16", "float32")
OFFLOADS = ("none", "blocks")
DECODE_METHODS = ("auto", "whole", "stream", "tiled")
_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": DTYPES,
    "vae_dtype": DTYPES,
    "vae_decode": DECODE_METHODS,
    "offload": OFFLOADS,
    "denoising_loop": get_args(Loop),
    **CHOICES,
}


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options of `Pipeline`.

    dtype: "bfloat16" (matmuls and weights; the rest is float32) or "float32" (everything, highest precision).
    vae_dtype: of the VAE's convolutions and weights.
    vae_decode: "auto", "whole", "stream" or "tiled"; see `generate.vae.VaeRunner`.
    keep_encoders: leave text and image encoders on the device while denoising.
    sequential_guidance: conditional and unconditional pass one after the other: slower, less memory.
    denoising_loop: without anybody who watches, the steps of a distilled model are one program, in which they are
        "unrolled" (lists of up to 16) or a "scan". The video is the same to the last digit, watched or not.
    offload: "none", or "blocks": the transformer's blocks stay in the host's memory, and each is brought to the device
        while the one before it is at work.
    memory_limit: GB (10^9 bytes) of the device's memory that a video may take by prediction; None: no limit. A request
        that needs more is refused.
    attention, attention_precision, linear, linear_activations: see `ops.choice.OpChoice`.
    allow_mismatch: accept requests that contradict the checkpoint's schedule.
    allow_partial: merge what fits of a LoRA, and only report the rest.

    Raises:
        UserError: an option has a value that it cannot have.
    """

    dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    vae_decode: str = "auto"
    keep_encoders: bool = False
    sequential_guidance: bool = False
    denoising_loop: str = "unrolled"
    offload: str = "none"
    memory_limit: float | None = None
    attention: str = "auto"
    attention_precision: str = "full"
    linear: str = "auto"
    linear_activations: str = "8bit"
    allow_mismatch: bool = False
    allow_partial: bool = False

    def __post_init__(self) -> None:
        if found := problems(dataclasses.asdict(self)):
            raise UserError("; ".join(found))

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Self:
        """Options by name; types may be given as types, such as jnp.bfloat16.

        Raises:
            UserError: an unknown option, with the nearest known one, or a value that it cannot have.
        """
        known = cls.names()
        for name in values:
            if name not in known:
                advice = OPTIONS.get(name) or did_you_mean(name, known, f"known are {', '.join(known)}")
                raise UserError(f"unknown option {name!r}; {advice}")
        named = {name: _name(value) if name.endswith("dtype") else value for name, value in values.items()}
        return cls(**named)  # type: ignore[arg-type]  # __post_init__ checks what they are

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @property
    def ops(self) -> OpChoice:
        return OpChoice(**{name: getattr(self, name) for name in CHOICES})

    @property
    def loop(self) -> Loop:
        return cast(Loop, self.denoising_loop)  # checked

    @property
    def memory_limit_bytes(self) -> int | None:
        return None if self.memory_limit is None else int(self.memory_limit * 1e9)


class OptionFields(TypedDict, total=False):
    """The options of `RunOptions` as keywords: what an editor offers for `Pipeline.from_checkpoint(path, …)`."""

    dtype: str | DTypeLike
    vae_dtype: str | DTypeLike
    vae_decode: str
    keep_encoders: bool
    sequential_guidance: bool
    denoising_loop: str
    offload: str
    memory_limit: float | None
    attention: str
    attention_precision: str
    linear: str
    linear_activations: str
    allow_mismatch: bool
    allow_partial: bool


def problems(values: Mapping[str, object]) -> list[str]:
    """A sentence for each option whose value it cannot have."""
    found: list[str] = []
    for name, known in _CHOICES.items():
        if name in values and values[name] not in known:
            either = f"give {' or '.join(known)}" if len(known) == 2 else f"give one of {', '.join(known)}"
            found.append(f"{name} is {values[name]!r}; {either}")
    limit = values.get("memory_limit")
    if limit is not None and not (is_number(limit) and limit > 0):
        found.append(f"memory_limit is {limit!r}; give the GB that a video may take, such as 24")
    if values.get("attention") == "cudnn" and values.get("attention_precision", "full") != "full":
        found.append(
            f"attention_precision is {values['attention_precision']!r}, which attention 'cudnn' does not have; set "
            "attention to 'auto' or attention_precision to 'full'"
        )
    return found


def _name(dtype: object) -> object:
    if isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name  # type: ignore[call-overload]  # TypeError says that it is none
    except TypeError:
        return dtype


def show_fields(function: Callable[..., object], *sources: type) -> None:
    """Lets `help` and editors at run time show the keywords of a function one by one, with their defaults."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    known = {p.name for p in own}
    keywords = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for source in sources
        for field in dataclasses.fields(source)
        if field.name not in known
    ]
    function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
