"""The difference of two models as a LoRA: each linear layer's difference cut to a rank by its singular values.

    D = W_distilled - W_base ~ up @ down,   up = U sqrt(S), down = sqrt(S) Vt

so LightX2V's published LoRAs were made (its tools/extract/lora_extractor.py). What is small (biases, norms,
modulations) is kept whole. One layer is in memory at a time, in float32.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from x2v_jax.checkpoint.files.arrays import row_pieces
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.lora.write import DiffSpec, LoraWriter, PairSpec, can_hold, check_destination
from x2v_jax.checkpoint.names.wan import Row, table
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.errors import UserError

Progress = Callable[[int, int], None]

# Up to this size all singular values are computed; above, a random projection finds the largest ones.
_EXACT = 1024
_POWER_ITERATIONS = 12
_CONVERGED = 1e-3
_WORST = 10


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one parameter's difference D.

    key: official name. kept_as: "pair", "whole", or "lost" where the dialect has no place for it. rank: of a pair.
    change: |D| / |W_base|. energy: |D|². kept: the share of |D|² that the file holds.
    """

    key: str
    kept_as: str
    rank: int | None
    change: float
    energy: float
    kept: float


@dataclasses.dataclass(frozen=True)
class ExtractReport:
    """What a LoRA file holds of the difference of two models."""

    path: pathlib.Path
    layers: tuple[LayerReport, ...]

    @property
    def kept(self) -> float:
        """The share of the whole difference's energy."""
        total = sum(layer.energy for layer in self.layers)
        return sum(layer.energy * layer.kept for layer in self.layers) / total if total else 1.0

    def worst(self, count: int = _WORST) -> list[LayerReport]:
        """The layers of which the smallest share is kept."""
        return sorted(self.layers, key=lambda layer: layer.kept)[:count]

    def to_json(self) -> dict[str, object]:
        return {"file": str(self.path), "kept": self.kept, "layers": [dataclasses.asdict(x) for x in self.layers]}

    def __str__(self) -> str:
        groups: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault(_without_number(layer.key), []).append(layer)
        width = max(map(len, groups), default=0)
        lines = [f"{'parameter':<{width}}  layers  change  kept: mean   least"]
        for name, own in groups.items():
            kept = [layer.kept for layer in own]
            change = sum(layer.change for layer in own) / len(own)
            mean = sum(kept) / len(own)
            lines.append(f"{name:<{width}}  {len(own):6}  {change:6.2%}      {mean:7.2%} {min(kept):7.2%}")
        if any(layer.kept < 1 for layer in self.layers):
            lines.append("least kept:")
            lines += [f"  {x.key}: {x.kept:.2%} ({x.kept_as})" for x in self.worst() if x.kept < 1]
        lost = [layer for layer in self.layers if layer.kept_as == "lost"]
        if lost:
            total = sum(layer.energy for layer in self.layers)
            share = sum(layer.energy for layer in lost) / total if total else 0.0
            lines.append(f"{len(lost)} parameters have no place in this dialect: {share:.2%} of the difference is lost")
        return "\n".join([*lines, f"{self.kept:.2%} of the difference's energy is kept in all"])


