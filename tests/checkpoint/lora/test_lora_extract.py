"""Extraction of a LoRA from two checkpoints: what is low-rank comes back in every dialect, and what is lost is told."""

import json
import pathlib

import numpy as np
import pytest
from tiny_models import DISTILLED, I2V, T2V, random_parameters, write_checkpoint

from convert.__main__ import main
from x2v_jax.checkpoint.files.safetensors import read_safetensors
from x2v_jax.checkpoint.lora import extract
from x2v_jax.checkpoint.lora.extract import extract_lora, low_rank
from x2v_jax.checkpoint.lora.merge import LoraFile, merge_into_native
from x2v_jax.checkpoint.lora.write import DIALECTS
from x2v_jax.checkpoint.names.wan import table
from x2v_jax.checkpoint.native.reader import open_checkpoint
from x2v_jax.errors import UserError

RANK = 4
BASE = random_parameters("transformer", I2V)


def changed(*, small: bool = True, norms: bool = True, seed: int = 5) -> dict[str, np.ndarray]:
    """The base with a change of rank 4 in every kernel and, if `small`, in biases (and norms and modulations)."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, value in BASE.items():
        if name.endswith(".kernel"):
            shape = value.shape[: 1 if name.startswith("blocks.") else 0]
            inputs, outputs = int(np.prod(value.shape[len(shape) : -1])), value.shape[-1]
            rank = min(RANK, inputs, outputs)
            left, right = rng.standard_normal((*shape, inputs, rank)), rng.standard_normal((*shape, rank, outputs))
            result[name] = value + 0.05 * (left @ right).reshape(value.shape).astype(np.float32)
        elif small and (norms or (name.endswith(".bias") and "norm" not in name)):
            result[name] = value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        else:
            result[name] = value
    return result


def checkpoint(path: pathlib.Path, flat: dict[str, np.ndarray], config=I2V):
    return open_checkpoint(write_checkpoint(path, image=True, changes={"components": {"transformer": (config, flat)}}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    return checkpoint(tmp_path_factory.mktemp("base") / "base", BASE)


def merged(base, file: pathlib.Path) -> dict[str, np.ndarray]:
    result, report = merge_into_native(
        base.tensors("transformer"), [(LoraFile.open(file), 1.0)], table("transformer", I2V)
    )
    assert all(f.fits for f in report.files), report
    return {name: np.asarray(tensor.read()) for name, tensor in result.items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_low_rank_difference_comes_back_whole(tmp_path: pathlib.Path, base, dialect: str):
    target = changed(norms=dialect != "diffusers")
    file = tmp_path / "x.safetensors"
    report = extract_lora(base, checkpoint(tmp_path / "d", target), file, rank=RANK, dialect=dialect, dtype="float32")
    for name, value in merged(base, file).items():
        np.testing.assert_allclose(value, target[name], rtol=1e-5, atol=2e-5, err_msg=name)
    assert report.kept > 0.999999 and {layer.kept_as for layer in report.layers} <= {"pair", "whole"}
    assert "100.00% of the difference's energy is kept in all" in str(report)


def test_keys_are_those_that_each_program_reads(tmp_path: pathlib.Path, base):
    keys = {}
    distilled = checkpoint(tmp_path / "d", changed())
    for dialect in DIALECTS:
        file = tmp_path / f"{dialect}.safetensors"
        extract_lora(base, distilled, file, rank=RANK, dialect=dialect)
        keys[dialect] = {key: tensor.shape for key, tensor in read_safetensors(file).items()}
    ours = keys["lightx2v"]
    assert ours["diffusion_model.blocks.1.cross_attn.k_img.lora_down.weight"] == (4, 32)
    assert ours["diffusion_model.blocks.1.ffn.0.lora_up.weight"] == (48, 4)
    assert ours["diffusion_model.blocks.0.self_attn.norm_q.diff"] == (32,)
    assert ours["diffusion_model.blocks.0.self_attn.q.diff_b"] == (32,)
    assert ours["diffusion_model.blocks.0.diff_m"] == (1, 6, 32) and ours["diffusion_model.head.diff_m"] == (1, 2, 32)
    assert not any(key.endswith(".alpha") for key in ours)
    comfy = keys["comfyui"]
    assert not any(key.endswith(".alpha") for key in comfy), "diffusers refuses those outside the blocks"
    assert comfy["diffusion_model.blocks.0.modulation.diff"] == (1, 6, 32)
    theirs = keys["diffusers"]
    assert theirs["transformer.blocks.1.attn2.add_k_proj.lora_A.weight"] == (4, 32)
    assert theirs["transformer.blocks.0.attn1.to_out.0.lora_B.bias"] == (32,)
    assert theirs["transformer.patch_embedding.lora_A.weight"] == (4, 36, 1, 2, 2)
    assert theirs["transformer.patch_embedding.lora_B.weight"] == (32, 4, 1, 1, 1)
    assert {key.rpartition(".lora_")[2] for key in theirs} == {"A.weight", "B.weight", "B.bias"}


def test_what_a_dialect_has_no_place_for_is_told(tmp_path: pathlib.Path, base):
    report = extract_lora(base, checkpoint(tmp_path / "d", changed()), tmp_path / "x.safetensors", dialect="diffusers")
    lost = {layer.key for layer in report.layers if layer.kept_as == "lost"}
    assert {"blocks.0.modulation", "head.modulation", "blocks.1.norm3.bias", "blocks.0.self_attn.norm_q.weight"} <= lost
    assert "img_emb.proj.0.bias" in lost and "img_emb.proj.1.bias" not in lost
    assert report.kept < 1 and f"{len(lost)} parameters have no place in this dialect" in str(report)


def test_diffusers_biases_come_all_or_not_at_all(tmp_path: pathlib.Path, base):
    only_one = dict(BASE)
    only_one["blocks.self_attn.q.bias"] = BASE["blocks.self_attn.q.bias"] + np.float32([[0], [1]])
    only_one["blocks.ffn.linear_1.kernel"] = changed()["blocks.ffn.linear_1.kernel"]
    file = tmp_path / "x.safetensors"
    extract_lora(base, checkpoint(tmp_path / "d", only_one), file, rank=RANK, dialect="diffusers", dtype="float32")
    keys = set(read_safetensors(file))
    assert {key.removesuffix("lora_A.weight") for key in keys if key.endswith("lora_A.weight")} == {
        key.removesuffix("lora_B.bias") for key in keys if key.endswith("lora_B.bias")
    }
    assert len(keys) == 3 * 3, "one layer's q, both layers' feed-forward"
    for name, value in merged(base, file).items():
        np.testing.assert_allclose(value, only_one[name], atol=1e-5, err_msg=name)


def test_unchanged_layers_are_left_out(tmp_path: pathlib.Path, base):
    target = dict(BASE)
    target["blocks.self_attn.v.kernel"] = BASE["blocks.self_attn.v.kernel"].copy()
    target["blocks.self_attn.v.kernel"][1, 3] += 1
    report = extract_lora(base, checkpoint(tmp_path / "d", target), tmp_path / "x.safetensors", rank=2)
    assert [layer.key for layer in report.layers] == ["blocks.1.self_attn.v.weight"]
    module = "diffusion_model.blocks.1.self_attn.v"
    assert set(read_safetensors(tmp_path / "x.safetensors")) == {f"{module}.lora_{x}.weight" for x in ("up", "down")}


def test_the_account_of_a_cut_difference_is_true(tmp_path: pathlib.Path, base):
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((2, 32, 48)).astype(np.float32)
    target = BASE | {"blocks.ffn.linear_1.kernel": BASE["blocks.ffn.linear_1.kernel"] + noise}
    file = tmp_path / "x.safetensors"
    report = extract_lora(base, checkpoint(tmp_path / "d", target), file, rank=5, dtype="float32")
    left = merged(base, file)["blocks.ffn.linear_1.kernel"] - target["blocks.ffn.linear_1.kernel"]
    for number, layer in enumerate(report.layers):
        assert layer.kept == pytest.approx(1 - np.square(left[number]).sum() / np.square(noise[number]).sum(), abs=1e-4)
        singular = np.linalg.svd(noise[number], compute_uv=False) ** 2
        assert layer.kept == pytest.approx(singular[:5].sum() / singular.sum(), abs=1e-4)
        assert layer.energy == pytest.approx(np.square(noise[number]).sum(), rel=1e-4)
    text = str(report)
    assert report.worst(1)[0].key in text and "least kept:" in text and "blocks.*.ffn.0.weight" in text


def test_a_layer_that_a_pair_would_not_make_smaller_is_kept_whole(tmp_path: pathlib.Path, base):
    file = tmp_path / "x.safetensors"
    target = changed()
    report = extract_lora(base, checkpoint(tmp_path / "d", target), file, rank=30, dtype="float32")
    assert {layer.kept_as for layer in report.layers} == {"whole"}
    np.testing.assert_allclose(merged(base, file)["head.linear.kernel"], target["head.linear.kernel"], atol=1e-6)


def test_large_matrices_go_through_a_projection_that_finds_nearly_as_much(monkeypatch):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((150, 150)))
    v, _ = np.linalg.qr(rng.standard_normal((200, 150)))
    for spectrum in (1 / np.arange(1, 151), np.linspace(1, 0.5, 150)):
        matrix = (u * spectrum @ v.T).astype(np.float32)
        monkeypatch.setattr(extract, "_EXACT", 1024)
        exact = low_rank(matrix, 8)
        monkeypatch.setattr(extract, "_EXACT", 1)
        up, down, kept = low_rank(matrix, 8)
        assert kept == pytest.approx(exact[2], rel=0.01) and kept <= exact[2] + 1e-6
        rest = np.square(matrix - up @ down).sum() / np.square(matrix).sum()
        assert rest == pytest.approx(1 - kept, abs=1e-5)
        again = low_rank(matrix, 8)
        np.testing.assert_array_equal(up, again[0])


def test_models_that_do_not_fit_each_other_are_refused(tmp_path: pathlib.Path, base):
    file = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="have the same transformer; there is nothing to extract"):
        extract_lora(base, base, file)
    other = open_checkpoint(write_checkpoint(tmp_path / "t2v"))
    assert other.config("transformer") == T2V
    with pytest.raises(UserError, match="have different sizes"):
        extract_lora(base, other, file)
    broken = BASE | {"blocks.self_attn.q.kernel": BASE["blocks.self_attn.q.kernel"] * np.nan}
    with pytest.raises(UserError, match=r"blocks.0.self_attn.q.weight holds NaN"):
        extract_lora(base, checkpoint(tmp_path / "nan", broken), file)
    huge = BASE | {"blocks.self_attn.q.bias": BASE["blocks.self_attn.q.bias"] + 1e6}
    with pytest.raises(UserError, match="beyond float16"):
        extract_lora(base, checkpoint(tmp_path / "huge", huge), file, dtype="float16")
    only_norms = BASE | {"blocks.norm3.scale": BASE["blocks.norm3.scale"] * 2}
    with pytest.raises(UserError, match="no change that diffusers files have a place for"):
        extract_lora(base, checkpoint(tmp_path / "norms", only_norms), file, dialect="diffusers")
    with pytest.raises(UserError, match="rank is 0"):
        extract_lora(base, other, file, rank=0)
    assert not file.exists() and not list(tmp_path.glob(".*incomplete"))


def test_the_command_writes_file_and_report(tmp_path: pathlib.Path, base, capsys):
    distilled = checkpoint(tmp_path / "d", changed())
    file, account = tmp_path / "x.safetensors", tmp_path / "x.json"
    command = ["extract-lora", str(base.path), str(distilled.path), str(file), "--rank", "4"]
    assert main([*command, "--report", str(account)]) == 0
    out = capsys.readouterr().out
    assert "blocks.*.self_attn.q.weight" in out and f"wrote {file}" in out
    layers = json.loads(account.read_text())["layers"]
    assert {"key", "kept_as", "rank", "change", "energy", "kept"} == set(layers[0])
    assert main(command) == 2 and f"{file} exists; choose another name or give --overwrite" in capsys.readouterr().err
    other = [*command[:3], str(tmp_path / "y.safetensors"), "--report", str(account)]
    assert main(other) == 2 and f"--report {account} exists" in capsys.readouterr().err
    assert not (tmp_path / "y.safetensors").exists()
    assert main([*command, "--report", str(account), "--overwrite"]) == 0
    capsys.readouterr()
    assert main([*command[:3], "x.bin"]) == 2 and main([*command[:4], "--rank", "none"]) == 2
    errors = capsys.readouterr().err
    assert "does not end in .safetensors" in errors and "'none' is no whole number" in errors


def test_swapped_arguments_are_noticed_by_what_the_checkpoints_say_of_themselves(tmp_path: pathlib.Path):
    base, distilled = write_checkpoint(tmp_path / "base"), write_checkpoint(tmp_path / "few", schedule=DISTILLED)
    with pytest.raises(UserError, match=r"few is distilled \(variant .distill.\) and .*base is not .*original"):
        extract_lora(open_checkpoint(distilled), open_checkpoint(base), tmp_path / "l.safetensors")
    assert not (tmp_path / "l.safetensors").exists()
