"""LoRA training trees: nothing at the start, gradients to the pairs alone, and the exported file means the same."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_models import I2V, T2V, random_parameters

from train.lora import LoraConfig, LoraTree, apply_lora, init_lora
from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.lora.merge import LoraFile, merge_into_native
from x2v_jax.checkpoint.lora.write import DIALECTS, write_lora
from x2v_jax.checkpoint.names.wan import table
from x2v_jax.errors import UserError
from x2v_jax.models.functional import flatten, unflatten

CONFIG = LoraConfig(rank=3, alpha=6.0)
FLAT = random_parameters("transformer", I2V)


def parameters(dtype=np.float32):
    return unflatten({name: jnp.asarray(value, dtype) for name, value in FLAT.items()})


def trained(config: LoraConfig = CONFIG) -> LoraTree:
    """Pairs whose `up` is no longer zero."""
    rng = np.random.default_rng(1)
    lora = init_lora(parameters(), config, jax.random.key(0))
    return {
        name: {"down": p["down"], "up": jnp.asarray(rng.standard_normal(p["up"].shape, np.float32))}
        for name, p in lora.items()
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_new_pairs_change_nothing(dtype):
    base = parameters(dtype)
    changed = flatten(apply_lora(base, init_lora(base, CONFIG, jax.random.key(0)), CONFIG.scale))
    for name, value in flatten(base).items():
        assert changed[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(changed[name]), np.asarray(value))


def test_the_usual_targets_are_attention_and_feed_forward_with_stacked_layers():
    lora = init_lora(parameters(), CONFIG, jax.random.key(0))
    attentions = [f"blocks.self_attn.{x}" for x in "qkvo"] + [
        f"blocks.cross_attn.{x}" for x in (*"qkvo", "k_img", "v_img")
    ]
    assert set(lora) == {f"{name}.kernel" for name in [*attentions, "blocks.ffn.linear_1", "blocks.ffn.linear_2"]}
    assert lora["blocks.ffn.linear_1.kernel"]["down"].shape == (2, 32, 3)
    assert lora["blocks.ffn.linear_1.kernel"]["up"].shape == (2, 3, 48)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(lora))


def test_a_pairs_start_does_not_depend_on_the_other_targets():
    few = init_lora(parameters(), LoraConfig(3, 6.0, ("blocks.ffn.linear_1", "head.linear")), jax.random.key(0))
    assert few["head.linear.kernel"]["down"].shape == (32, 3)
    many = init_lora(parameters(), CONFIG, jax.random.key(0))
    name = "blocks.ffn.linear_1.kernel"
    np.testing.assert_array_equal(few[name]["down"], many[name]["down"])
    assert not np.array_equal(many["blocks.self_attn.q.kernel"]["down"], many["blocks.self_attn.k.kernel"]["down"])


def test_abstract_parameters_are_enough():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters())
    made = jax.eval_shape(lambda key: init_lora(shapes, CONFIG, key), jax.random.key(0))
    assert made["blocks.self_attn.q.kernel"]["up"].shape == (2, 3, 32)


def test_gradients_flow_to_the_pairs_alone():
    def loss(base, lora):
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(apply_lora(base, lora, CONFIG.scale)))

    base, lora = parameters(), trained()
    of_base, of_lora = jax.jit(jax.grad(loss, argnums=(0, 1)))(base, lora)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(of_base))
    name = "blocks.ffn.linear_2.kernel"
    merged = flatten(apply_lora(base, lora, CONFIG.scale))[name]
    expected = 2 * CONFIG.scale * jnp.einsum("lir,lio->lro", lora[name]["down"], merged, precision="highest")
    np.testing.assert_allclose(of_lora[name]["up"], expected, rtol=1e-4, atol=1e-4)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(of_lora))


def test_the_type_of_changed_kernels_can_be_chosen():
    changed = flatten(apply_lora(parameters(jnp.bfloat16), trained(), CONFIG.scale, dtype=jnp.float32))
    assert changed["blocks.self_attn.q.kernel"].dtype == jnp.float32
    assert changed["blocks.self_attn.q.bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_exported_file_merges_to_the_same_weights(tmp_path: pathlib.Path, dialect: str):
    lora = trained(LoraConfig(3, 6.0, (*CONFIG.targets, "head.linear", "text_embedding.linear_1")))
    write_lora(tmp_path / "x.safetensors", lora, I2V, alpha=6.0, dialect=dialect, dtype="float32")
    expected = flatten(apply_lora(parameters(), lora, CONFIG.scale))
    lazy = {name: LazyTensor(v.shape, v.dtype, lambda v=v: v.view()) for name, v in FLAT.items()}
    file = LoraFile.open(tmp_path / "x.safetensors")
    merged, report = merge_into_native(lazy, [(file, 1.0)], table("transformer", I2V))
    assert all(f.fits for f in report.files)
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(merged[name].read()), np.asarray(value), rtol=1e-6, atol=1e-6)


def test_the_scale_is_where_each_program_looks_for_it(tmp_path: pathlib.Path):
    name, module = "blocks.self_attn.q.kernel", "diffusion_model.blocks.1.self_attn.q"
    lora = {name: trained()[name]}
    tensors = {}
    for dialect in DIALECTS:
        path = tmp_path / f"{dialect}.safetensors"
        write_lora(path, lora, I2V, alpha=6.0, dialect=dialect, dtype="float32")
        modules = {m.name: m for m in LoraFile.open(path).modules}
        tensors[dialect] = {
            key: v for m in modules.values() for key, v in zip(m.keys.values(), m.tensors.values(), strict=True)
        }
    up = np.asarray(lora[name]["up"][1]).T
    np.testing.assert_allclose(tensors["lightx2v"][f"{module}.lora_up.weight"].read(), 2 * up)
    np.testing.assert_allclose(tensors["comfyui"][f"{module}.lora_up.weight"].read(), up)
    assert float(tensors["comfyui"][f"{module}.alpha"].read()) == 6.0
    np.testing.assert_allclose(tensors["diffusers"]["transformer.blocks.1.attn1.to_q.lora_B.weight"].read(), 2 * up)
    assert tensors["lightx2v"][f"{module}.lora_down.weight"].shape == (3, 32)


def test_files_are_bfloat16_unless_asked_otherwise(tmp_path: pathlib.Path):
    write_lora(tmp_path / "x.safetensors", trained(), I2V, alpha=3.0)
    module = LoraFile.open(tmp_path / "x.safetensors").modules[0]
    assert {tensor.dtype for tensor in module.tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 33}, r"rank is 33, and blocks.*give at most 32"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("blocks.self_atn",)}, "did you mean blocks.self_attn"),
        ({"targets": ("blocks.norm3",)}, "names no linear layer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        init_lora(parameters(), LoraConfig(**({"rank": 3} | arguments)), jax.random.key(0))


def test_a_lora_of_another_model_is_refused(tmp_path: pathlib.Path):
    text_only = unflatten({n: jnp.asarray(v) for n, v in random_parameters("transformer", T2V).items()})
    with pytest.raises(UserError, match=r"cross_attn.k_img.kernel by \[2, 32, 32\], which the model does not have"):
        apply_lora(text_only, trained(), 1.0)
    with pytest.raises(UserError, match=r"k_img.kernel by .* no kernel of this transformer"):
        write_lora(tmp_path / "x.safetensors", trained(), T2V, alpha=3.0)
    for wrong in ({"path": "x.pt"}, {"dialect": "kohya"}, {"dtype": "int8"}):
        path = tmp_path / str(wrong.pop("path", "x.safetensors"))
        with pytest.raises(UserError, match=r"safetensors|dialect is 'kohya'|dtype is 'int8'"):
            write_lora(path, trained(), I2V, alpha=3.0, **wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
