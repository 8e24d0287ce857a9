"""Sentences to users have words that users know: no name of a class of ours stands in one."""

import ast
import contextlib
import pathlib
import re
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = sorted(path for folder in ("x2v_jax", "convert", "infer", "train") for path in (ROOT / folder).rglob("*.py"))
sys.path.insert(0, str(ROOT / "tests/records"))
# Where a sentence names the type of something that the user made, and which therefore is none of ours.
OF_THE_USERS_OWN = {
    "x2v_jax/config/lightx2v.py": "a JSON value",
    "x2v_jax/config/flags.py": "a type of a key: int, str",
    "x2v_jax/config/load.py": "what a config file returns or raises",
    "x2v_jax/media/image.py": "what is given as an image",
    "x2v_jax/request/calls.py": "what is given as a generator or as latents",
    "x2v_jax/request/resolve.py": "what is given for a Request",
}


def trees():
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in LIBRARY]


def our_classes() -> set[str]:
    """Names of two words and more; single ones (Request, Pipeline) are words, too."""
    names = {node.name for _, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return {name for name in names if re.search(r"[a-z0-9][A-Z]", name)} - {"UserError"}


CLASSES = re.compile(r"\b_?(?:" + "|".join(sorted(name.lstrip("_") for name in our_classes())) + r")\b")


def raised(tree: ast.Module) -> list[ast.expr]:
    """What UserErrors are made of."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        argument
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in ("UserError", "problem")
        for argument in call.args
    ]


def test_no_sentence_is_written_with_the_name_of_a_class():
    for name, tree in trees():
        for expression in raised(tree):
            for part in ast.walk(expression):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    assert not (found := CLASSES.search(part.value)), f"{name}:{part.lineno} says {found[0]!r}"


def test_no_sentence_fills_in_the_type_of_something_of_ours():
    for name, tree in trees():
        for expression in raised(tree):
            for part in ast.walk(expression):
                is_name = isinstance(part, ast.Attribute) and part.attr in ("__name__", "__qualname__", "__class__")
                assert not is_name or name in OF_THE_USERS_OWN, (
                    f"{name}:{part.lineno} names a type; say what it is in a user's words, or list the file here"
                )


@pytest.mark.slow
def test_the_corpus_of_mistakes_is_answered_without_names_of_classes(tmp_path, capsys, monkeypatch):
    import bad_input

    from convert.__main__ import main as convert
    from infer.__main__ import main as infer

    monkeypatch.chdir(ROOT)
    bad_input.make_files(ROOT / "assets", tmp_path)
    corpus = bad_input.cases(str(tmp_path))
    for main, name in ((convert, "convert"), (infer, "infer")):
        for case in corpus[name]:
            with contextlib.suppress(SystemExit):
                main(list(case))
            shown = capsys.readouterr()
            text = shown.out + shown.err
            assert "Traceback" not in text, (name, case)
            assert not (found := CLASSES.search(text)), f"{name} {' '.join(case)}: {found[0]}"


@pytest.mark.parametrize(
    ("shape", "use"),
    [
        ((1, 16, 16, 40, 64), "latents of a video of 61 frames of 320x512"),
        ((16, 21, 60, 104), "latents of a video of 81 frames of 480x832"),
        ((1, 21, 16, 60, 104), "latents of a video of 81 frames of 480x832"),
        ((512, 4096), "the embedding of a prompt"),
        ((8, 3, 64, 64), "pictures"),
        ((7,), None),
    ],
)
def test_a_bare_tensor_is_told_as_one(tmp_path, monkeypatch, capsys, shape, use):
    from convert.__main__ import main
    from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
    from x2v_jax.checkpoint.published import read

    file = tmp_path / "t.pth"
    file.write_bytes(b"PK")
    bare = LazyTensor(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))
    for node, words in ((bare, "one tensor without a name"), ([bare, 3], "a list of 2 without names"), (7, "7")):
        monkeypatch.setattr(read, "read_torch_file", lambda path, node=node: node)
        main(["inspect", str(file)])
        assert main(["wan", str(file), str(tmp_path / "out")]) == 2
        shown = capsys.readouterr()
        for text in (shown.out, shown.err):
            assert words in text and not CLASSES.search(text)
            assert node == 7 or (f"float32 {list(shape)}" in text and (use or "") in text)


def test_the_names_of_classes_are_found():
    assert {"LazyTensor", "WanConfig"} <= our_classes() and CLASSES.search("holds LazyTensor, not")
