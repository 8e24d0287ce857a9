"""Prompts files and their embeddings: what the pipeline computes, stored without padding, bound to its encoder."""

import json
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
from tiny_models import BASE, TEXT, random_parameters, write_checkpoint

from train.data import prompts as prompts_module
from train.data.cache_format import Plan, fingerprint
from train.data.check import check
from train.data.prompts import PromptCache, make_prompt_cache, read_prompts
from train.prepare.__main__ import main
from x2v_jax.checkpoint.names.wan import table
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.errors import UserError
from x2v_jax.generate.clock import Clock
from x2v_jax.generate.network import Network
from x2v_jax.generate.text import PromptEncoder

PROMPTS = ["a red circle moves left", "blue", "a square moves right a square moves right a square", "red circle", "a"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def expected(checkpoint) -> np.ndarray:
    network = Network("text_encoder", TEXT, checkpoint.tensors("text_encoder"), dtype="float32")
    return np.stack(PromptEncoder(checkpoint, network, 12)([*PROMPTS, "bad"], Clock()))


def make(path: pathlib.Path, checkpoint, **changes) -> PromptCache:
    arguments = {"dtype": "float32", "compute": "float32", "batch_size": 2, "rows_per_shard": 4}
    return make_prompt_cache(path, PROMPTS, checkpoint, **(arguments | changes))


def test_embeddings_are_the_pipelines(tmp_path: pathlib.Path, checkpoint, expected: np.ndarray):
    cache = make(tmp_path / "cache", checkpoint)
    assert len(cache) == 5 and cache.prompts == PROMPTS and cache.negative_prompt == "bad"
    assert (cache.text_len, cache.dim) == (12, 24)
    assert cache.embeddings([0]).dtype == np.float32
    np.testing.assert_allclose(cache.embeddings([4, 0, 2, 2]), expected[[4, 0, 2, 2]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.negative, expected[5], rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError, match="5 prompts"):
        cache.embeddings([5])
    assert not check(tmp_path / "cache").problems


def test_only_real_tokens_are_stored_in_bfloat16(tmp_path: pathlib.Path, checkpoint, expected: np.ndarray):
    cache = make(tmp_path / "cache", checkpoint, dtype="bfloat16", negative_prompt="blue")
    rounded = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(cache.embeddings(range(5)), rounded[:5], rtol=1e-2, atol=1e-4)
    np.testing.assert_array_equal(cache.negative, cache.embeddings([1])[0])
    sizes = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    assert sizes < 6 * 12 * 24 * 2 + 1500


def test_padding_to_a_shorter_length_changes_nothing(tmp_path, checkpoint, expected, monkeypatch):
    monkeypatch.setattr(prompts_module, "_SHORTEST", 2)
    cache = make(tmp_path / "cache", checkpoint)
    np.testing.assert_allclose(cache.embeddings(range(5)), expected[:5], rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_encodes_only_what_is_missing(tmp_path: pathlib.Path, checkpoint, expected: np.ndarray):
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cache", checkpoint, progress=stop)
    with pytest.raises(UserError, match="1 of 2 shards"):
        PromptCache.open(tmp_path / "cache")
    cache = make(tmp_path / "cache", checkpoint, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 6), (4, 6), (4, 6), (6, 6)]
    np.testing.assert_allclose(cache.embeddings(range(5)), expected[:5], rtol=1e-4, atol=1e-5)


def test_a_cache_is_bound_to_the_encoder_that_made_it(tmp_path: pathlib.Path, checkpoint):
    cache = make(tmp_path / "cache", checkpoint)
    cache.require(checkpoint)
    parts = {"text_encoder": (TEXT, random_parameters("text_encoder", TEXT, seed=9))}
    other = open_checkpoint(write_checkpoint(tmp_path / "other", changes={"components": parts}))
    with pytest.raises(UserError, match="made with another text_encoder"):
        cache.require(other)
    with pytest.raises(UserError, match="text_encoder was"):
        make(tmp_path / "cache", other)


def test_the_fingerprint_does_not_depend_on_the_stored_type(tmp_path: pathlib.Path, checkpoint):
    plain = random_parameters("text_encoder", TEXT)
    small = {name: values.astype(ml_dtypes.bfloat16) for name, values in plain.items()}
    copy = open_checkpoint(write_checkpoint(tmp_path / "copy", changes={"components": {"text_encoder": (TEXT, small)}}))
    assert fingerprint(copy, "text_encoder") == fingerprint(checkpoint, "text_encoder")
    assert len(table("text_encoder", TEXT)) == len(small)
    small["norm.scale"] = small["norm.scale"] * 2
    changes = {"components": {"text_encoder": (TEXT, small)}}
    changed = open_checkpoint(write_checkpoint(tmp_path / "changed", changes=changes))
    assert fingerprint(changed, "text_encoder") != fingerprint(checkpoint, "text_encoder")


def test_prompts_are_read_line_by_line(tmp_path: pathlib.Path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffein Kreis \r\nein\u2028Quadrat\na\nein Kreis\n".encode())
    texts, notes = read_prompts(file)
    assert texts == ["ein Kreis", "ein\u2028Quadrat", "a", "ein Kreis"]
    assert notes == ["1 prompts occur again and are kept (line 4 repeats line 1)"]
    file.write_text("no newline at the end")
    assert read_prompts(file) == (["no newline at the end"], [])


def test_blank_lines_and_comments_are_skipped_and_json_lines_are_read(tmp_path: pathlib.Path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\n\n# not this\nb\n  \n\n")
    assert read_prompts(file) == (["a", "b"], [])
    file.write_text('{"prompt": "a", "seed": 1}\n\n{"prompt": "b", "output": "b.mp4"}\n')
    assert read_prompts(file) == (["a", "b"], ["output, seed of its lines are for videos and are left out"])
    file.write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    with pytest.raises(UserError, match=r"line 2 is blank.*--skip-blank"):
        read_prompts(file)
    assert read_prompts(file, skip_blank=True) == (["a"], ["1 blank prompts left out (line 2)"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "does not exist"),
        (b"", "has no prompt in it"),
        (b"\n \n", "has no prompt in it"),
        (b"fine\ncaf\xe9\n", "line 2 is not UTF-8"),
    ],
)
def test_what_is_no_prompts_file_is_a_sentence(tmp_path: pathlib.Path, data: bytes | None, message: str):
    file = tmp_path / "prompts.txt"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_prompts(file)


def test_a_folder_of_text_files_is_read_by_name(tmp_path: pathlib.Path):
    for name, text in (("b.txt", "second\n"), ("a.txt", "first"), ("c.md", "no")):
        (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path) == (["first", "second"], [])
    (tmp_path / "d.txt").write_text("\n")
    with pytest.raises(UserError, match=r"d\.txt is blank"):
        read_prompts(tmp_path)


def test_the_command_makes_a_cache_and_check_finds_damage(tmp_path: pathlib.Path, checkpoint, capsys):
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("\n".join(PROMPTS))
    command = ["prompts", str(file), str(out), "--checkpoint", str(checkpoint.path), "--compute", "float32"]
    assert main(command) == 0
    assert "5 prompts, 12 x 24" in capsys.readouterr().out
    assert main(command) == 0, "a finished cache is taken as it is"
    assert main(["check", str(out)]) == 0
    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    capsys.readouterr()
    assert main(["check", str(out)]) == 1
    assert re.search(rf"broken: .*{shard.name}.*SHA-256 differs", capsys.readouterr().out)
    file.write_text("# none\n\n")
    assert main([*command[:2], str(tmp_path / "new"), *command[3:]]) == 2
    assert "has no prompt in it" in capsys.readouterr().err


def test_mistakes_on_the_command_line_are_sentences(tmp_path: pathlib.Path, capsys):
    assert main(["prompts", "x"]) == 2
    assert "error: the following arguments are required" in capsys.readouterr().err
    assert main(["videos", "x", "y", "--checkpoint", "z", "--height", "0"]) == 2
    assert "'0' is no whole number above 0" in capsys.readouterr().err
    assert main(["check", str(tmp_path)]) == 2
    assert "no cache of training data" in capsys.readouterr().err


def test_the_layout_on_disk_is_documented(tmp_path: pathlib.Path, checkpoint):
    make(tmp_path / "cache", checkpoint)
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert index["format"] == "x2v-jax-cache" and index["kind"] == "prompts" and index["count"] == 6
    assert index["settings"]["text_encoder"] == fingerprint(checkpoint, "text_encoder")
    assert [set(shard) for shard in index["shards"]] == [{"file", "count", "sha256"}] * 2
    plan, _ = Plan.read(tmp_path / "cache")
    assert plan.items[-1] == {"text": BASE.negative_prompt}
