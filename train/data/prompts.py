"""Prompts as text embeddings, made once, so that training needs no text encoder on the device.

UMT5-XXL is 5.7 billion parameters that no distillation trains. Only the rows of real tokens are stored: of a usual
prompt some sixty of 512, the rest is zero by definition.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import Float

from x2v_jax import shipped
from x2v_jax.errors import UserError
from x2v_jax.request.prompt_file import STDIN, unused_fields
from x2v_jax.request.prompt_file import read_prompts as read_prompt_file

from .cache import Cache, CacheWriter
from .cache_format import DTYPES, Plan, TensorSpec, fingerprint, require_same, rows_for

if TYPE_CHECKING:
    from x2v_jax.checkpoint.native.reader import NativeCheckpoint

Progress = Callable[[int, int], None]

_SHORTEST = 16  # tokens; shorter prompts are padded to it


class PromptCache:
    """Prompts with their embeddings.

    Attributes:
        path: the folder.
        prompts: the texts, by row.
        negative_prompt: the text of `negative`.
        text_len, dim: of an embedding.
    """

    def __init__(self, cache: Cache):
        """See `open`."""
        self._cache = cache
        self.path = cache.path
        self.prompts: list[str] = [item["text"] for item in cache.items[:-1]]
        self.negative_prompt: str = cache.items[-1]["text"]
        self.text_len: int = cache.settings["text_len"]
        self.dim: int = cache.tensors["tokens"].shape[0]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Opens what `python -m train.prepare prompts` made.

        Raises:
            UserError: no such cache, not complete, or damaged.
        """
        return cls(Cache.open(path, "prompts"))

    def __len__(self) -> int:
        return len(self.prompts)

    def embeddings(self, rows: Sequence[int] | np.ndarray) -> Float[np.ndarray, "n l d"]:
        """float32 [n, text_len, dim], zero past the end of each prompt.

        Raises:
            IndexError: there is no such row.
            UserError: a shard is missing or damaged.
        """
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"{self.path} has {len(self)} prompts, and row {row} is none of them")
        return self._embeddings(rows)

    @functools.cached_property
    def negative(self) -> Float[np.ndarray, "l d"]:
        """float32 [text_len, dim] of the negative prompt."""
        return self._embeddings([len(self)])[0]

    def require(self, checkpoint: "NativeCheckpoint") -> None:
        """Refuses to be used with a checkpoint whose text encoder, tokenizer or transformer gives other embeddings.

        Raises:
            UserError: it does.
        """
        if checkpoint.has("transformer"):
            config = checkpoint.config("transformer")
            if (config.text_len, config.text_dim) != (self.text_len, self.dim):
                raise UserError(
                    f"{self.path} has embeddings of {self.text_len} x {self.dim} and the transformer of "
                    f"{checkpoint.path} takes {config.text_len} x {config.text_dim}; prepare the prompts with that "
                    "checkpoint"
                )
        if checkpoint.has("text_encoder"):
            require_same(str(self.path), self._cache.settings["text_encoder"], checkpoint, "text_encoder", "prompts")

    def _embeddings(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        result = np.zeros((len(rows), self.text_len, self.dim), np.float32)
        for place, row in enumerate(rows):
            shard, position = self._cache.locate(int(row))
            tensors = self._cache.shard(shard)
            begin, end = tensors["starts"].read()[position : position + 2]
            if not 0 <= begin <= end <= min(begin + self.text_len, len(tensors["tokens"].read())):
                check = shipped.command(f"prepare check {self.path}")
                raise UserError(f"{self.path}: row {row} is damaged; run `{check}`")
            result[place, : end - begin] = tensors["tokens"].read()[begin:end]
        return result


def make_prompt_cache(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    checkpoint: "NativeCheckpoint",
    *,
    negative_prompt: str | None = None,
    dtype: str = "bfloat16",
    compute: str = "bfloat16",
    batch_size: int = 16,
    rows_per_shard: int | None = None,
    progress: Progress = lambda done, total: None,
) -> PromptCache:
    """Encodes prompts, or goes on with it where it was interrupted.

    Args:
        path: the folder to make.
        prompts: the texts, one a row.
        checkpoint: whose tokenizer and text encoder are used.
        negative_prompt: the checkpoint's own by default.
        dtype: of the stored embeddings, "bfloat16" or "float32".
        compute: of the text encoder's matmuls.
        batch_size: prompts encoded together.
        progress: called with (prompts done, prompts in all).

    Raises:
        UserError: the checkpoint has no text encoder or tokenizer, or the folder holds something else.
    """
    text_len = checkpoint.config("transformer").text_len if checkpoint.has("transformer") else 512
    config = checkpoint.config("text_encoder")
    negative = checkpoint.schedule.negative_prompt if negative_prompt is None else negative_prompt
    settings = {"text_len": text_len, "compute": compute, "text_encoder": fingerprint(checkpoint, "text_encoder")}
    specs = {"tokens": TensorSpec(dtype, (config.dim,), "any"), "starts": TensorSpec("int64", (), "rows + 1")}
    items = [{"text": prompt} for prompt in prompts]
    if not items:
        raise UserError("there are no prompts; give a file with one a line")
    # The negative prompt is the last row: it is encoded, stored and checked as the others are.
    items.append({"text": negative})
    guess = specs["tokens"].row_bytes * min(text_len, 64)
    plan = Plan("prompts", settings, specs, items, rows_per_shard or rows_for(guess))
    writer = CacheWriter(path, plan)
    pending = writer.pending()
    done = len(items) - sum(len(plan.rows(shard)) for shard in pending)
    progress(done, len(items))
    encoder = _Encoder(checkpoint, text_len, compute, batch_size) if pending else None
    for shard in pending:
        assert encoder is not None
        rows = plan.rows(shard)
        embeddings = encoder([items[row]["text"] for row in rows])
        starts = np.cumsum([0, *(len(e) for e in embeddings)]).astype(np.int64)
        writer.write(shard, {"tokens": np.concatenate(embeddings).astype(DTYPES[dtype]), "starts": starts})
        done += len(rows)
        progress(done, len(items))
    writer.finish()
    return PromptCache.open(path)


class _Encoder:
    """Texts -> the rows of their real tokens, float32."""

    def __init__(self, checkpoint: "NativeCheckpoint", text_len: int, compute: str, batch_size: int):
        from x2v_jax.generate.network import Network
        from x2v_jax.generate.tokenizer import Tokenizer

        file = checkpoint.tokenizer_file()
        if file is None:
            raise UserError(f"{checkpoint.path} has no tokenizer; convert it again with the folder that has one")
        self._tokenizer = Tokenizer.from_file(file, text_len)
        config = checkpoint.config("text_encoder")
        if self._tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer {file} knows {self._tokenizer.vocab_size} tokens and the text encoder "
                f"{config.vocab_size}; convert the checkpoint again with the right tokenizer.json"
            )
        network = Network.of(checkpoint, "text_encoder", dtype=compute)
        self._params = network.load()
        self._batch_size = batch_size
        self._precision = "highest" if compute == "float32" else None
        self._encode = network.jit(lambda encoder, ids, mask: encoder(ids, mask))

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        import jax

        ids, mask = self._tokenizer(texts)
        lengths = mask.sum(axis=1)
        result: list[np.ndarray] = [np.empty(0)] * len(texts)
        # Padding does not change the tokens before it, so prompts of like length are encoded at that length: usual
        # ones at an eighth of the cost of 512 tokens.
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            length = min(ids.shape[1], max(_SHORTEST, 1 << int(lengths[rows[-1]] - 1).bit_length()))
            filled = np.resize(rows, self._batch_size)  # the last batch repeats itself: one program a length
            with jax.default_matmul_precision(self._precision):
                hidden = np.asarray(self._encode(self._params, ids[filled, :length], mask[filled, :length]))
            for place, row in enumerate(rows):
                result[row] = hidden[place, : lengths[row]]
        return result


