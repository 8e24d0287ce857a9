"""Which function answers which kind of case. A new kind is one line here and one function."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.reference_cases import kinds_lora, kinds_networks, kinds_samplers
from benchmarks.reference_cases.case import Case


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
    "lora": Kind(kinds_lora.lora, "LoRA merged into the weights"),
}

# Recorded for the autoregressive models and their training, which are not part of the library yet.
LATER_KINDS = frozenset({"causal_rollout", "causvid_rollout", "causal_training_forward", "dmd_loss"})
