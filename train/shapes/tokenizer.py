"""The word-level tokenizer of Moving Shapes, in the file format that the full-size models use."""

import pathlib

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from .world import vocabulary

# The same ids as UMT5's special tokens.
_SPECIAL = ("<pad>", "</s>", "<unk>")
TEXT_LEN = 16


def make_tokenizer() -> Tokenizer:
    words = [*_SPECIAL, *vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    punctuation = normalizers.Replace(Regex(r"[^\w\s]+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), punctuation])  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # pyright: ignore
    return tokenizer


def write_tokenizer(path: pathlib.Path) -> None:
    """Writes tokenizer.json."""
    make_tokenizer().save(str(path))
