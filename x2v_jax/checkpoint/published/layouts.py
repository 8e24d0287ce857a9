"""Recognises what a file or folder holds: which networks, in whose layout, in which variants.

Networks are told by the names of their tensors, never by file names alone; file and folder names decide only what
tensors cannot tell (base or distilled). Nothing falls back: a variant that is not there is not replaced by another.
"""

import dataclasses
import pathlib

from x2v_jax.checkpoint.files.json_file import read_json
from x2v_jax.checkpoint.files.safetensors import read_metadata
from x2v_jax.checkpoint.native.writer import FORMAT
from x2v_jax.checkpoint.published import hints, relatives
from x2v_jax.checkpoint.published.key_check import ranges
from x2v_jax.checkpoint.published.read import KeyConvention, NoWeights, RawTensors, identify, read_raw, unwrapped
from x2v_jax.checkpoint.published.shards import SUFFIXES, FileSet, file_set_of, file_sets
from x2v_jax.checkpoint.quantize.calibration import FORMAT as CALIBRATION_FORMAT
from x2v_jax.errors import UserError
from x2v_jax.models.config import COMPONENTS, VARIANTS

# LightX2V's subfolders that hold a transformer, and what is in them.
_SUBFOLDERS = {
    "": None,
    "original": "base",
    "distill_models": "distill",
    "causvid_models": "causvid",
    "int8": None,
    "fp8": None,
    "distill_int8": "distill",
    "distill_fp8": "distill",
    "causvid_int8": "causvid",
    "causvid_fp8": "causvid",
}
_UNSUPPORTED_FOLDERS = {
    "distill_cfg_models": "distilled for a variable guidance scale, which this project does not run",
    "loras": "LoRA files; give them with --lora",
}
_TOKENIZERS = ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json", "tokenizer.json")

# Why a file is left out.
LORA = "a LoRA; give it with --lora to the conversion of its model"
_PART = "part of a converted checkpoint; give its folder, which has a model.json"
_UNKNOWN_PART = "weights of a part that Wan2.1 does not have"
_CALIBRATION = "recorded activations, for --smooth of the conversion of their model"


@dataclasses.dataclass(frozen=True)
class NetworkFiles:
    """Files that hold one network.

    variant: of a transformer; None when nothing tells it. is_guess: whether it stands for "base" only because no name
    says otherwise. asks: what a name says of a distillation without saying for which steps. other: the model that it is
    by its names, and which name that is, where that is not Wan2.1. state: of a trainer's file, else None.
    config_file: the config.json that describes it. precision: "int8" or "fp8" when the weights are 8-bit.
    """

    component: str
    files: tuple[pathlib.Path, ...]
    naming: str
    variant: str | None = None
    state: str | None = None
    other_states: tuple[str, ...] = ()
    config_file: pathlib.Path | None = None
    precision: str | None = None
    index: FileSet | None = None
    is_guess: bool = False
    asks: str | None = None
    other: tuple[str, str] | None = None

    @property
    def convention(self) -> KeyConvention:
        return KeyConvention(self.component, self.naming)

    @property
    def location(self) -> str:
        first = self.files[0]
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{first}{more}"

    def read(self) -> RawTensors:
        raw = read_raw(self.files)
        if self.index is not None and self.index.index:
            lost = [key for key in self.index.index if unwrapped(key) not in raw.tensors]
            if lost:
                names = ", ".join(ranges(lost))
                raise UserError(f"{self.index.name}: {names} not in the files that it names; download them again")
        return raw


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a path holds. kind: wan, lightx2v, diffusers, trainer, file, native, lora, part (a file of a native
    checkpoint), calibration (recorded activations) or unknown.

    left_out: file or folder -> why it is not used. other: the model that the folder holds as a whole, and what says so,
    where that is not Wan2.1.
    """

    path: pathlib.Path
    kind: str
    sources: tuple[NetworkFiles, ...] = ()
    tokenizer: pathlib.Path | None = None
    left_out: tuple[tuple[pathlib.Path, str], ...] = ()
    other: tuple[str, str] | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """The known variants of the transformers here."""
        found = {s.variant for s in self.of("transformer")}
        return tuple(v for v in VARIANTS if v in found)

    @property
    def scheduler_file(self) -> pathlib.Path | None:
        """Of a diffusers folder, its scheduler's config; None where there is none."""
        file = self.path / "scheduler/scheduler_config.json"
        return file if self.kind == "diffusers" and file.is_file() else None

    @property
    def unknown_parts(self) -> tuple[pathlib.Path, ...]:
        """Subfolders with weights that nothing here reads."""
        return tuple(path for path, reason in self.left_out if reason == _UNKNOWN_PART)

    def of(self, component: str) -> list[NetworkFiles]:
        return [s for s in self.sources if s.component == component]


