"""Prompts to ids: cleaning, end, cutting, padding, and files that are not tokenizers."""

import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from x2v_jax.errors import UserError
from x2v_jax.generate.tokenizer import Tokenizer, clean

_PIECES = ["▁a", "▁red", "▁circle", "▁moves", "▁left", "▁", "a", "e", "t"]


def _backend(names=("<pad>", "</s>", "<unk>"), end=True) -> Backend:
    pieces = [(name, 0.0) for name in names] + [(piece, -1.0 - i) for i, piece in enumerate(_PIECES)]
    backend = Backend(models.Unigram(pieces, names.index("<unk>"), False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(list(names))
    if end:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", names.index("</s>"))]
        )
    return backend


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tokenizer.json"
    _backend().save(str(path))
    return path


def test_prompts_end_with_the_end_token_and_are_padded(file):
    ids, mask = Tokenizer.from_file(file, 8)(["a red circle moves left", "a red"])
    np.testing.assert_array_equal(ids, [[3, 4, 5, 6, 7, 1, 0, 0], [3, 4, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask, [[1] * 6 + [0] * 2, [1] * 3 + [0] * 5])
    assert ids.dtype == mask.dtype == np.int32


def test_an_empty_prompt_is_the_end_token_alone(file):
    for prompt in ("", "  \n\t "):
        ids, mask = Tokenizer.from_file(file, 4)([prompt])
        assert ids.tolist() == [[1, 0, 0, 0]] and mask.tolist() == [[1, 0, 0, 0]]


def test_a_long_prompt_is_cut_and_still_ends_with_the_end_token(file):
    tokenizer = Tokenizer.from_file(file, 6)
    ids, mask = tokenizer(["a red circle moves left a red"])
    assert ids.tolist() == [[3, 4, 5, 6, 7, 1]] and mask.all()
    ids, mask = Tokenizer.from_file(file, 512)(["a red circle moves left " * 417])  # 10,008 characters
    assert ids.shape == (1, 512) and ids[0, -1] == 1 and (ids[0, :-1] != 1).all() and mask.all()


def test_a_prompt_that_just_fits_is_not_cut(file):
    assert Tokenizer.from_file(file, 6)(["a red circle moves left"])[0].tolist() == [[3, 4, 5, 6, 7, 1]]


def test_a_long_prompt_without_spaces_works(file):
    ids, mask = Tokenizer.from_file(file, 512)(["x" * 10_000])
    assert ids.shape == (1, 512) and mask.any()


def test_tells_how_long_a_prompt_is_before_cutting(file):
    tokenizer = Tokenizer.from_file(file, 4)
    assert [tokenizer.num_tokens(p) for p in ("", "a red", "a red circle", "a red circle moves left " * 20)] == [
        1, 3, 4, 101,
    ]  # fmt: skip


def test_no_prompts_give_no_rows(file):
    ids, mask = Tokenizer.from_file(file, 4)([])
    assert ids.shape == mask.shape == (0, 4)


def test_one_string_is_not_a_list_of_prompts(file):
    with pytest.raises(TypeError, match="list of strings"):
        Tokenizer.from_file(file, 4)("a red circle")


def test_half_a_surrogate_pair_is_replaced(file):
    assert Tokenizer.from_file(file, 8)(["a \ud83d red"])[0].shape == (1, 8)


def test_the_padding_id_comes_from_the_file(tmp_path):
    backend = _backend(names=("</s>", "<unk>", "<pad>"))
    backend.save(str(tmp_path / "by_name.json"))
    assert Tokenizer.from_file(tmp_path / "by_name.json", 5)(["a"])[0].tolist() == [[3, 0, 2, 2, 2]]
    backend.enable_padding(pad_id=1, pad_token="<unk>")
    backend.save(str(tmp_path / "by_setting.json"))
    assert Tokenizer.from_file(tmp_path / "by_setting.json", 5)(["a"])[0].tolist() == [[3, 0, 1, 1, 1]]


def test_truncation_saved_in_the_file_is_overruled(tmp_path):
    backend = _backend()
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(tmp_path, 6)(["a red circle moves left"])[0].tolist() == [[3, 4, 5, 6, 7, 1]]


def test_an_export_that_forgets_the_end_token_is_mended(tmp_path):
    _backend(end=False).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path, 4)
    assert tokenizer(["a red"])[0].tolist() == [[3, 4, 1, 0]]
    assert tokenizer.num_tokens("a red") == 3


def test_knows_the_size_of_its_vocabulary(file):
    assert Tokenizer.from_file(file, 4).vocab_size == 3 + len(_PIECES)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        ("  a \t red\n\ncircle  ", "a red circle"),
        ("wide\u3000and\u00a0hard", "wide and hard"),
        ("caf\u00c3\u00a9", "café"),  # UTF-8 read as Latin-1
        ("&amp;quot;a&amp;quot; &lt;b&gt;", '"a" <b>'),
        ("a&nbsp;b", "a b"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("一个红色的圆", "一个红色的圆"),
        ("zero\u0000byte", "zerobyte"),
    ],
)
def test_cleaning(text, cleaned):
    assert clean(text) == cleaned
    assert clean(cleaned) == cleaned


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x80\x81", b"[]", b"{}", b'{"version": "1.0"}', b'{"model": {"type": "None"}}']
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json.*damaged"):
        Tokenizer.from_file(path)


def test_a_file_cut_short_is_named(file):
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"tokenizer\.json.*damaged"):
        Tokenizer.from_file(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json.*does not exist"):
        Tokenizer.from_file(tmp_path / "nowhere.json")
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"does not exist; spiece\.model alone is not enough"):
        Tokenizer.from_file(tmp_path)


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    _backend(names=("<unk>", "</s>")).save(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json.*padding token"):
        Tokenizer.from_file(path)


def test_a_text_length_that_holds_no_token_is_refused(file):
    with pytest.raises(UserError, match="text_len is 1"):
        Tokenizer.from_file(file, 1)


def test_importing_it_loads_neither_jax_nor_the_library():
    code = (
        "import sys, x2v_jax.generate.tokenizer; print([m for m in ('jax', 'tokenizers', 'ftfy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
