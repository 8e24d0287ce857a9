"""What an 8-bit checkpoint was made of: opens it for a comparison, and refuses or names what cannot be it."""

import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.published.layouts import NetworkFiles, recognise
from x2v_jax.checkpoint.published.open import PublishedNetwork, open_native, open_source
from x2v_jax.checkpoint.published.select import select
from x2v_jax.errors import UserError
from x2v_jax.models.config import QUANTIZABLE

# Of all networks: what their matrices are made by. The rest of a config is not told by every layout.
_SIZES = (
    "model_type", "dim", "dim_attn", "dim_ffn", "ffn_dim", "num_layers", "num_heads", "in_dim", "out_dim", "text_dim",
    "freq_dim", "vocab_size", "image_size", "patch_size", "mlp_ratio",
)  # fmt: skip
# Files up to this size are hashed, which takes a moment; of larger ones only the size is compared.
_SOON_HASHED = 64 << 20


def open_networks(path: str | pathlib.Path, variant: str | None = None) -> dict[str, PublishedNetwork]:
    """The networks of a checkpoint in any layout that can be 8-bit, by component.

    Args:
        variant: of the transformer, where there are several.

    Raises:
        UserError: there are none, or it is not clear which.
    """
    layout = recognise(path)
    if layout.kind == "native":
        native = open_checkpoint(layout.path)
        return {name: open_native(native, name) for name in QUANTIZABLE if native.has(name)}
    chosen = variant if len(layout.variants) > 1 and variant in layout.variants else None
    sources: dict[str, NetworkFiles] = {
        name: source for name, source in select(layout, chosen, ()).items() if name in QUANTIZABLE
    }
    return {name: open_source(source)[0] for name, source in sources.items()}


def variant_of(networks: Mapping[str, PublishedNetwork]) -> str | None:
    """Of the transformer among them; None where nothing tells it."""
    return networks["transformer"].source.variant if "transformer" in networks else None


def source_tensors(
    component: str, one: PublishedNetwork, sources: Mapping[str, PublishedNetwork], against: object
) -> Mapping[str, LazyTensor]:
    """The floats, by official key, that the 8-bit matrices of `one` are compared with.

    Args:
        sources: the networks of `against`, which the user gave.

    Raises:
        UserError: it is of another task or other sizes, lacks a matrix, or has one in 8 bits too.
    """
    if component not in sources:
        raise UserError(f"--against {against}: it has no {component}; give the checkpoint that this was made of")
    _check_sizes(component, one, sources[component], against)
    found = sources[component].found
    for key, matrix in one.found.kept.items():
        if key not in found.tensors or found.tensors[key].shape != matrix.values.shape:
            raise UserError(
                f"--against {against}: {key} is missing or of another size; give the source of this very model"
            )
        if key in found.quantized:
            raise UserError(f"--against {against}: {key} is 8-bit too; give the 16- or 32-bit weights")
    return found.tensors


def _check_sizes(component: str, one: PublishedNetwork, source: PublishedNetwork, against: object) -> None:
    """Another model can have matrices of these very names and shapes, as i2v has those of t2v."""
    pairs = [(n, getattr(one.config, n), getattr(source.config, n)) for n in _SIZES if hasattr(one.config, n)]
    wrong = [f"{name} is {theirs!r} there and {ours!r} here" for name, ours, theirs in pairs if ours != theirs]
    if wrong:
        raise UserError(
            f"--against {against}: its {component} is of another task or other sizes ({', '.join(wrong)}); give the "
            "checkpoint that this was made of"
        )


def against_notes(path: str | pathlib.Path, against: str | pathlib.Path) -> Iterator[str]:
    """Sentences for the user about a source of the right sizes that may still not be the one. Reads headers only.

    Raises:
        UserError: one of both cannot be read.
    """
    networks = open_networks(path)
    sources = open_networks(against, variant_of(networks))
    ours, theirs = variant_of(networks), variant_of(sources)
    if ours is not None and theirs not in (None, ours):
        yield (
            f"--against {against}: its transformer's variant is {theirs!r}, and that of {path} is {ours!r}; errors are "
            "of 8 bits alone only where it is what this was made of"
        )
    recorded = _recorded(path)
    for name, one in networks.items():
        if name in sources and one.found.kept:
            for file in sources[name].source.files:
                entries = recorded.get(file.name, [])
                if entries and not any(_is_it(file, entry) for entry in entries):
                    yield (
                        f"--against {against}: {file} is not the file of that name that {path} was made of (its "
                        "model.json tells bytes and SHA-256); errors are of 8 bits alone only where the weights are "
                        "the same"
                    )


def _recorded(path: str | pathlib.Path) -> dict[str, list[Mapping[str, Any]]]:
    """What the provenance of a native checkpoint says of its source files, by their names."""
    layout = recognise(path)
    provenance = open_checkpoint(layout.path).model.get("provenance") if layout.kind == "native" else None
    sources = provenance.get("sources") if isinstance(provenance, dict) else None
    result: dict[str, list[Mapping[str, Any]]] = {}
    for entry in sources if isinstance(sources, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            result.setdefault(pathlib.PurePath(entry["file"]).name, []).append(entry)
    return result


def _is_it(file: pathlib.Path, entry: Mapping[str, object]) -> bool:
    size = file.stat().st_size
    if size != entry.get("bytes"):
        return False
    if size > _SOON_HASHED:
        return True
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == entry.get("sha256")
