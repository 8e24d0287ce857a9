"""A native checkpoint as the source of a conversion: to other types, to or from 8 bits, or with LoRAs merged in."""

from collections.abc import Mapping

from x2v_jax.checkpoint.names import COMPONENTS
from x2v_jax.checkpoint.opened import Opened, open_native
from x2v_jax.checkpoint.options import Options
from x2v_jax.checkpoint.store import NativeCheckpoint
from x2v_jax.errors import UserError


def open_native_source(
    native: NativeCheckpoint, options: Options, lenders: Mapping[str, NativeCheckpoint]
) -> tuple[dict[str, Opened], dict[str, NativeCheckpoint]]:
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
        raise UserError(
            f"{native.path} is converted already; run it with `python -m infer --config.checkpoint={native.path}`, or "
            "say what to change with --quantize, --dtype or --lora"
        )
    for flag, given in (("--variant", options.variant), ("--set", options.settings)):
        if given:
            raise UserError(f"{flag}: {native.path} is converted already and says what it is; leave {flag} out")
    missing = [name for name in options.components if not native.has(name)]
    if missing:
        raise UserError(f"--component {missing[0]}: {native.path} has none; it has {', '.join(native.components)}")
    opened: dict[str, Opened] = {}
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
        asked = "--lora" if options.loras else f"--dtype {options.dtype}" if options.dtype != "keep" else "--quantize"
        raise UserError(
            f"{asked}: the transformer of {native.path} is smoothed, and its 8-bit weights are not written anew; "
            "convert the 16- or 32-bit weights with all that is wanted (--lora, --quantize, --smooth), or give "
            "--quantize none to multiply these out"
        )
    return opened, taken


def _changes(native: NativeCheckpoint, component: str, options: Options) -> bool:
    asked = options.components or options.quantize_components
    return component in asked or (options.quantize == "none" and native.quantization(component) is not None)
