"""Who computes the large operations of the networks, and in which precision."""

import dataclasses
from typing import Literal, get_args

from x2v_jax.errors import UserError

AttentionImplementation = Literal["auto", "reference", "cudnn", "hopper"]
AttentionPrecision = Literal["full", "int8", "e4m3", "int8_e4m3", "e4m3_all"]
LinearImplementation = Literal["auto", "reference", "xla", "hopper"]
LinearActivations = Literal["8bit", "16bit"]

# Names are what the keys of configs and the flags of the command line take.
CHOICES: dict[str, tuple[str, ...]] = {
    "attention": get_args(AttentionImplementation),
    "attention_precision": get_args(AttentionPrecision),
    "linear": get_args(LinearImplementation),
    "linear_activations": get_args(LinearActivations),
}


@dataclasses.dataclass(frozen=True)
class OpChoice:
    """The choice that a network hands to its operations; hashable, so that a compiled program can depend on it.

    Attributes:
        attention: who computes the transformer's attention (the encoders' is short and left alone). "auto" takes the
            fastest that this device, shape and precision have.
        attention_precision: "full" keeps the type of queries, keys and values; "int8" and "e4m3" multiply queries with
            keys in 8 bits, "int8_e4m3" and "e4m3_all" also probabilities with values, in e4m3. Nothing lowers the
            precision by itself.
        linear: who computes linear layers whose weights are 8-bit (others are always left to XLA), and the norms that
            are fused with what follows them.
        linear_activations: "8bit" quantizes their inputs row by row as they come; "16bit" multiplies the weights out,
            which is slower and more exact.

    Raises:
        UserError: a value is not one of `CHOICES`.
    """

    attention: AttentionImplementation = "auto"
    attention_precision: AttentionPrecision = "full"
    linear: LinearImplementation = "auto"
    linear_activations: LinearActivations = "8bit"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


DEFAULT_OPS = OpChoice()