def read_prompts(source: str | os.PathLike[str], *, skip_blank: bool = False) -> tuple[list[str], list[str]]:
    """Prompts of a file by the rule of `request.prompt_file`, of a folder of .txt files (one a file, by name), or the
    captions of a cache of videos or images.

    Args:
        source: "-" for the standard input.
        skip_blank: leave out blank files and captions instead of refusing them.

    Returns:
        The prompts, and notes for the user: on what was left out, and on prompts that occur more than once.

    Raises:
        UserError: no such file, nothing in it, text that is not UTF-8, blank lines; with the line's number.
    """
    path = pathlib.Path(source)
    if not path.exists() and os.fspath(source) != STDIN:
        raise UserError(f"prompts file {str(path)!r} does not exist; give a text file with one prompt a line")
    left_out: list[str] = []
    if (path / "index.json").is_file():
        items = Cache.open(path, _kind_with_captions(path)).items
        entries = [(f"row {row}", str(item["text"])) for row, item in enumerate(items)]
    elif path.is_dir():
        entries = [(file.name, _text(file)) for file in sorted(path.glob("*.txt"))]
        if not entries:
            raise UserError(
                f"{path} holds no .txt files; give a file with one prompt a line, or a folder of such files"
            )
    else:
        prompts = read_prompt_file(source, "prompts")
        entries = [(prompt.where.rpartition(", ")[2], prompt.text) for prompt in prompts]
        if unused := unused_fields(prompts):
            left_out = [f"{', '.join(unused)} of its lines are for videos and are left out"]
    blank = [where for where, text in entries if not text.strip()]
    if len(blank) == len(entries):
        raise UserError(f"{path} holds no prompts; write one a line")
    if blank and not skip_blank:
        raise UserError(
            f"{path}: {_some(blank)} {'is' if len(blank) == 1 else 'are'} blank, and a blank prompt would train the "
            "model on nothing; remove them or give --skip-blank"
        )
    kept = [(where, text.strip()) for where, text in entries if text.strip()]
    notes = [f"{len(blank)} blank prompts left out ({_some(blank)})"] if blank else []
    return [text for _, text in kept], left_out + notes + _duplicates(kept)


def _kind_with_captions(path: pathlib.Path) -> str:
    from .cache_format import read_index

    kind = read_index(path)["kind"]
    if kind not in ("latents", "images"):
        raise UserError(f"{path} holds {kind}, which have no captions; give a cache of videos or images")
    return kind


def _text(file: pathlib.Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); mend its permissions") from None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file}: line {line} is not UTF-8 text; save the file as UTF-8") from None


def _duplicates(entries: Sequence[tuple[str, str]]) -> list[str]:
    first: dict[str, str] = {}
    again = []
    for where, text in entries:
        if text in first:
            again.append(f"{where} repeats {first[text]}")
        first.setdefault(text, where)
    return [f"{len(again)} prompts occur again and are kept ({_some(again)})"] if again else []


def _some(entries: Sequence[str], count: int = 5) -> str:
    more = f" and {len(entries) - count} more" if len(entries) > count else ""
    return ", ".join(entries[:count]) + more
