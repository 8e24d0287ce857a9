"""What the names inside a LoRA file mean: one grammar for every dialect in which Wan LoRAs are published.

A key is prefix + module + role, for instance `diffusion_model.` + `blocks.0.self_attn.q` + `.lora_down.weight`.
`parse_key` finds the role without knowing a model; `ModelNames` finds the module among the parameters of a real
model, so that underscored names (`lora_unet_blocks_0_self_attn_q`), which cannot be split by rule, have one answer.

Dialects: peft and diffusers (`lora_A`, `lora_B`, with or without an adapter's name), LightX2V and ComfyUI
(`lora_down`, `lora_up`, `alpha`, `diff`, `diff_b`, `diff_m`), kohya, musubi and VideoX-Fun (`lora_unet_…`), LyCORIS
and ai-toolkit (`lycoris_…`, `w_norm`, `b_norm`), DiffSynth (`pipe.dit.…`); modules by official or diffusers names.
"""

import dataclasses
import enum
import re
from collections.abc import Iterable, Iterator

from x2v_jax.checkpoint.names.diffusers import DiffusersNames


class Role(enum.StrEnum):
    """What one tensor of a LoRA file does to its module."""

    DOWN = "down"  # [rank, in]
    UP = "up"  # [out, rank]
    UP_BIAS = "up_bias"  # bias of `up`, scaled like the pair (peft's lora_bias)
    ALPHA = "alpha"  # scalar: the pair is scaled by alpha / rank
    WEIGHT_DIFF = "weight_diff"
    BIAS_DIFF = "bias_diff"
    MODULATION_DIFF = "modulation_diff"


_ADAPTER = r"(?:\.(?P<adapter>(?!weight\Z|bias\Z)[^.]+))?"

_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = tuple(
    (re.compile(pattern + r"\Z"), role)
    for pattern, role in (
        (rf"\.(?:lora_A|lora_down){_ADAPTER}(?:\.weight)?", Role.DOWN),
        (rf"\.(?:lora_B|lora_up){_ADAPTER}(?:\.weight)?", Role.UP),
        (r"\.(?:lora|lora_linear_layer)\.down\.weight", Role.DOWN),
        (r"\.(?:lora|lora_linear_layer)\.up\.weight", Role.UP),
        (rf"\.(?:lora_B|lora_up){_ADAPTER}\.bias", Role.UP_BIAS),
        (r"\.alpha", Role.ALPHA),
        (r"\.(?:diff|w_norm)", Role.WEIGHT_DIFF),
        (r"\.(?:diff_b|b_norm)", Role.BIAS_DIFF),
        (r"\.diff_m", Role.MODULATION_DIFF),
    )
)

# Parametrisations that are not "W + up @ down". Dropping their extra tensors would give a wrong model without an error.
_REFUSED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(r"(?:\A|\.)(?:" + pattern + r")(?:\.|\Z)"), name)
    for pattern, name in (
        (r"dora_scale|lora_magnitude_vector|lora_magnitude", "DoRA"),
        (r"hada_(?:w[12]_[ab]|t[12])", "LoHa"),
        (r"lokr_(?:w[12](?:_[ab])?|t[12])", "LoKr"),
        (r"oft_blocks|oft_diag|oft_[RS]", "OFT"),
        (r"boft_[RS]|vera_lambda_[bd]|ia3_l|on_input", "BOFT, VeRA or IA3"),
        (r"[ab][12]\.weight", "GLoRA"),
        (r"lora_mid", "LoCon with a middle (Tucker) tensor"),
        (r"lora_embedding_[AB]", "embedding LoRA"),
        (r"reshape_weight|set_weight", "ComfyUI's weight-replacing"),
        (r"scalar", "LyCORIS with a trained scalar"),
        (r"[qkv]_loras", "Stand-In"),
    )
)


@dataclasses.dataclass(frozen=True)
class ParsedKey:
    """One key of a LoRA file: the module as the file writes it (prefix included), the role, peft's adapter name."""

    module: str
    role: Role
    adapter: str | None = None


def parse_key(key: str) -> ParsedKey | None:
    """Splits a key into module and role.

    Returns:
        None when the key has no role that a LoRA's tensor can have (for instance a plain `….weight`).

    >>> parse_key("diffusion_model.blocks.0.self_attn.q.lora_A.default.weight")
    ParsedKey(module='diffusion_model.blocks.0.self_attn.q', role=<Role.DOWN: 'down'>, adapter='default')
    """
    for pattern, role in _ROLES:
        match = pattern.search(key)
        if match and match.start() > 0:
            return ParsedKey(key[: match.start()], role, match.groupdict().get("adapter"))
    return None


def refused_kind(key: str) -> str | None:
    """The name of the parametrisation that a key belongs to if it is one that cannot be merged as a LoRA, else None."""
    return next((name for pattern, name in _REFUSED if pattern.search(key)), None)


# Wrappers around the transformer's own names; stripped one at a time until a module of the model is found.
_PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "model.",
    "module.",
    "unet.",
    "dit.",
    "state_dict.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)

# What torch's compile, FSDP and activation checkpointing insert at any depth.
_WRAPPERS = re.compile(r"(?:\A|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# A module's parameter by role. "" stands for names that are a parameter themselves (`blocks.0.modulation`).
_LEAVES = {
    Role.DOWN: (".weight",),
    Role.UP: (".weight",),
    Role.UP_BIAS: (".bias",),
    Role.ALPHA: (".weight",),
    Role.WEIGHT_DIFF: (".weight", ""),
    Role.BIAS_DIFF: (".bias",),
    Role.MODULATION_DIFF: (".modulation", ".scale_shift_table", ""),
}


class ModelNames:
    """Finds the parameter of one model that a LoRA's module and role speak of.

    Args:
        keys: the official names of the transformer's parameters (`blocks.0.self_attn.q.weight`, …).
    """

    def __init__(self, keys: Iterable[str]):
        self._dotted: dict[str, str] = {}
        self._underscored: dict[str, set[str]] = {}
        diffusers = DiffusersNames("transformer")
        for key in keys:
            for alias in {key, *_diffusers_aliases(diffusers, key)}:
                self._dotted.setdefault(alias, key)
                self._underscored.setdefault(alias.replace(".", "_"), set()).add(key)

    def parameter(self, module: str, role: Role) -> str | None:
        """The official key that `role` of a module, named as the file names it, changes.

        Returns:
            None when the model has no such parameter, or when an underscored name fits more than one.
        """
        for name in _without_prefixes(module):
            for leaf in _LEAVES[role]:
                alias = name + leaf
                if alias in self._dotted:
                    return self._dotted[alias]
                candidates = self._underscored.get(alias.replace(".", "_"), ())
                if len(candidates) == 1:
                    return next(iter(candidates))
        return None


def _diffusers_aliases(names: DiffusersNames, key: str) -> Iterator[str]:
    try:
        (alias,), _ = names.format(key)
    except KeyError:
        return
    yield alias
    # FastVideo and older diffusers files leave out the output projection's place in its Sequential.
    yield alias.replace(".to_out.0.", ".to_out.")


def bare_module(written: str) -> str:
    """A file's module name without any known prefix."""
    *_, bare = _without_prefixes(written)
    return bare


def _without_prefixes(name: str) -> Iterator[str]:
    name = _WRAPPERS.sub("", name)
    yield name
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
        if not name:
            return
        yield name
