"""Decides which networks of a conversion become or stay 8-bit, and whether its transformer is smoothed; says so."""

from collections.abc import Iterator, Mapping

from x2v_jax import shipped
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.names.wan import table
from x2v_jax.checkpoint.published.open import PublishedNetwork
from x2v_jax.checkpoint.quantize.calibration import Calibration, read_calibration
from x2v_jax.checkpoint.quantize.eight_bit import WORDS
from x2v_jax.checkpoint.quantize.smoothing import ALPHA, Smoother, check_alpha
from x2v_jax.errors import UserError
from x2v_jax.models.config import QUANTIZABLE


def choose_quantization(opened: Mapping[str, PublishedNetwork], options: ConversionOptions) -> dict[str, str | None]:
    """The 8-bit type of each network in the result, None for floats.

    Args:
        opened: by component.

    Raises:
        UserError: it is not known what is meant, or a network is 8-bit in another way already.
    """
    if options.quantize not in ("keep", "none", *WORDS):
        raise UserError(f"--quantize {options.quantize}: give one of keep, none, {', '.join(WORDS)}")
    wanted = _components(opened, options)
    return {name: _of(one, options, name in wanted) for name, one in opened.items()}


def quantization_notes(
    opened: Mapping[str, PublishedNetwork],
    tensors: Mapping[str, Mapping[str, LazyTensor]],
    quantizations: Mapping[str, str | None],
    options: ConversionOptions,
) -> Iterator[str]:
    """Sentences for the user about what becomes of 8-bit weights.

    Args:
        opened: by component. tensors: the same with LoRAs merged. quantizations: as `choose_quantization` gives them.
    """
    for name, one in opened.items():
        found, target = one.found, quantizations[name]
        matrices = _matrices(one)
        if target is None and found.quantized:
            is_8bit = bool(found.quantized.intersection(matrices))
            yield _dequantized(one, is_8bit and options.quantize != "none")
        elif target is not None and stored_quantization(one) == target:
            left = sum(tensors[name][key] is found.tensors[key] for key in matrices)
            if left:
                yield f"{name}: {left} matrices are {target} and stay so, bit for bit"
            yield from _rounded_scales(one, matrices)
        elif target is not None:
            yield f"{name}: {len(matrices)} matrices become {target} with a float32 scale a row"


def _components(opened: Mapping[str, PublishedNetwork], options: ConversionOptions) -> tuple[str, ...]:
    asked = options.quantize_components
    if options.quantize not in WORDS:
        if asked:
            raise UserError(f"--quantize-component {asked[0]}: say with --quantize int8 or fp8 what it is to become")
        return ()
    for name in asked or ("transformer",):
        if name not in QUANTIZABLE:
            raise UserError(f"--quantize-component {name}: give one of {', '.join(QUANTIZABLE)}; the rest stays float")
        if name not in opened:
            which = f"--quantize-component {name}" if asked else f"--quantize {options.quantize}"
            raise UserError(
                f"{which}: no {name} is converted here; name others with --quantize-component, or leave out what keeps "
                "it away (--component, --reuse)"
            )
    return asked or ("transformer",)


def stored_quantization(one: PublishedNetwork) -> str | None:
    """The 8-bit type that a network can be run in as it is; None where its matrices are floats, or differ."""
    kept = one.found.kept
    kinds = {kept[key].quantization if key in kept else None for key in _matrices(one)}
    return kinds.pop() if len(kinds) == 1 else None


def _matrices(one: PublishedNetwork) -> list[str]:
    return [k for row in table(one.source.component, one.config) if row.is_quantizable for k in row.official_keys]


def _of(one: PublishedNetwork, options: ConversionOptions, wanted: bool) -> str | None:
    component, found = one.source.component, one.found
    stored = stored_quantization(one)
    target = WORDS[options.quantize] if wanted else None if options.quantize == "none" else stored
    if wanted and found.quantized.intersection(_matrices(one)) and stored != target:
        stored_as, where = stored or "8-bit in another way", one.source.location
        raise UserError(
            f"--quantize {options.quantize}: the {component} of {where} is {stored_as} already, and rounding it again "
            "loses more; give the 16- or 32-bit weights, or --quantize keep or none"
        )
    return target


def _dequantized(one: PublishedNetwork, cannot_stay: bool) -> str:
    why = ""
    if cannot_stay:
        why = ", as they cannot be run as they are (not all matrices of the blocks are int8 or float8_e4m3fn by rows)"
    return (
        f"{one.source.component}: {len(one.found.quantized)} 8-bit weights of {one.source.location} are dequantized "
        f"with their scales{why}; what 8 bits lost stays lost, so prefer the 16-bit files where you have them"
    )


def _rounded_scales(one: PublishedNetwork, matrices: list[str]) -> list[str]:
    kept = [one.found.kept[key] for key in matrices]
    types = sorted({m.scale_dtype for m in kept if m.scale_dtype not in (None, "float32", "float64")})
    if not types:
        return []
    return [
        f"{one.source.component}: the files keep the scales as {' and '.join(types)}, so each is off by up to "
        "0.4 % already; files with float32 scales are more exact"
    ]


def check_smoothing(options: ConversionOptions) -> None:
    """Raises a UserError where options contradict each other, before any file is opened."""
    if options.smooth is None:
        if options.smooth_alpha is not None:
            raise UserError(
                f"--smooth-alpha: give with --smooth the file that `{shipped.command('convert calibrate')}` made"
            )
        return
    if options.quantize not in ("int8", "fp8"):
        raise UserError("--smooth: it prepares weights for 8 bits; give --quantize int8 or fp8 with it")
    if options.quantize_components and "transformer" not in options.quantize_components:
        raise UserError(
            "--smooth: it is for the transformer, which --quantize-component leaves out; add --quantize-component "
            "transformer, or leave --smooth out"
        )
    if options.smooth_alpha is not None:
        check_alpha(options.smooth_alpha)


def choose_smoothing(
    opened: Mapping[str, PublishedNetwork],
    tensors: Mapping[str, Mapping[str, LazyTensor]],
    quantizations: Mapping[str, str | None],
    options: ConversionOptions,
    notes: list[str],
) -> tuple[Smoother | None, Calibration | None]:
    """What smooths the transformer, and the recording that it goes by.

    Args:
        opened: by component. tensors: the same with LoRAs merged. quantizations: as `choose_quantization` gives them.
        notes: gets sentences for the user.

    Raises:
        UserError: the recording does not fit the transformer, or that is 8-bit already.
    """
    if options.smooth is None or quantizations.get("transformer") is None:
        return None, None
    one = opened["transformer"]
    if one.found.quantized:
        raise UserError(
            f"--smooth: the transformer of {one.source.location} is 8-bit already, and smoothing comes before 8 bits; "
            "give the 16- or 32-bit weights"
        )
    calibration = read_calibration(options.smooth)
    calibration.check(one.config)
    alpha = ALPHA if options.smooth_alpha is None else check_alpha(options.smooth_alpha)
    note = f"transformer: smoothed with alpha {alpha:g} by {calibration.path}"
    count = calibration.about.get("prompts")
    if count is not None:
        note += f", which was recorded on {count} {'prompt' if count == '1' else 'prompts'}"
    notes.append(note)
    recorded, own = calibration.about.get("variant"), one.source.variant
    if own is not None and recorded not in (None, own):
        notes.append(
            f"transformer: its activations were recorded with the variant {recorded!r}, and this is {own!r}; calibrate "
            "with this one for factors of its own"
        )
    return Smoother(calibration, alpha, tensors["transformer"]), calibration
