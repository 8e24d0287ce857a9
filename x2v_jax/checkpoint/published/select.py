"""Picks, of all networks that a path holds, the ones to convert; asks where that is not clear."""

import dataclasses
from collections.abc import Sequence

from x2v_jax import shipped
from x2v_jax.checkpoint.published.layouts import Layout, NetworkFiles
from x2v_jax.checkpoint.published.relatives import OtherModel
from x2v_jax.errors import UserError
from x2v_jax.models.config import COMPONENTS


def select(
    layout: Layout, variant: str | None, components: Sequence[str], lent: Sequence[str] = ()
) -> dict[str, NetworkFiles]:
    """The source of each component that is to be converted.

    Args:
        variant: what the user asked for, None for "the only one".
        components: the components asked for; empty means all that are there.
        lent: components that another checkpoint gives, not to be looked for here.

    Raises:
        UserError: the path is a file of this project's own; the variant is not there, several are and none was asked
            for, or two files hold the same network.
    """
    if layout.kind in ("part", "calibration"):
        raise UserError(f"{layout.path} is {layout.left_out[0][1]}")
    if layout.other is not None and (not components or "transformer" in components):
        raise OtherModel(str(layout.path), *layout.other)
    wanted = [c for c in components or COMPONENTS if c not in lent]
    chosen: dict[str, NetworkFiles] = {}
    for component in wanted:
        found = _full_precision(layout.of(component))
        if component == "transformer":
            found = _of_variant(layout, found, variant)
        if len(found) > 1:
            places = " and ".join(str(s.files[0]) for s in found)
            raise UserError(f"{layout.path}: {places} both hold a {component}; move one away or give the file itself")
        if found:
            chosen[component] = found[0]
        elif components:
            raise UserError(f"--component {component}: {layout.path} holds none; {_holds(layout)}")
    if not chosen:
        raise UserError(f"{layout.path}: nothing to convert; {_holds(layout)}")
    return chosen


def _of_variant(layout: Layout, found: list[NetworkFiles], variant: str | None) -> list[NetworkFiles]:
    if variant:
        if layout.path.is_file():  # the user points at this very file and says what it is
            return [dataclasses.replace(s, variant=variant) for s in found]
        exact = [s for s in found if s.variant == variant]
        if not exact:
            exact = [dataclasses.replace(s, variant=variant) for s in found if s.variant is None]
        if (
            not exact and len(layout.of("transformer")) == 1 and found and found[0].is_guess
        ):  # the user knows what the names do not say
            exact = [dataclasses.replace(found[0], variant=variant)]
        if found and not exact:
            raise UserError(
                f"--variant {variant}: {layout.path} has no such transformer ({_expected(variant)}); it holds "
                f"{' and '.join(layout.variants)}; to sample that one in another way, give --schedule instead"
            )
        found = exact
    known = {s.variant for s in found}
    if len(known) > 1:
        listed = "; ".join(f"--variant {s.variant or 'NAME'}: {s.files[0]}" for s in found)
        raise UserError(f"{layout.path} holds {len(found)} transformers; say which with --variant ({listed})")
    return found


def _full_precision(found: list[NetworkFiles]) -> list[NetworkFiles]:
    """Leaves out 8-bit copies of what is there in 16 or 32 bits; of unknown variant they may be copies of any."""
    full = {s.variant for s in found if not s.precision}
    return [s for s in found if not s.precision or (s.variant not in full and not (full and s.variant is None))]


def _expected(variant: str) -> str:
    place = {
        "distill": "distill_models/distill_model.safetensors or .pt",
        "causvid": "causvid_models/causal_model.safetensors or .pt",
        "base": "diffusion_pytorch_model*.safetensors",
    }.get(variant)
    return f"{place} is missing" if place else "no file named after it"


def _holds(layout: Layout) -> str:
    inside = sorted({s.component for s in layout.sources})
    if inside:
        return f"it holds {', '.join(inside)}"
    reasons = _reasons(layout)
    inspect = shipped.command(f"convert inspect {layout.path}")
    return f"no Wan2.1 weights found{reasons}; `{inspect}` lists what is there"


def _reasons(layout: Layout) -> str:
    text = "; ".join(f"{path.name}: {reason}" for path, reason in layout.left_out[:5])
    return f" ({text})" if text else ""
