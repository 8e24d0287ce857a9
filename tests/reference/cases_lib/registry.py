"""Which function answers which kind of case. A new kind is one line here and one function."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tests.reference.cases_lib import kinds_causal, kinds_dmd, kinds_lora, kinds_networks, kinds_samplers
from tests.reference.cases_lib.case import Case


class Kind(NamedTuple):
    """How to compute a kind of case: output name -> array, in the recorded layouts."""

    run: Callable[[Case], Mapping[str, Any]]
    what: str
    # Float32 against float32: differences of summation order. A kind that runs its network tens of times allows more.
    tolerance: float = 2e-4


class UnknownKind(LookupError):
    """No function answers this kind of case."""


KINDS: dict[str, Kind] = {
    "dit": Kind(kinds_networks.dit, "diffusion transformer, one forward pass"),
    "vae": Kind(kinds_networks.vae, "causal VAE, encode and decode"),
    "umt5": Kind(kinds_networks.umt5, "UMT5 text encoder"),
    "clip": Kind(kinds_networks.clip, "CLIP visual tower"),
    "step_distill": Kind(kinds_samplers.step_distill_trajectory, "step-distilled sampling, every step"),
    "unipc": Kind(kinds_samplers.unipc_trajectory, "UniPC sampling, every step"),
    "causal_training_forward": Kind(kinds_causal.causal_training_forward, "block-causal forward pass of training"),
    "causal_rollout": Kind(kinds_causal.causal_rollout, "Self-Forcing, block by block with a cache", tolerance=1e-4),
    "causvid_rollout": Kind(kinds_causal.causvid_rollout, "CausVid, fragment by fragment", tolerance=1e-3),
    "dmd_loss": Kind(kinds_dmd.dmd_loss, "distribution matching loss and its gradient"),
    "lora": Kind(kinds_lora.lora, "LoRA merged into the weights"),
}