def recognise(path: str | pathlib.Path) -> Layout:
    """Looks at a file or folder; reads names and headers only.

    Raises:
        UserError: it does not exist, or a file in it is damaged (missing shard, broken index, unreadable header).
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _recognise_file(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give the path of a checkpoint")
    if (path / "model.json").is_file():
        return Layout(path, "native")
    layout, other = _recognise_folder(path), relatives.of_folder(path)
    if other is None:
        return layout
    sources = (dataclasses.replace(s, other=other) if s.component == "transformer" else s for s in layout.sources)
    return dataclasses.replace(layout, sources=tuple(sources), other=other)


def _recognise_folder(path: pathlib.Path) -> Layout:
    if (path / "model_index.json").is_file() or (path / "transformer").is_dir() or _has_described_parts(path):
        folders = {name: "base" if name == "transformer" else None for name in COMPONENTS}
        layout = _scan(path, "diffusers", folders)
        named = tuple(_named(s, hints.folder_names(path)) for s in layout.sources)
        return dataclasses.replace(layout, sources=named, left_out=(*layout.left_out, *_unknown_parts(path)))
    layout = _scan(path, "wan", _SUBFOLDERS)
    conventions = {s.convention for s in layout.sources}
    if not layout.sources:
        kind = "lora" if any(reason == LORA for _, reason in layout.left_out) else "unknown"
        return dataclasses.replace(layout, kind=kind)
    if any(s.files[0].parent.name in _SUBFOLDERS and s.files[0].parent != path for s in layout.sources) or any(
        s.precision for s in layout.sources
    ):
        return dataclasses.replace(layout, kind="lightx2v")
    if any(s.state for s in layout.sources):
        return dataclasses.replace(layout, kind="trainer")
    if conventions == {KeyConvention("transformer", "diffusers")} or all(k.naming == "diffusers" for k in conventions):
        return dataclasses.replace(layout, kind="diffusers")
    return layout


def _named(source: NetworkFiles, names: tuple[str, ...]) -> NetworkFiles:
    """A network of a diffusers folder with what the folder's names say of it."""
    if source.component != "transformer":
        return source
    variant = next(filter(None, map(hints.variant_in, names)), None)
    asks = next(filter(None, map(hints.distilled_in, names)), None)
    if variant:
        return dataclasses.replace(source, variant=variant)
    return dataclasses.replace(source, asks=asks, is_guess=not any(map(hints.is_original, names)))


