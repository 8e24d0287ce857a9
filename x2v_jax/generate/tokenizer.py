"""Prompts -> token ids, as Wan2.1 does it: cleaned, ended with </s>, cut and padded to a fixed length.

Source: Wan2.1 wan/modules/tokenizers.py with clean="whitespace". Files are the `tokenizer.json` of Hugging Face's
tokenizers library; Wan2.1's is google/umt5-xxl's.
"""

import html
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Int

from x2v_jax.errors import UserError

_END = "</s>"
_PAD_NAMES = ("<pad>", "[PAD]")


def clean(text: str) -> str:
    """Mends broken Unicode, resolves HTML entities (twice: "&amp;quot;" occurs) and collapses white space."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """Turns prompts into ids and a mask of a fixed length."""

    def __init__(self, backend: Any, text_len: int):
        """See `from_file`. backend: a `tokenizers.Tokenizer`; its truncation and padding settings are replaced."""
        if text_len < 2:
            raise UserError(f"text_len is {text_len}; a prompt needs at least 2 tokens: one and {_END}")
        _end_every_prompt(backend)
        pad_id, pad_token = _padding(backend)
        backend.enable_truncation(max_length=text_len)
        backend.enable_padding(length=text_len, pad_id=pad_id, pad_token=pad_token)
        self._backend = backend
        self.text_len = text_len
        self.pad_id = pad_id

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], text_len: int = 512) -> Self:
        """Reads a tokenizer.json, or the folder that holds one.

        Raises:
            UserError: the file is missing, is not a tokenizer.json, or names no padding token.
        """
        from tokenizers import Tokenizer as Backend

        path = pathlib.Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            hint = "; spiece.model alone is not enough" if (path.parent / "spiece.model").is_file() else ""
            raise UserError(
                f"tokenizer {str(path)!r} does not exist{hint}; copy google/umt5-xxl's tokenizer.json there"
            )
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # The library raises bare Exception.
            message = str(error)[:200]
            raise UserError(
                f"tokenizer {str(path)!r} is damaged or is no tokenizer.json ({message}); copy it again"
            ) from error
        try:
            return cls(backend, text_len)
        except UserError as error:
            raise UserError(f"tokenizer {str(path)!r}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """How many ids there are: the text encoder's table must have at least so many rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __call__(self, prompts: Sequence[str]) -> tuple[Int[np.ndarray, "b l"], Int[np.ndarray, "b l"]]:
        """Encodes prompts. What is longer than `text_len` tokens is cut; </s> always stands at the end.

        Args:
            prompts: any texts; empty ones become </s> alone.

        Returns:
            ids and mask (1 for tokens, 0 for padding), both int32 [B, text_len].
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one string; give a list of strings")
        encodings = self._backend.encode_batch([_encodable(clean(prompt)) for prompt in prompts])
        shape = (len(encodings), self.text_len)
        ids = np.array([e.ids for e in encodings], np.int32).reshape(shape)
        return ids, np.array([e.attention_mask for e in encodings], np.int32).reshape(shape)

    def num_tokens(self, prompt: str) -> int:
        """How many tokens the whole prompt has, </s> included: more than `text_len` means that its end is not read."""
        encoding = self._backend.encode(_encodable(clean(prompt)))
        pieces = [encoding, *encoding.overflowing]
        content = sum(piece.special_tokens_mask.count(0) for piece in pieces)
        return content + self._backend.num_special_tokens_to_add(False)


def _encodable(text: str) -> str:
    # Half of a surrogate pair (from a wrongly decoded command line) has no UTF-8 form, which the library needs.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _end_every_prompt(backend: Any) -> None:
    """Some exports of T5 tokenizers lack the step that appends </s>; the text encoder was trained with it."""
    end_id = backend.token_to_id(_END)
    if end_id is None or backend.num_special_tokens_to_add(False):
        return
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, end_id)])


def _padding(backend: Any) -> tuple[int, str]:
    if backend.padding:
        return backend.padding["pad_id"], backend.padding["pad_token"]
    for name in _PAD_NAMES:
        if (pad_id := backend.token_to_id(name)) is not None:
            return pad_id, name
    raise UserError(f"it has no padding token ({' or '.join(_PAD_NAMES)}); add one to its added_tokens")
