"""A native checkpoint as the source of a conversion: to other types, to or from 8 bits, or with LoRAs merged in."""

from collections.abc import Iterator, Mapping

import numpy as np

from x2v_jax import shipped
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.conversion.stream import Findings
from x2v_jax.checkpoint.files.arrays import has_nonfinite, row_pieces
from x2v_jax.checkpoint.files.lazy_tensor import Streamed
from x2v_jax.checkpoint.names.smoothing import GROUPS
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.checkpoint.published.open import PublishedNetwork, open_native
from x2v_jax.errors import UserError
from x2v_jax.models.config import COMPONENTS

# What can be asked of a checkpoint whose transformer is smoothed.
_FOR_SMOOTHED = (
    "--quantize none, which dequantizes it, or --quantize int8 or fp8 with --quantize-component text_encoder or "
    "image_encoder, which carries the transformer over bit for bit"
)


def open_native_source(
    native: NativeCheckpoint, options: ConversionOptions, lenders: Mapping[str, NativeCheckpoint]
) -> tuple[dict[str, PublishedNetwork], dict[str, NativeCheckpoint]]:
    """What of a native checkpoint is written anew, and which components go on being taken from elsewhere.

    Components that it takes by reference stay references unless they change.

    Args:
        lenders: component -> the checkpoint that --reuse names.

    Returns:
        The opened networks by component; component -> lender, with those of --reuse.

    Raises:
        UserError: nothing would change, or an option is for published files only.
    """
    if options.quantize == "keep" and options.dtype == "keep" and not options.loras:
        smoothed = native.has("transformer") and native.smoothing("transformer") is not None
        what = _FOR_SMOOTHED if smoothed else "--quantize int8, fp8 or none, --dtype or --lora"
        raise UserError(
            f"{native.path} is converted already; run it with "
            f"`{shipped.command(f'infer --config.checkpoint={native.path}')}`, or "
            f"say what to change with {what}"
        )
    for flag, given in (("--variant", options.variant), ("--set", options.settings)):
        if given:
            raise UserError(f"{flag}: {native.path} is converted already and says what it is; leave {flag} out")
    missing = [name for name in options.components if not native.has(name)]
    if missing:
        raise UserError(f"--component {missing[0]}: {native.path} has none; it has {', '.join(native.components)}")
    opened: dict[str, PublishedNetwork] = {}
    taken = dict(lenders)
    for name in (*COMPONENTS, "tokenizer"):
        if not native.has(name) or name in taken or (options.components and name not in options.components):
            continue
        own = native.holder(name) is native
        if name != "tokenizer" and (own or name == "transformer" or _changes(native, name, options)):
            opened[name] = open_native(native, name)
        elif not own:
            taken[name] = native
    if "transformer" in opened and native.smoothing("transformer") is not None and options.quantize != "none":
        _check_carried(native, options)
    return opened, taken


def _check_carried(native: NativeCheckpoint, options: ConversionOptions) -> None:
    """Raises a UserError where anything is asked of a smoothed transformer, which can only be carried over."""
    if options.loras:
        asked = "--lora"
    elif options.dtype != "keep":
        asked = f"--dtype {options.dtype}"
    elif "transformer" in (options.quantize_components or ("transformer",)):
        asked = "--quantize"
    else:
        return
    raise UserError(
        f"{asked}: the transformer of {native.path} is smoothed, and its 8-bit weights are not written anew; convert "
        f"the 16- or 32-bit weights with all that is wanted (--lora, --quantize, --smooth), or give {_FOR_SMOOTHED}"
    )


def carried_over(native: NativeCheckpoint, component: str, findings: Findings) -> dict[str, Streamed]:
    """Every parameter of a smoothed component as it is stored, the factors among them.

    Args:
        findings: gets the names of parameters with NaN or infinity, when they are read.
    """
    stored = native.tensors(component)
    stored |= {GROUPS[name].stored: inverse for name, inverse in native.smoothing_inverses(component).items()}

    def pieces(name: str) -> Iterator[np.ndarray]:
        for part in row_pieces(stored[name].read()):
            if has_nonfinite(part) and name not in findings.nonfinite:
                findings.nonfinite.append(name)
            yield part

    return {
        name: Streamed(tensor.shape, tensor.dtype, lambda name=name: pieces(name))
        for name, tensor in sorted(stored.items())
    }


def _changes(native: NativeCheckpoint, component: str, options: ConversionOptions) -> bool:
    asked = options.components or options.quantize_components
    return component in asked or (options.quantize == "none" and native.quantization(component) is not None)
