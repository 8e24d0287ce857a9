"""Prompts -> text embeddings, remembered on the host, so that the text encoder need not stay on the device."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float

from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.errors import UserError
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.network import Network
from x2v_jax.generate.programs import Program
from x2v_jax.generate.tokenizer import Tokenizer
from x2v_jax.models.config import Umt5Config
from x2v_jax.request.resolve import ResolvedRequest

Embedding = Float[np.ndarray, "l d"]
# At full size a whole embedding is 8 MB; kept without its padding, a usual prompt is 1 MB.
_REMEMBERED = 1024


class PromptEncoder:
    """The tokenizer and the text encoder of a checkpoint.

    Args:
        checkpoint: where the tokenizer's file is.
        network: the text encoder.
        text_len: tokens that the transformer reads; longer prompts are cut, with a warning.
    """

    def __init__(self, checkpoint: NativeCheckpoint, network: Network[Umt5Config], text_len: int):
        self.network = network
        self._checkpoint = checkpoint
        self._text_len = text_len
        self._tokenizer: Tokenizer | None = None
        self._known: OrderedDict[str, Embedding] = OrderedDict()
        self._encode = network.jit(lambda encoder, ids, mask: encoder(ids, mask))

    def __call__(self, prompts: Sequence[str], clock: Clock) -> list[Embedding]:
        """float32 [text_len, D] of each prompt, zero past its end. The encoder is loaded only for new prompts.

        Args:
            clock: takes the time of "load" and "text".

        Raises:
            UserError: the tokenizer is missing or belongs to another model.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if missing:
            with clock("load"):
                params, tokenizer = self.network.load(), self._load_tokenizer()
            with clock("text"):
                for prompt in missing:
                    ids, mask = tokenizer([prompt])
                    self._known[prompt] = np.asarray(self._encode(params, ids, mask))[0, : mask.sum()].copy()
                    _warn_if_cut(tokenizer, prompt)
        found = []
        for prompt in prompts:
            self._known.move_to_end(prompt)
            known = self._known[prompt]
            found.append(np.pad(known, ((0, self._text_len - len(known)), (0, 0))))
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found

    def programs(self) -> Iterator[Program]:
        """What encoding a prompt compiles."""
        ids = jax.ShapeDtypeStruct((1, self._text_len), np.int32)
        yield Program("text encoder", self._encode, (self.network.shapes, ids, ids))

    def _load_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            file = self._checkpoint.tokenizer_file()
            if file is None:
                raise UserError(f"{self._checkpoint.path} has no tokenizer; convert it again, or give text_embeddings")
            tokenizer = Tokenizer.from_file(file, self._text_len)
            if tokenizer.vocab_size > self.network.config.vocab_size:
                raise UserError(
                    f"the tokenizer {file} knows {tokenizer.vocab_size} tokens and the text encoder "
                    f"{self.network.config.vocab_size}; convert the checkpoint again with the right tokenizer.json"
                )
            self._tokenizer = tokenizer
        return self._tokenizer


def texts(request: ResolvedRequest, encoder: Callable[[], PromptEncoder], clock: Clock) -> list[Embedding]:
    """Embeddings of a request's prompts, encoded or from its file. encoder: asked for where there is one to encode."""
    given = request.inputs.text()
    if not given:
        return encoder()(request.prompts, clock)
    if not request.uses_guidance:
        return [given["text"]]
    negative = given.get("negative_text")
    if negative is None:
        negative = encoder()(request.prompts[:1], clock)[0]
    return [negative, given["text"]]


def _warn_if_cut(tokenizer: Tokenizer, prompt: str) -> None:
    count = tokenizer.num_tokens(prompt)
    if count > tokenizer.text_len:
        warnings.warn(f"prompt of {count} tokens is cut to the {tokenizer.text_len} that the model reads", stacklevel=4)
