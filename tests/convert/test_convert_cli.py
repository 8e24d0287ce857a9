"""`python -m convert` from the outside: exit codes, one sentence an error, quick help."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from small_checkpoints import official_folder, random_tensors, save

from convert import arguments
from convert.__main__ import main
from x2v_jax.checkpoint.conversion import stream
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.checkpoint.published import export
from x2v_jax.checkpoint.quantize import eight_bit
from x2v_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*args, **kwargs):
    command = [sys.executable, "-m", "convert", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **kwargs)


def test_convert_inspect_and_export(tmp_path, capsys):
    official_folder(tmp_path / "src")
    src, out, back = (str(tmp_path / name) for name in ("src", "out", "back"))
    assert main(["wan", src, out]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    assert "native checkpoint" in capsys.readouterr().out
    assert main(["inspect", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "t2v"
    assert main(["export", out, back, "--layout", "diffusers"]) == 0
    assert (tmp_path / "back/transformer/diffusion_pytorch_model.safetensors").is_file()
    assert main(["wan", src, out]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main(["wan", src, out, "--overwrite", "--dtype", "bfloat16", "--schedule", '{"shift": 4}']) == 0
    native = open_checkpoint(out)
    assert native.model["components"]["transformer"]["dtype"] == "bfloat16"
    assert native.schedule.shift == 4
    assert native.model["provenance"]["command"].startswith("python -m convert")


def test_quantize_and_tell_of_each_matrix(tmp_path, capsys):
    official_folder(tmp_path / "src")
    src, out, third = (str(tmp_path / name) for name in ("src", "out", "third"))
    assert main(["wan", src, out, "--quantize", "fp8", "--quantize-component", "text_encoder"]) == 0
    assert "note: text_encoder: 14 matrices become float8_e4m3fn" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    assert "--layers tells of each" in capsys.readouterr().out
    assert main(["inspect", out, "--against", src]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and "blocks.0.attn.q.weight float8_e4m3fn: scale" in "".join(lines)
    assert lines[-1].startswith("text_encoder: 14 matrices, relative error ")
    assert main(["inspect", out, "--layers", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert len(reports) == 14 and reports[0]["relative_error"] is None
    assert main(["wan", out, third, "--quantize", "int8"]) == 0
    assert open_checkpoint(third).model["quantization"].keys() == {"transformer", "text_encoder"}


def test_sizes_can_be_given(tmp_path, capsys):
    save(tmp_path / "distill.safetensors", random_tensors("transformer"))
    src, out = str(tmp_path / "distill.safetensors"), str(tmp_path / "out")
    assert main(["wan", src, out]) == 2
    assert "--set transformer.num_heads=N" in capsys.readouterr().err
    assert main(["wan", src, out, "--set", "transformer.num_heads=2", "--set", "transformer.text_len=12"]) == 0
    assert open_checkpoint(out).config("transformer").text_len == 12


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "COMMAND"),
        (["wan", "a"], "DST"),
        (["wan", "/nowhere", "/tmp/never-made"], "no such file or folder"),
        (["wan", "a", "b", "--variant", "fast"], "invalid choice: 'fast'"),
        (["wan", "a", "b", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["wan", "a", "b", "--quantize", "int4"], "invalid choice: 'int4'"),
        (["wan", "a", "b", "--quantize", "int8", "--quantize-component", "vae"], "invalid choice: 'vae'"),
        (["wan", "a", "b", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["wan", "a", "b", "--set", "num_heads=2"], "COMPONENT.FIELD=VALUE"),
        (["wan", "a", "b", "--set", "vae.z_dim=many"], "'many' is no number"),
        (["wan", "a", "b", "--lora", "x.safetensors:nan"], "not a finite number"),
        (["wan", "", "b"], "SRC is empty; give a file or folder"),
        (["wan", "a", ""], "DST is empty"),
        (["wan", "a", "b", "--quantize", "int8", "--smooth", ""], "--smooth is empty"),
        (["calibrate", "", "b.safetensors", "--prompts", "p"], "CKPT is empty"),
        (["calibrate", "a", "", "--prompts", "p"], "DST is empty"),
        (["calibrate", "a", "b.safetensors", "--prompts", ""], "--prompts is empty"),
        (["inspect", "a", "--against", ""], "--against is empty"),
        (["inspect", "/nowhere"], "no such file or folder"),
        (["export", "a", "b", "--layout", "wan"], "does not exist"),
        (["export", "a", "b", "--layout", "comfy"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(args, message, capsys):
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1


def test_help_and_mistakes_answer_at_once_without_jax():
    before = os.times()
    assert "wan" in run("--help").stdout
    after = os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    assert busy < 1  # of the processor's time: the machine may be at work on other tests
    assert run("wan", "--help").returncode == 0
    script = (
        "import sys; from convert.__main__ import main; main(['wan', '/nowhere', 'x']); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


def test_a_polite_kill_removes_what_is_unfinished(tmp_path):
    official_folder(tmp_path / "src")
    script = f"""
import sys, time
from x2v_jax.checkpoint.native import writer as native_writer
write = native_writer.write_model_json
import x2v_jax.checkpoint.conversion.convert as convert
def slow(*args, **kwargs):
    print("x", flush=True)
    time.sleep(60)
convert.write_model_json = slow
from convert.__main__ import main
sys.exit(main(["wan", {str(tmp_path / "src")!r}, {str(tmp_path / "out")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_the_choices_are_those_of_the_library():
    assert ("keep", *stream.DTYPES) == arguments.DTYPES
    assert arguments.LAYOUTS == export.LAYOUTS
    assert ("keep", "none", *eight_bit.WORDS) == arguments.QUANTIZE


def test_settings_are_json():
    assert arguments.settings(["vae.dim_mult=[1, 2]", "vae.z_dim=8"]) == {"vae": {"dim_mult": [1, 2], "z_dim": 8}}
    with pytest.raises(UserError, match=r"COMPONENT\.FIELD=VALUE"):
        arguments.settings(["rogue.x=1"])
