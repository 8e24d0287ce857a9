"""Writes LoRA files with the names that LightX2V, ComfyUI or diffusers look for.

- lightx2v: `diffusion_model.<module>.lora_down.weight`, `.lora_up.weight`, `.diff`, `.diff_b`, `.diff_m`. LightX2V
  reads no alpha, so the scale is folded into `lora_up`.
- comfyui: the same prefix and pairs, with `.alpha` where it is not the rank (what an absent one means: diffusers reads
  alphas of the blocks only, and refuses a file with others); a modulation is `<module>.modulation.diff`, as ComfyUI
  patches any parameter by its own name.
- diffusers: `transformer.<diffusers module>.lora_A.weight`, `.lora_B.weight`, and a bias's change as `.lora_B.bias`
  (peft's lora_bias, which then every module has). It has no place for norms and modulations, and takes scale 1.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np

from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter
from x2v_jax.checkpoint.names.diffusers import DiffusersNames
from x2v_jax.checkpoint.names.wan import Row, table
from x2v_jax.errors import UserError
from x2v_jax.models.config import WanConfig

DIALECTS = ("lightx2v", "comfyui", "diffusers")
DTYPES: Mapping[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

_DIFFUSERS = DiffusersNames("transformer")


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """A low-rank change of one parameter: official key, the official weight's shape, rank."""

    key: str
    shape: tuple[int, ...]
    rank: int


@dataclasses.dataclass(frozen=True)
class DiffSpec:
    """A change of one parameter that is stored whole: official key and shape."""

    key: str
    shape: tuple[int, ...]


def can_hold(dialect: str, key: str) -> bool:
    """Whether a dialect has a place for the whole difference of a parameter (pairs fit all of them)."""
    return dialect != "diffusers" or (key.endswith(".bias") and not _is_norm(key))