def _unknown_parts(root: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Subfolders of a diffusers folder with weights that nothing here reads."""
    known = {*COMPONENTS, "loras"}
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name not in known]
    held = [p for p in folders if any(file.suffix in SUFFIXES for file in p.iterdir() if file.is_file())]
    return [(p, _UNKNOWN_PART) for p in held]


def _has_described_parts(path: pathlib.Path) -> bool:
    """Whether it is a part of a diffusers folder, such as a VAE alone."""
    return any((path / name / "config.json").is_file() for name in COMPONENTS)


def _recognise_file(path: pathlib.Path) -> Layout:
    if path.name == "model.json":
        return Layout(path.parent, "native")
    if path.suffix not in SUFFIXES and not path.name.endswith(".index.json"):
        raise UserError(f"{path}: neither a checkpoint folder nor a {', '.join(SUFFIXES)} file")
    files = file_set_of(path)
    found = _source(files, path.parent, None)
    if isinstance(found, str):
        kinds = {LORA: "lora", _PART: "part", _CALIBRATION: "calibration"}
        return Layout(path, kinds.get(found, "unknown"), left_out=((path, found),))
    kind = "trainer" if found.state else "lightx2v" if found.precision else "file"
    return Layout(path, kind, (found,), _tokenizer(path.parent))


def _scan(root: pathlib.Path, kind: str, folders: dict[str, str | None]) -> Layout:
    sources: list[NetworkFiles] = []
    left_out: list[tuple[pathlib.Path, str]] = []
    for name, variant in folders.items():
        folder = root / name if name else root
        if not folder.is_dir():
            continue
        found: list[NetworkFiles] = []
        for files in file_sets(folder):
            source = _source(files, root, variant)
            if isinstance(source, str):
                left_out.append((files.files[0], source))
            else:
                found.append(source)
        kept, dropped = _prefer_safetensors(found)
        sources += kept
        left_out += dropped
    if any(s.component == "transformer" and s.files[0].parent == root for s in sources):
        # The published loaders read original/ only where the folder itself holds no shards.
        left_out += [(s.files[0], "the folder itself holds the base weights") for s in sources if _in_original(s)]
        sources = [s for s in sources if not _in_original(s)]
    left_out += [(root / n, reason) for n, reason in _UNSUPPORTED_FOLDERS.items() if (root / n).is_dir()]
    return Layout(root, kind, tuple(sources), _tokenizer(root), tuple(left_out))


def _in_original(source: NetworkFiles) -> bool:
    return source.component == "transformer" and source.files[0].parent.name == "original"


def _prefer_safetensors(found: list[NetworkFiles]) -> tuple[list[NetworkFiles], list[tuple[pathlib.Path, str]]]:
    """Where a folder holds the same network in both formats, the published loaders take the safetensors file."""
    safe = {s.component for s in found if s.files[0].suffix == ".safetensors"}
    dropped = [s for s in found if s.component in safe and s.files[0].suffix != ".safetensors"]
    # Only a twin is dropped: a trainer's states beside the base weights are another model.
    dropped = [s for s in dropped if s.state is None]
    reason = "the safetensors file beside it holds the same network"
    return [s for s in found if s not in dropped], [(s.files[0], reason) for s in dropped]


def _source(files: FileSet, root: pathlib.Path, variant: str | None) -> NetworkFiles | str:
    """The network in a set of files, or the reason why there is none that can be used."""
    try:
        ours = _of_ours(files.files[0])
        if ours is not None:
            return ours
        raw = read_raw(files.files[:1]) if files.index else read_raw(files.files)
        convention = identify(raw.tensors)
        if convention.component is None and files.index:
            raw = read_raw(files.files)
            convention = identify(raw.tensors)
    except NoWeights as error:
        return f"holds {error.held}"
    except UserError as error:
        if _is_auxiliary(files):
            return str(error)
        raise
    if convention.component == "lora":
        return LORA
    if convention.component is None:
        return "holds none of Wan2.1's networks"
    names = {tensor.dtype.name for tensor in raw.tensors.values()}
    precision = "int8" if "int8" in names else "fp8" if any(n.startswith("float8") for n in names) else None
    network = NetworkFiles(
        convention.component,
        files.files,
        convention.naming,
        state=raw.state,
        other_states=raw.other_states,
        config_file=_config_file(files.files[0].parent, convention),
        precision=precision,
        index=files if files.index else None,
    )
    return network if convention.component != "transformer" else _identified(network, root, variant)


def _of_ours(path: pathlib.Path) -> str | None:
    """What a file is that this project wrote and that is no source of a conversion; None of others."""
    if path.suffix != ".safetensors":
        return None
    written = read_metadata(path).get("format")
    return {FORMAT: _PART, CALIBRATION_FORMAT: _CALIBRATION}.get(written or "")


def _is_auxiliary(files: FileSet) -> bool:
    """Files that lie in published folders beside the weights and are no checkpoints."""
    return files.files[0].suffix == ".bin" or files.files[0].name.startswith(("optimizer", "scheduler", "rng_state"))


def _identified(network: NetworkFiles, root: pathlib.Path, variant: str | None) -> NetworkFiles:
    """A transformer with what names of files and folders say of it. variant: what its place has said already."""
    first, precision = network.files[0], network.precision
    within = first.relative_to(root).parts if first.is_relative_to(root) else (first.name,)
    own, folders = tuple(reversed(within)), hints.folder_names(root)
    if root.name in (*_SUBFOLDERS, *COMPONENTS) or precision or network.state:
        folders = (*folders, root.parent.name)
    network = dataclasses.replace(network, other=hints.relative_in(own[0], (*own[1:], *folders)))
    if variant:
        return dataclasses.replace(network, variant=variant)
    # In a folder named after a distilled model, the shards of this name are the base that it came from.
    is_shard_of_base = first.name.startswith("diffusion_pytorch_model")
    names = own if is_shard_of_base and not precision else (*own, *folders)
    if found := next(filter(None, map(hints.variant_in, names)), None):
        return dataclasses.replace(network, variant=found)
    asks = next(filter(None, map(hints.distilled_in, names)), None)
    if is_shard_of_base and network.state is None:
        return dataclasses.replace(
            network, variant="base", asks=asks, is_guess=not any(map(hints.has_published_base, folders))
        )
    return dataclasses.replace(network, asks=asks)


def _config_file(folder: pathlib.Path, convention: KeyConvention) -> pathlib.Path | None:
    """The config.json that describes a network: beside it, or one folder up for LightX2V's subfolders."""
    places = [folder]
    if convention.naming == "official" and folder.name in _SUBFOLDERS and folder.name:
        places.append(folder.parent)
    return next((p / "config.json" for p in places if (p / "config.json").is_file()), None)


def declared(source: NetworkFiles) -> dict[str, object]:
    """What config.json says about a source. An official folder's file describes the transformer; a section named after
    another component ({"image_encoder": {"num_heads": 4}}) describes that one."""
    if source.config_file is None:
        return {}
    config = read_json(source.config_file)
    section = config.get(source.component)
    own = dict(section) if isinstance(section, dict) else {}
    class_name = str(config.get("_class_name") or config.get("model_type") or "")
    describes_it = source.naming == "diffusers" or (source.component == "vae" and "Autoencoder" in class_name)
    if source.component == "transformer" or describes_it:
        config = {k: v for k, v in config.items() if k not in COMPONENTS}
        if source.component != "transformer":
            config.pop("model_type", None)
        return config | own
    return own


def _tokenizer(root: pathlib.Path) -> pathlib.Path | None:
    return next((root / name for name in _TOKENIZERS if (root / name).is_file()), None)