def extract_lora(
    base: NativeCheckpoint,
    distilled: NativeCheckpoint,
    destination: str | os.PathLike[str],
    *,
    rank: int = 64,
    dialect: str = "lightx2v",
    dtype: str = "bfloat16",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ExtractReport:
    """Writes the difference of two transformers as a LoRA file.

    Args:
        base, distilled: native checkpoints of the same sizes.
        destination: the file, `.safetensors`; it appears when it is complete.
        rank: of the pairs; a layer that a pair would not make smaller is kept whole (where the dialect can).
        dialect: "lightx2v", "comfyui" or "diffusers"; see `lora_writer`.
        dtype: of the file: "bfloat16", "float16" or "float32".
        overwrite: replace a file that is there.
        progress: called with (parameters done, parameters in all).

    Returns:
        What was kept of each difference.

    Raises:
        UserError: models of different sizes, without a difference, or with NaN; or the file exists, or cannot be
            written.
    """
    path = check_destination(destination, dialect, dtype)
    if path.is_file() and not overwrite:
        raise UserError(f"{path} exists; choose another name or give --overwrite")
    if rank < 1:
        raise UserError(f"rank is {rank}; give 1 or more (32 to 128 is usual)")
    _check_order(base, distilled)
    config = base.config("transformer")
    if distilled.config("transformer") != config:
        own, other = config.to_dict(), distilled.config("transformer").to_dict()
        sizes = ", ".join(f"{name} {own[name]} and {other[name]}" for name in own if own[name] != other[name])
        raise UserError(
            f"the transformers of {base.path} and {distilled.path} have different sizes ({sizes}); give a model and "
            "what was distilled from it"
        )
    for checkpoint in (base, distilled):
        quantization = checkpoint.quantization("transformer")
        if quantization is not None:
            raise UserError(
                f"{checkpoint.path}: the transformer is {quantization}, whose rounding the LoRA would hold too; give "
                "checkpoints of the 16- or 32-bit weights"
            )
    source = _Difference(base.tensors("transformer"), distilled.tensors("transformer"))
    rows = table("transformer", config)
    changed = {key: row for row in rows for key in source.changed(row)}
    if not changed:
        raise UserError(f"{base.path} and {distilled.path} have the same transformer; there is nothing to extract")
    pairs, diffs = _places(changed, rows, rank, dialect)
    layers = []
    with LoraWriter(destination, dialect, pairs, diffs, dtype=dtype) as writer:
        todo = dict.fromkeys([*changed, *pairs])
        for done, key in enumerate(todo):
            progress(done, len(todo))
            layer = _write(writer, key, source, pairs, diffs)
            if key in changed:  # the others are zero pairs that carry a bias
                layers.append(layer)
        progress(len(todo), len(todo))
    return ExtractReport(path, tuple(layers))


def _check_order(base: NativeCheckpoint, distilled: NativeCheckpoint) -> None:
    """Raises a UserError where model.json says that the two were swapped: the LoRA would undo the distillation."""
    if base.schedule.is_distilled and not distilled.schedule.is_distilled:
        raise UserError(
            f"by their model.json {base.path} is distilled (variant {base.variant!r}) and {distilled.path} is not "
            f"({distilled.variant!r}), so the LoRA would take the distillation away; give the original model first"
        )


def low_rank(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best approximation of a matrix by a product of `rank` columns and rows.

    Large matrices go through a random projection with power iterations (Halko, Martinsson, Tropp, 2011), which finds
    the leading singular values almost as well at a fraction of the cost. The same matrix gives the same numbers.

    Args:
        matrix: float32 [m, n].

    Returns:
        up [m, rank], down [rank, n], and the share of the matrix's squared norm that up @ down holds.
    """
    total = float(np.vdot(matrix, matrix))
    if total == 0:
        return np.zeros((matrix.shape[0], rank), np.float32), np.zeros((rank, matrix.shape[1]), np.float32), 1.0
    if min(matrix.shape) <= max(_EXACT, 4 * rank):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    else:
        width = min(2 * rank + 16, *matrix.shape)
        basis = np.random.default_rng(0).standard_normal((matrix.shape[1], width), dtype=np.float32)
        held = 0.0
        for _ in range(_POWER_ITERATIONS):
            basis, _ = np.linalg.qr(matrix @ basis)
            image = matrix.T @ basis
            before, held = held, float(np.vdot(image, image))
            basis, _ = np.linalg.qr(image)
            # Spectra that fall fast need one or two rounds, flat ones more.
            if held - before <= _CONVERGED * held:
                break
        left, _ = np.linalg.qr(matrix @ basis)
        u, s, vt = np.linalg.svd(left.T @ matrix, full_matrices=False)
        u = left @ u
    root = np.sqrt(s[:rank])
    kept = float(np.sum(np.square(s[:rank], dtype=np.float64)))
    return u[:, :rank] * root, root[:, None] * vt[:rank], min(1.0, kept / total)


class _Difference:
    """distilled - base, by official key, one layer at a time."""

    def __init__(self, base: dict[str, LazyTensor], distilled: dict[str, LazyTensor]):
        self._base, self._distilled = base, distilled
        self._place: dict[str, tuple[Row, int]] = {}

    def changed(self, row: Row) -> Iterator[str]:
        """The official keys of a row whose values differ, in order of layers."""
        old, new = self._base[row.native].read(), self._distilled[row.native].read()
        for layer, key in enumerate(row.official_keys):
            self._place[key] = row, layer
            pair = (old, new) if row.layers is None else (old[layer], new[layer])
            if _differ(*pair):
                yield key

    def of(self, key: str) -> tuple[np.ndarray, float]:
        """The difference in the official shape, float32, and the norm of the base's values.

        Raises:
            UserError: NaN or infinity.
        """
        row, layer = self._place[key]
        values = []
        for tensors in (self._base, self._distilled):
            stack = tensors[row.native].read()
            values.append((stack if row.layers is None else stack[layer]).astype(np.float32))
        difference = values[1] - values[0]
        if not np.isfinite(difference).all():
            raise UserError(f"{key} holds NaN or infinity in one of the models; convert it again")
        return row.transform.backward(difference), float(np.linalg.norm(values[0]))


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    # Piece by piece, so that the first difference ends it: this pass costs little beside the next.
    pairs = zip(row_pieces(one), row_pieces(other), strict=True)
    return any(not np.array_equal(a.astype(np.float32), b.astype(np.float32)) for a, b in pairs)


def _places(
    changed: dict[str, Row], rows: tuple[Row, ...], rank: int, dialect: str
) -> tuple[dict[str, PairSpec], dict[str, DiffSpec]]:
    """What is stored as a pair, and what whole."""
    pairs: dict[str, PairSpec] = {}
    diffs: dict[str, DiffSpec] = {}
    shapes = {key: row.official_shape for row in rows for key in row.official_keys}
    for key, row in changed.items():
        shape = row.official_shape
        matrix = (shape[0], int(np.prod(shape[1:])))
        own = min(rank, *matrix)
        if key.endswith("modulation") or len(shape) < 2:
            if can_hold(dialect, key):
                diffs[key] = DiffSpec(key, shape)
            weight = key.removesuffix(".bias") + ".weight"
            # diffusers keeps a bias inside its layer's pair, so there must be one.
            if dialect == "diffusers" and key in diffs and weight not in changed:
                pairs[weight] = PairSpec(weight, shapes[weight], 1)
        elif dialect == "diffusers" or own * sum(matrix) < matrix[0] * matrix[1]:
            pairs[key] = PairSpec(key, shape, own)
        else:
            diffs[key] = DiffSpec(key, shape)
    return pairs, diffs


def _write(
    writer: LoraWriter, key: str, source: _Difference, pairs: dict[str, PairSpec], diffs: dict[str, DiffSpec]
) -> LayerReport:
    difference, norm = source.of(key)
    size = float(np.linalg.norm(difference))
    change = size / norm if norm else float("inf")
    if key in pairs:
        rank = pairs[key].rank
        up, down, kept = low_rank(difference.reshape(difference.shape[0], -1), rank)
        writer.write_pair(key, down, up)
        return LayerReport(key, "pair", rank, change, size**2, kept)
    if key in diffs:
        writer.write_diff(key, difference)
        return LayerReport(key, "whole", None, change, size**2, 1.0)
    return LayerReport(key, "lost", None, change, size**2, 0.0)


def _without_number(key: str) -> str:
    return ".".join("*" if part.isdigit() and i == 1 else part for i, part in enumerate(key.split(".")))