class LoraWriter:
    """A context that writes a LoRA file part by part; the file appears when the context ends without error.

    Args:
        path: the final name, `.safetensors`.
        dialect: one of DIALECTS.
        pairs, diffs: everything that will be written.
        dtype: of the stored tensors.
        alpha: stated for pairs of rank r, which are then scaled by alpha / r; None for scale 1.

    Raises:
        UserError: another suffix, an unknown dialect or dtype, nothing to write, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dialect: str,
        pairs: Mapping[str, PairSpec],
        diffs: Mapping[str, DiffSpec],
        *,
        dtype: str = "bfloat16",
        alpha: float | None = None,
    ):
        path = check_destination(path, dialect, dtype)
        if not pairs and not diffs:
            raise UserError(f"{path}: there is nothing to write: no change that {dialect} files have a place for")
        self._dialect = dialect
        self._dtype = DTYPES[dtype]
        self._alpha = alpha
        self._pairs, self._diffs = dict(pairs), dict(diffs)
        with_bias = dialect == "diffusers" and any(key.endswith(".bias") for key in diffs)
        self._missing_bias = self._biases_of_pairs() if with_bias else {}
        specs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for pair in pairs.values():
            down, up = self._pair_keys(pair.key)
            # A convolution's pair has the kernel's axes in `down` and axes of one in `up`, as torch's own layers do.
            specs[down] = ((pair.rank, *pair.shape[1:]), self._dtype)
            specs[up] = ((pair.shape[0], pair.rank, *(1,) * (len(pair.shape) - 2)), self._dtype)
            if self._states_alpha(pair):
                specs[self._alpha_key(pair.key)] = ((), np.dtype(np.float32))
        specs |= {self._diff_key(diff.key): (diff.shape, self._dtype) for diff in diffs.values()}
        specs |= {self._diff_key(key): (shape, self._dtype) for key, shape in self._missing_bias.items()}
        self._writer = SafetensorsWriter(path, specs, {"format": "pt"})

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def write_pair(self, key: str, down: np.ndarray, up: np.ndarray) -> None:
        """Writes one pair.

        Args:
            key: official name of the parameter.
            down: float32 [rank, elements of one output].
            up: float32 [out, rank]; not yet scaled by alpha / rank.

        Raises:
            UserError: values beyond the stored type.
        """
        pair = self._pairs[key]
        down_key, up_key = self._pair_keys(key)
        scale = 1.0 if self._alpha is None else self._alpha / pair.rank
        if self._states_alpha(pair):
            self._writer.write(self._alpha_key(key), np.asarray(self._alpha, np.float32))
        else:
            up = up * np.float32(scale)
        self._writer.write(down_key, self._cast(key, down.reshape(pair.rank, *pair.shape[1:])))
        ones = (1,) * (len(pair.shape) - 2)
        self._writer.write(up_key, self._cast(key, up.reshape(pair.shape[0], pair.rank, *ones)))
        bias = _bias_of(key)
        if bias in self._missing_bias:
            self._writer.write(self._diff_key(bias), np.zeros(self._missing_bias[bias], self._dtype))

    def write_diff(self, key: str, difference: np.ndarray) -> None:
        """Writes the whole difference of a parameter, in its official shape.

        Raises:
            UserError: values beyond the stored type.
        """
        self._writer.write(self._diff_key(key), self._cast(key, difference))

    def _biases_of_pairs(self) -> dict[str, tuple[int, ...]]:
        """Biases that do not change, of modules that have a pair: peft wants all or none."""
        biases = {_bias_of(pair.key): (pair.shape[0],) for pair in self._pairs.values()}
        return {key: shape for key, shape in biases.items() if key not in self._diffs}

    def _pair_keys(self, key: str) -> tuple[str, str]:
        module = self._module(key)
        letters = ("A", "B") if self._dialect == "diffusers" else ("down", "up")
        return f"{module}.lora_{letters[0]}.weight", f"{module}.lora_{letters[1]}.weight"

    def _states_alpha(self, pair: PairSpec) -> bool:
        return self._dialect == "comfyui" and self._alpha is not None and self._alpha != pair.rank

    def _alpha_key(self, key: str) -> str:
        return f"{self._module(key)}.alpha"

    def _diff_key(self, key: str) -> str:
        if self._dialect == "diffusers":
            return f"{self._module(key)}.lora_B.bias"
        if key.endswith("modulation"):
            stem = key if self._dialect == "comfyui" else key.rpartition(".")[0]
            return f"diffusion_model.{stem}.{'diff' if self._dialect == 'comfyui' else 'diff_m'}"
        return f"{self._module(key)}.{'diff_b' if key.endswith('.bias') else 'diff'}"

    def _module(self, key: str) -> str:
        if self._dialect == "diffusers":
            (name,), _ = _DIFFUSERS.format(key)
            return "transformer." + name.rpartition(".")[0]
        return "diffusion_model." + key.rpartition(".")[0]

    def _cast(self, key: str, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(values).astype(self._dtype)
        if not np.isfinite(cast).all():
            raise UserError(
                f"{key}: the change holds NaN or infinity, or values beyond {self._dtype.name}; "
                "give --dtype float32, or look for damage in the models"
            )
        return cast


def write_lora(
    path: str | os.PathLike[str],
    lora: Mapping[str, Mapping[str, Any]],
    config: WanConfig,
    *,
    alpha: float,
    dialect: str = "lightx2v",
    dtype: str = "bfloat16",
) -> None:
    """Writes a trained LoRA.

    Args:
        path: the file, `.safetensors`.
        lora: as `train.lora.init_lora` has it: flat name -> {"down": [L, in, r], "up": [L, r, out]}.
        config: of the transformer.
        alpha: what it was trained with: the change is alpha / r * down @ up.
        dialect: "lightx2v", "comfyui" or "diffusers".
        dtype: of the file: "bfloat16", "float16" or "float32".

    Raises:
        UserError: pairs that do not fit the transformer, or the file cannot be written.
    """
    rows = {row.native: row for row in table("transformer", config)}
    pairs = {}
    for name, pair in lora.items():
        row = _checked(rows, name, pair)
        rank = pair["down"].shape[-1]
        pairs |= {key: PairSpec(key, row.official_shape, rank) for key in row.official_keys}
    with LoraWriter(path, dialect, pairs, {}, dtype=dtype, alpha=alpha) as writer:
        for name, pair in lora.items():
            for key, down, up in _layers(rows[name], pair):
                writer.write_pair(key, down.T, up.T)


def _layers(row: Row, pair: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for layer, key in enumerate(row.official_keys):
        down, up = (pair[n] if row.layers is None else pair[n][layer] for n in ("down", "up"))
        yield key, np.asarray(down, np.float32), np.asarray(up, np.float32)


def _checked(rows: Mapping[str, Row], name: str, pair: Mapping[str, Any]) -> Row:
    row = rows.get(name)
    shape = (*pair["down"].shape[:-1], pair["up"].shape[-1])
    if (
        row is None
        or len(row.shape) != 2
        or row.native_shape != shape
        or pair["down"].shape[-1] != pair["up"].shape[-2]
    ):
        raise UserError(f"the LoRA changes {name} by {list(shape)}, which is no kernel of this transformer")
    return row


def check_destination(path: str | os.PathLike[str], dialect: str, dtype: str) -> pathlib.Path:
    """Raises a UserError unless a LoRA file can be asked for like this."""
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} does not end in .safetensors; LoRA files are written in that format")
    if dialect not in DIALECTS:
        raise UserError(f"dialect is {dialect!r}; give one of {', '.join(DIALECTS)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}")
    return path


def _bias_of(key: str) -> str:
    return key.removesuffix(".weight") + ".bias"


def _is_norm(key: str) -> bool:
    module = key.rpartition(".")[0]
    return "norm" in module.rpartition(".")[2] or module in ("img_emb.proj.0", "img_emb.proj.4")
