"""Native checkpoints: a folder with model.json and safetensors files in parameter-tree names."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from x2v_jax import shipped
from x2v_jax.checkpoint.files.arrays import is_float
from x2v_jax.checkpoint.files.json_file import is_plain_name, read_json
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.files.safetensors import read_safetensors
from x2v_jax.checkpoint.names.smoothing import ASIDE, GROUPS
from x2v_jax.checkpoint.names.wan import SCALE, table
from x2v_jax.checkpoint.native.fields import check_quantization, check_schedule_field, check_sizes
from x2v_jax.checkpoint.native.load import load_tensors
from x2v_jax.checkpoint.native.writer import (
    FORMAT,
    FORMAT_VERSION,
    MODEL_FILE,
    TOKENIZER_FILE,
    check_names,
    save_native,
)
from x2v_jax.errors import UserError
from x2v_jax.models.config import (
    COMPONENTS,
    CONFIGS,
    QUANTIZATIONS,
    VARIANTS,
    ClipConfig,
    Config,
    Schedule,
    Umt5Config,
    VaeConfig,
    WanConfig,
)

if TYPE_CHECKING:
    import jax
    from jax.typing import DTypeLike

__all__ = ["NativeCheckpoint", "open_checkpoint", "save_native"]

_MAX_REFERENCES = 8


@dataclasses.dataclass(frozen=True)
class NativeCheckpoint:
    """An open native checkpoint. Only model.json has been read; tensors stay in their files until they are used.

    What is read of it (other checkpoints that it refers to, headers of files) is read once and kept.

    Attributes:
        path: the folder.
        model: model.json as read.
    """

    path: pathlib.Path
    model: Mapping[str, Any]
    # Folder -> the open checkpoint, of all that this one and those refer to.
    _opened: "dict[pathlib.Path, NativeCheckpoint]" = dataclasses.field(default_factory=dict, repr=False, compare=False)
    _configs: dict[str, Config] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    _headers: dict[str, dict[str, LazyTensor]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def task(self) -> str | None:
        """t2v or i2v; None for a checkpoint without a transformer."""
        return self.model.get("task")

    @property
    def variant(self) -> str:
        """base, distill, causvid or self_forcing."""
        return self.model.get("variant", "base")

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @functools.cached_property
    def _schedule(self) -> Schedule:
        values = self.model.get("schedule", {})
        where = f"{self.path / MODEL_FILE}: schedule"
        if not isinstance(values, dict):
            raise UserError(f"{where} is no JSON object; convert the checkpoint again")
        for field in dataclasses.fields(Schedule):
            if field.name in values:
                check_schedule_field(field.name, values[field.name], field.default, where)
        return Schedule.from_dict(values)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of what is here, its own or by reference, the tokenizer among them."""
        return tuple(self.model["components"])

    def has(self, component: str) -> bool:
        return component in self.model["components"]

    @overload
    def config(self, component: Literal["transformer"]) -> WanConfig: ...
    @overload
    def config(self, component: Literal["vae"]) -> VaeConfig: ...
    @overload
    def config(self, component: Literal["text_encoder"]) -> Umt5Config: ...
    @overload
    def config(self, component: Literal["image_encoder"]) -> ClipConfig: ...
    @overload
    def config(self, component: str) -> Config: ...
    def config(self, component: str) -> Config:
        """The sizes of a component.

        Raises:
            UserError: the component is missing, or what model.json says of it is damaged.
        """
        if component not in self._configs:
            self._configs[component] = self._read_config(component)
        return self._configs[component]

    def _read_config(self, component: str) -> Config:
        holder, entry = self._entry(component)
        values = entry.get("config")
        if component not in CONFIGS or not isinstance(values, dict):
            raise UserError(f"{holder.path / MODEL_FILE}: {component} has no config; convert the checkpoint again")
        try:
            known = {field.name for field in dataclasses.fields(CONFIGS[component])}
            check_sizes(component, {name: value for name, value in values.items() if name in known}, {}, "there")
            return CONFIGS[component].from_dict(values)
        except (UserError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(
                f"{holder.path / MODEL_FILE}: the config of {component} is damaged ({error}); convert it again"
            ) from error

    def tensors(self, component: str) -> dict[str, LazyTensor]:
        """Flat parameter name -> lazy tensor, checked against the component's config.

        Raises:
            UserError: the component or a file is missing or damaged, or parameters do not fit the config.
        """
        return {name: tensor for name, tensor in self._stored(component).items() if not name.startswith(ASIDE)}

    def smoothing_inverses(self, component: str) -> dict[str, LazyTensor]:
        """Name in `names.smoothing.GROUPS` -> 1 / factor [layers, D] of a smoothed component.

        Raises:
            UserError: as `tensors`.
        """
        stored = self._stored(component)
        return {name: stored[group.stored] for name, group in GROUPS.items()}

    def _stored(self, component: str) -> dict[str, LazyTensor]:
        if component not in self._headers:
            self._headers[component] = self._read_headers(component)
        return self._headers[component]

    def _read_headers(self, component: str) -> dict[str, LazyTensor]:
        holder, _ = self._entry(component)
        tensors: dict[str, LazyTensor] = {}
        for path in self.files(component):
            if not path.is_file():
                advice = shipped.missing(path)
                raise UserError(advice or f"{path} is missing; convert the checkpoint again or copy the whole folder")
            for name, tensor in read_safetensors(path).items():
                if name in tensors:
                    raise UserError(f"{path}: {name} is in another file of the checkpoint too; convert it again")
                tensors[name] = tensor
        config, quantization = self.config(component), self.quantization(component)
        smoothed = self.smoothing(component) is not None
        try:
            check_names(component, config, {name: t.shape for name, t in tensors.items()}, quantization, smoothed)
            _check_types(component, tensors, quantization)
        except UserError as error:
            raise UserError(f"{holder.path}: {error}; convert the checkpoint again") from None
        return dict(sorted(tensors.items()))

    def quantization(self, component: str) -> str | None:
        """The 8-bit type of the matrices of a component's blocks, "int8" or "float8_e4m3fn"; None for floats."""
        return self._eight_bit_entry(component).get("dtype")

    def smoothing(self, component: str) -> float | None:
        """The alpha that an 8-bit component was smoothed with (see `checkpoint.smoothing`); None where it was not."""
        return self._eight_bit_entry(component).get("smoothing")

    def _eight_bit_entry(self, component: str) -> dict[str, Any]:
        return (self._entry(component)[0].model.get("quantization") or {}).get(component, {})

    def files(self, component: str) -> list[pathlib.Path]:
        """The files of a component, in this folder or the one that it refers to."""
        holder, entry = self._entry(component)
        names = entry.get("files")
        if not isinstance(names, list) or not names:
            raise UserError(f"{holder.path / MODEL_FILE}: {component} lists no files; convert the checkpoint again")
        for name in names:
            if not is_plain_name(name):
                raise UserError(f"{holder.path / MODEL_FILE}: the file {name!r} of {component} is outside it; refused")
        return [holder.path / name for name in names]

    def tokenizer_file(self) -> pathlib.Path | None:
        """The tokenizer.json, None when the checkpoint has none.

        Raises:
            UserError: model.json lists one that is not there.
        """
        if not self.has("tokenizer"):
            return None
        path = self.files("tokenizer")[0]
        if not path.is_file():
            raise UserError(f"{path} is missing; convert the checkpoint again, or put the {TOKENIZER_FILE} there")
        return path

    def holder(self, component: str) -> "NativeCheckpoint":
        """The checkpoint whose folder really holds a component."""
        return self._entry(component)[0]

    def load(
        self,
        component: str,
        dtype: "DTypeLike | None" = None,
        sharding: "Mapping[str, jax.sharding.Sharding] | jax.sharding.Sharding | None" = None,
        *,
        quantized: bool = False,
    ) -> dict[str, Any]:
        """The parameters of a component on devices, as a nested dict.

        Args:
            component: transformer, vae, text_encoder or image_encoder.
            dtype: the floating type to convert to; None keeps the stored one. 8-bit weights and their scales stay.
            sharding: one sharding for all, or a mapping from flat names (those left out go to the first device). Each
                process reads only the slices that its devices hold.
            quantized: whether the caller runs 8-bit weights too; training does not.

        Raises:
            UserError: as `tensors`; or the weights are 8-bit and `quantized` is not set.
        """
        import jax

        if not quantized:
            self.require_floats(component)
        converted = None if dtype is None else np.dtype(jax.numpy.dtype(dtype))
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tensors, scales = self.tensors(component), self._scales(component)
        targets = {}
        for name, tensor in tensors.items():
            stays = not is_float(tensor.dtype) or tensor.dtype.name in QUANTIZATIONS or name in scales
            own = sharding.get(name, first) if isinstance(sharding, Mapping) else sharding or first
            kept_as = tensor.dtype if stays or converted is None else converted
            targets[name] = jax.ShapeDtypeStruct(tensor.shape, kept_as, sharding=own)
        return load_tensors(tensors, targets)

    def require_floats(self, component: str) -> None:
        """Raises a UserError where the matrices of a component are 8-bit, for callers that do not run those."""
        quantization = self.quantization(component)
        if quantization is not None:
            raise UserError(
                f"{self.path}: the {component} is {quantization}, and floats are needed here; give a checkpoint of its "
                f"16- or 32-bit weights, or dequantize it with `{shipped.command('convert wan … --quantize none')}`"
            )

    def _scales(self, component: str) -> set[str]:
        """Names of what 8-bit weights and their smoothing are multiplied by."""
        rows = table(component, self.config(component), self.quantization(component))
        return {row.native for row in rows if row.transform == SCALE} | {group.stored for group in GROUPS.values()}

    def _entry(self, component: str) -> tuple["NativeCheckpoint", Mapping[str, Any]]:
        """The component's entry and the checkpoint that really holds it."""
        holder: NativeCheckpoint = self
        for _ in range(_MAX_REFERENCES):
            entry = holder.model["components"].get(component)
            if entry is None:
                where = f"{self.path}" if holder is self else f"{self.path} takes it from {holder.path}, which"
                raise UserError(
                    f"{where} has no {component}; convert it with one, or with --reuse CHECKPOINT that has one"
                )
            if not isinstance(entry, dict):
                raise UserError(f"{holder.path / MODEL_FILE}: {component} is no JSON object; convert it again")
            target = entry.get("reference")
            if target is None:
                return holder, entry
            try:
                holder = self._open_reference(holder.path / str(target))
            except UserError as error:
                raise UserError(
                    f"{holder.path} takes its {component} from another checkpoint: {error}. Put that one back, or "
                    "convert again without --reuse"
                ) from None
        raise UserError(f"{self.path}: {component} is a reference that leads in a circle; convert the checkpoint again")

    def _open_reference(self, path: pathlib.Path) -> "NativeCheckpoint":
        folder = path.resolve()
        if folder not in self._opened:
            self._opened[folder] = dataclasses.replace(open_checkpoint(path), _opened=self._opened)
        return self._opened[folder]


def _check_types(component: str, tensors: Mapping[str, LazyTensor], quantization: str | None) -> None:
    """The matrices must be what model.json says, and their scales float32."""
    for name, tensor in tensors.items():
        own = tensor.dtype.name
        wanted = quantization if name.endswith(".weight") else None
        if own != wanted and (wanted or own in QUANTIZATIONS):
            raise UserError(f"{component}: {name} is {own}, and by model.json it is {wanted or 'a float'}")
        if own != "float32" and name.endswith(".scale") and f"{name.removesuffix('scale')}weight" in tensors:
            raise UserError(f"{component}: {name} is {own}, and scales of 8-bit weights are float32")
        if own != "float32" and any(name == group.stored for group in GROUPS.values()):
            raise UserError(f"{component}: {name} is {own}, and factors of smoothing are float32")


def open_checkpoint(path: str | os.PathLike[str]) -> NativeCheckpoint:
    """Opens a native checkpoint. A shipped one (assets/shapes_t2v_4step) is found from every folder.

    Raises:
        UserError: the folder is missing, is no native checkpoint (the message says how to convert it), or was written
            by a newer version.
    """
    folder = shipped.find(path)
    if folder.name == MODEL_FILE:
        folder = folder.parent
    file = folder / MODEL_FILE
    if not folder.exists():
        advice = shipped.from_hub(os.fspath(path)) or "give the folder of a converted checkpoint"
        raise UserError(f"checkpoint {str(path)!r} does not exist; {advice}")
    if not file.is_file():
        raise UserError(
            f"checkpoint {str(path)!r} is not a converted checkpoint (it has no {MODEL_FILE}); convert it with "
            f"`{shipped.command(f'convert wan {path} DST')}` and give DST"
        )
    model = read_json(file)
    if model.get("format") != FORMAT:
        raise UserError(f"{file}: format is {model.get('format')!r}, not {FORMAT!r}; give a checkpoint of this project")
    version = model.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise UserError(f"{file}: format_version is {version!r}; convert the checkpoint again")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{file}: format_version is {version}, and this program reads up to {FORMAT_VERSION}; update it, or "
            "convert the checkpoint with this version"
        )
    for name, known in (("task", (None, "t2v", "i2v")), ("variant", VARIANTS)):
        if model.get(name, known[0]) not in known:
            raise UserError(f"{file}: {name} is {model[name]!r}, which is none of this format's; convert it again")
    components = model.get("components")
    if not isinstance(components, dict) or set(components) - {*COMPONENTS, "tokenizer"}:
        raise UserError(f"{file}: components is not a list of known networks; convert the checkpoint again")
    check_quantization(file, model.get("quantization"))
    return NativeCheckpoint(folder, model)
