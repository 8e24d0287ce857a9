"""One rule for files of prompts: comments and blank lines are left out, JSON lines say more, - is standard input."""

import io
import pathlib

import pytest

from x2v_jax.errors import UserError
from x2v_jax.request.prompt_file import Prompt, read_prompts, unused_fields


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "prompts.txt"


def test_a_line_is_a_prompt_and_comments_and_blank_lines_are_none(file: pathlib.Path):
    file.write_bytes("\ufeff# a list\r\n a cat \r\n\r\n\t\n  # not this\n{red|blue} dog #1\nein\u2028Hund".encode())
    found = read_prompts(file, "config.prompt_file")
    assert [prompt.text for prompt in found] == ["a cat", "{red|blue} dog #1", "ein\u2028Hund"]
    assert found[1] == Prompt("{red|blue} dog #1", {}, "", f"{file}, line 6")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_json_lines_set_fields_of_the_video(name: str, tmp_path: pathlib.Path):
    (tmp_path / "a.png").touch()
    (tmp_path / name).write_text(
        '# comment\n{"prompt": "a cat", "image": "a.png", "seed": 3, "size": "480x832", "output": "cat.mp4"}\n\n'
        '{"prompt": "a dog", "size": [64, 96], "image": "none.png", "num_frames": 5}\n'
    )
    cat, dog = read_prompts(tmp_path / name, "f")
    assert cat.fields == {"image": str(tmp_path / "a.png"), "seed": 3, "height": 480, "width": 832}
    assert cat.output == "cat.mp4" and dog.output == ""
    assert dog.fields == {"image": "none.png", "num_frames": 5, "height": 64, "width": 96}
    assert unused_fields([cat, dog], ["image"]) == ["height", "num_frames", "output", "seed", "width"]


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"# x\na cat\n")))
    assert read_prompts("-", "f") == (Prompt("a cat", {}, "", "standard input, line 2"),)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "has no prompt in it; write one a line"),
        (b"# only\n \n", "has no prompt in it"),
        (b"fine\ncaf\xe9\n", "line 2 is not UTF-8"),
        (b'{"prompt": "a"}\nb\n', "line 2 is no JSON object"),
        (b'{"prompt": "a"}\n{"seed": 3}\n', "line 2 has no prompt"),
        (b'{"prompt": 3}\n', "line 1 has a strange prompt"),
        (b'{"prompt": "a", "sede": 3}\n', "line 1 has the key 'sede'; did you mean seed"),
        (b'{"prompt": "a", "size": 480}\n', 'line 1 has the size 480; write "480x832"'),
        (b'{"prompt": "a", "size": "4x8", "width": 8}\n', "size and height or width"),
        (b'{"prompt": "a", "output": 3}\n', "has the output 3"),
    ],
)
def test_what_is_no_list_of_prompts_is_a_sentence(data: bytes, sentence: str, file: pathlib.Path):
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"config.prompt_file: .*{sentence}"):
        read_prompts(file, "config.prompt_file")


def test_no_file_and_a_folder_are_sentences(tmp_path: pathlib.Path):
    for path in (tmp_path, tmp_path / "none", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match=r"^f: .*(is a folder|cannot be read)"):
            read_prompts(path, "f")
