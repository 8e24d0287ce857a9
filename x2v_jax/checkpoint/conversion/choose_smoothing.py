"""Decides whether a conversion smooths its transformer, and refuses what cannot be smoothed."""

from collections.abc import Mapping

from x2v_jax import shipped
from x2v_jax.checkpoint.conversion.options import ConversionOptions
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.published.open import PublishedNetwork
from x2v_jax.checkpoint.quantize.calibration import Calibration, read_calibration
from x2v_jax.checkpoint.quantize.smoothing import ALPHA, Smoother, check_alpha
from x2v_jax.errors import UserError


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
