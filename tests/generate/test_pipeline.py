"""The pipeline joins the parts in the right order: compared with the networks called by hand on tiny random weights."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from PIL import Image

from x2v_jax import Pipeline
from x2v_jax.checkpoint.files.safetensors import SafetensorsWriter, read_safetensors
from x2v_jax.diffusion import image_condition, noise
from x2v_jax.errors import UserError
from x2v_jax.generate.network import Network
from x2v_jax.generate.tokenizer import Tokenizer
from x2v_jax.models import functional
from x2v_jax.request import Request

PROMPT = "a red circle moves left"
LATENTS = (2, 4, 6, 16)
PICTURE = np.random.default_rng(5).integers(0, 255, (40, 30, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def base(folder: pathlib.Path) -> Pipeline:
    return Pipeline.from_checkpoint(tiny_models.write_checkpoint(folder / "base"), dtype="float32")


@pytest.fixture(scope="module")
def distilled(folder: pathlib.Path) -> Pipeline:
    path = tiny_models.write_checkpoint(folder / "distilled", schedule=tiny_models.DISTILLED)
    return Pipeline.from_checkpoint(path, dtype="float32")


@pytest.fixture(scope="module")
def i2v(folder: pathlib.Path) -> Pipeline:
    path = tiny_models.write_checkpoint(folder / "i2v", image=True, schedule=tiny_models.DISTILLED)
    return Pipeline.from_checkpoint(path, dtype="float32")


def save(path: pathlib.Path, **arrays: np.ndarray) -> pathlib.Path:
    with SafetensorsWriter(path, {name: (a.shape, a.dtype) for name, a in arrays.items()}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return path


def network(pipeline: Pipeline, name: str) -> Any:
    """A component as a module, built apart from the pipeline."""
    checkpoint = pipeline.checkpoint
    loaded = Network(name, checkpoint.config(name), checkpoint.tensors(name), dtype="float32")
    return functional.merge(loaded.graphdef, loaded.load())


def embed(pipeline: Pipeline, prompt: str) -> jax.Array:
    file = pipeline.checkpoint.tokenizer_file()
    assert file is not None
    tokens = Tokenizer.from_file(file, tiny_models.T2V.text_len)([prompt])
    return nnx.jit(lambda encoder, ids, mask: encoder(ids, mask))(network(pipeline, "text_encoder"), *tokens)


def encode_picture(pipeline: Pipeline) -> jax.Array:
    """Latents of PICTURE as first frame of five of 32x32."""
    video = np.zeros((1, 5, 32, 32, 3), np.float32)
    video[0, 0] = image_condition.resize_bicubic(PICTURE, 32, 32)
    return nnx.jit(lambda vae, video: vae.encode(video))(network(pipeline, "vae"), video)


def shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def step_distill_by_hand(velocity: Any, seed: int, shape: tuple[int, ...] = LATENTS) -> np.ndarray:
    """LightX2V's scheduler, written out."""
    key = jax.random.key(seed)
    x = np.asarray(noise.initial_noise(key, (1, *shape)))
    sigmas = [shifted(t / 1000, 5.0) for t in (1000, 750, 500, 250)]
    for i, sigma in enumerate(sigmas):
        x = x - sigma * np.asarray(velocity(x, 1000 * sigma))
        if i < 3:
            fresh = np.asarray(noise.step_noise(key, i, (1, *shape)))
            x = (1 - sigmas[i + 1]) * x + sigmas[i + 1] * fresh
    return x[0]


@pytest.mark.slow
def test_step_distillation_equals_the_networks_called_by_hand(distilled: Pipeline):
    result = distilled.generate(Request(PROMPT, seed=3))
    model, text = network(distilled, "transformer"), embed(distilled, PROMPT)
    step = nnx.jit(lambda m, x, t: m(x, t, text))
    expected = step_distill_by_hand(lambda x, t: step(model, x, jnp.full((1,), t, jnp.float32)), seed=3)
    assert np.linalg.norm(result.latents - expected) < 1e-4 * np.linalg.norm(expected)
    video = nnx.jit(lambda vae, latents: vae.decode(latents))(network(distilled, "vae"), result.latents[None])[0]
    np.testing.assert_allclose(result.frames, np.clip((np.asarray(video) + 1) * 127.5, 0, 255), atol=0.51)
    assert result.frames.shape == (5, 32, 48, 3) and result.frames.dtype == np.uint8


@pytest.mark.parametrize(("asked", "scale"), [(None, 4.0), (0.0, 0.0)])
def test_guidance_uses_negative_then_positive_prompt(base: Pipeline, asked: float | None, scale: float):
    """One UniPC step is x - sigma v, and sigma starts at shift * 0.999 / (1 + (shift - 1) 0.999)."""
    result = base.generate(Request(PROMPT, seed=1, num_inference_steps=1, guidance_scale=asked))
    model = network(base, "transformer")
    x = noise.initial_noise(jax.random.key(1), (1, *LATENTS))
    sigma = shifted(0.999, 3.0)
    timestep = jnp.full((1,), np.trunc(1000 * sigma), jnp.float32)
    velocity = nnx.jit(lambda model, text: model(x, timestep, text))
    negative, positive = (velocity(model, embed(base, text)) for text in ("bad", PROMPT))
    expected = x - sigma * (negative + scale * (positive - negative))
    assert np.linalg.norm(result.latents - expected[0]) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.slow
def test_image_to_video_conditions_on_the_picture(i2v: Pipeline):
    result = i2v.generate(Request(PROMPT, image=PICTURE, seed=2))
    height, width = image_condition.latent_size(40, 30, 32 * 48)
    assert (height, width) == (4, 4)
    model, text = network(i2v, "transformer"), embed(i2v, PROMPT)
    pixels = image_condition.clip_pixels(PICTURE, 28)[None]
    features = nnx.jit(lambda clip, pixels: clip(pixels))(network(i2v, "image_encoder"), pixels)
    mask = image_condition.condition_mask(2, 4, 4)
    condition = jnp.concatenate([jnp.asarray(mask)[None], encode_picture(i2v)], axis=-1)
    step = nnx.jit(lambda m, x, t: m(jnp.concatenate([x, condition], axis=-1), t, text, features))
    expected = step_distill_by_hand(
        lambda x, t: step(model, x, jnp.full((1,), t, jnp.float32)), seed=2, shape=(2, 4, 4, 16)
    )
    assert np.linalg.norm(result.latents - expected) < 1e-4 * np.linalg.norm(expected)
    assert result.frames.shape == (5, 32, 32, 3)
    assert result.request.height == 32 and result.request.width == 48  # as asked: a re-run needs the area


def test_a_picture_may_come_from_a_file(i2v: Pipeline, tmp_path: pathlib.Path):
    Image.fromarray(PICTURE).save(tmp_path / "p.png")
    from_file = i2v.generate(Request(PROMPT, image=tmp_path / "p.png", seed=2))
    Image.fromarray(255 - PICTURE).save(tmp_path / "q.png")
    other = i2v.generate(Request(PROMPT, image=str(tmp_path / "q.png"), seed=2))
    np.testing.assert_array_equal(from_file.latents, i2v.generate(Request(PROMPT, image=PICTURE, seed=2)).latents)
    assert np.abs(from_file.latents - other.latents).max() > 1e-3


def test_the_first_frame_is_pinned_on_request(i2v: Pipeline):
    plain = i2v.generate(Request(PROMPT, image=PICTURE, seed=2))
    pinned = i2v.generate(Request(PROMPT, image=PICTURE, seed=2, pin_first_frame=True))
    np.testing.assert_allclose(pinned.latents[0], encode_picture(i2v)[0, 0], atol=1e-5)
    np.testing.assert_array_equal(pinned.latents[1], plain.latents[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "distilled"])
def test_watching_the_steps_does_not_change_the_latents(name: str, request: pytest.FixtureRequest):
    pipeline: Pipeline = request.getfixturevalue(name)
    seen: list[tuple[int, int, np.ndarray]] = []

    def on_step(step: int, count: int, latents: jax.Array) -> None:
        seen.append((step, count, np.array(latents[0])))

    watched = pipeline.generate(Request(PROMPT, seed=4), on_step)
    whole = pipeline.generate(Request(PROMPT, seed=4))
    count = 4 if name == "distilled" else 3
    assert [(step, steps) for step, steps, _ in seen] == [(i, count) for i in range(count)]
    np.testing.assert_array_equal(seen[-1][2], watched.latents)
    np.testing.assert_allclose(whole.latents, watched.latents, atol=2e-5)


def test_an_error_in_the_callback_ends_the_run_and_the_pipeline_lives_on(distilled: Pipeline):
    def stop(step: int, count: int, latents: jax.Array) -> None:
        raise KeyboardInterrupt

    before = distilled.generate(Request(PROMPT, seed=4)).latents
    with pytest.raises(KeyboardInterrupt):
        distilled.generate(Request(PROMPT, seed=4), stop)
    np.testing.assert_array_equal(distilled.generate(Request(PROMPT, seed=4)).latents, before)


def test_sequential_guidance_gives_the_same_latents(base: Pipeline):
    other = Pipeline(base.checkpoint, dtype="float32", sequential_guidance=True)
    together = base.generate(Request(PROMPT, seed=4)).latents
    np.testing.assert_allclose(other.generate(Request(PROMPT, seed=4)).latents, together, atol=2e-5)


def test_seeds_decide_and_earlier_requests_do_not(distilled: Pipeline):
    first = distilled.generate(Request(PROMPT, seed=7)).latents
    other = distilled.generate(Request(PROMPT, seed=8)).latents
    np.testing.assert_array_equal(distilled.generate(Request(PROMPT, seed=7)).latents, first)
    assert np.abs(first - other).max() > 0.1


def test_calling_the_pipeline_returns_frames(distilled: Pipeline):
    frames = distilled(PROMPT, seed=7, height=16, width=16, num_frames=1)
    assert frames.shape == (1, 16, 16, 3) and frames.dtype == np.uint8
    with pytest.raises(UserError, match="unknown field 'guidance'; did you mean guidance_scale"):
        distilled(PROMPT, guidance=3)
    with pytest.raises(UserError, match="use 96 or 112"):
        distilled(PROMPT, height=100)


def test_noise_text_and_latents_are_exchanged_as_files(distilled: Pipeline, tmp_path: pathlib.Path):
    """Given the noise and the embeddings that the seed and the prompt stand for, the latents are the same."""
    expected = distilled.generate(Request(PROMPT, seed=5))
    key = jax.random.key(5)
    start = np.moveaxis(np.asarray(noise.initial_noise(key, (1, *LATENTS)))[0], -1, 0)
    between = [np.asarray(noise.step_noise(key, i, (1, *LATENTS)))[0] for i in range(3)]
    text = np.asarray(embed(distilled, PROMPT))[0]
    request = Request(
        seed=99,
        initial_noise=save(tmp_path / "n.safetensors", noise=start, renoise=np.moveaxis(np.stack(between), -1, 1)),
        text_embeddings=save(tmp_path / "t.safetensors", text=text[:6]),
        save_latents=tmp_path / "new" / "l.safetensors",
    )
    assert not text[6:].any()  # five words and the end
    result = distilled.generate(request)
    np.testing.assert_allclose(result.latents, expected.latents, atol=1e-5)
    saved = read_safetensors(tmp_path / "new" / "l.safetensors")["latents"].read()
    np.testing.assert_array_equal(saved, np.moveaxis(result.latents, -1, 0))


def test_guided_requests_take_negative_embeddings_too(base: Pipeline, tmp_path: pathlib.Path):
    positive, negative = (np.asarray(embed(base, text))[0] for text in (PROMPT, "bad"))
    both = save(tmp_path / "both.safetensors", text=positive, negative_text=negative)
    one = save(tmp_path / "one.safetensors", text=positive)
    expected = base.generate(Request(PROMPT, seed=5)).latents
    for file in (both, one):
        np.testing.assert_allclose(base.generate(Request(seed=5, text_embeddings=file)).latents, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"noise": np.zeros((16, 2, 4, 5), np.float32)}, r"is \[16, 2, 4, 5\]; this request needs \[16, 2, 4, 6\]"),
        ({"latents": np.zeros((16, 2, 4, 6), np.float32)}, "has no tensor 'noise'"),
        ({"noise": np.full((16, 2, 4, 6), np.nan, np.float32)}, "NaN"),
        (
            {"noise": np.zeros((16, 2, 4, 6), np.float32), "renoise": np.zeros((2, 16, 2, 4, 6), np.float32)},
            r"needs \[3, 16, 2, 4, 6\]",
        ),
        ({"noise": np.zeros((16, 2, 4, 6), np.float32), "extra": np.zeros(1, np.float32)}, "holds 'extra'"),
    ],
)  # fmt: skip
def test_noise_files_that_do_not_fit_are_refused(
    distilled: Pipeline, tmp_path: pathlib.Path, arrays: dict[str, np.ndarray], expected: str
):
    with pytest.raises(UserError, match=expected):
        distilled.generate(Request(PROMPT, initial_noise=save(tmp_path / "n.safetensors", **arrays)))


def test_other_exchange_mistakes_are_refused(distilled: Pipeline, base: Pipeline, tmp_path: pathlib.Path):
    wide = save(tmp_path / "wide.safetensors", text=np.zeros((3, 25), np.float32))
    with pytest.raises(UserError, match=r"this model takes \[L, 24\]"):
        distilled.generate(Request(text_embeddings=wide))
    both = save(tmp_path / "b.safetensors", noise=np.zeros((16, 2, 4, 6), np.float32), renoise=np.zeros(3, np.float32))
    with pytest.raises(UserError, match="UniPC adds no noise"):
        base.generate(Request(PROMPT, initial_noise=both))
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(UserError, match="initial_noise"):
        distilled.generate(Request(PROMPT, initial_noise=tmp_path / "bad.safetensors"))


@pytest.mark.slow
def test_encoders_leave_the_device_before_denoising(i2v: Pipeline):
    loaded: list[set[str]] = []

    def on_step(step: int, count: int, latents: jax.Array) -> None:
        loaded.append({name for name, each in pipeline._components.networks.items() if each.is_loaded})

    for keep in (False, True):
        pipeline = Pipeline(i2v.checkpoint, dtype="float32", keep_encoders=keep)
        pipeline.generate(Request(PROMPT, image=PICTURE, seed=2), on_step)
    assert loaded[0] == {"transformer", "vae"}
    assert loaded[-1] == {"transformer", "vae", "text_encoder", "image_encoder"}


def test_many_prompts_load_the_text_encoder_once(base: Pipeline, monkeypatch: pytest.MonkeyPatch):
    pipeline = Pipeline(base.checkpoint, dtype="float32")
    loads: list[str] = []
    original = Network.load

    def load(self: Network) -> Any:
        if not self.is_loaded:
            loads.append(self.component)
        return original(self)

    monkeypatch.setattr(Network, "load", load)
    requests = [Request(f"a {word} circle", seed=1, num_frames=1) for word in ("red", "blue")]
    pipeline.prepare(requests)
    results = [pipeline.generate(request).latents for request in requests]
    assert loads == ["text_encoder", "transformer", "vae"]
    assert np.abs(results[0] - results[1]).max() > 1e-4


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(distilled: Pipeline):
    with pytest.warns(UserWarning, match="prompt of 2001 tokens is cut to the 12 that the model reads"):
        long = distilled.generate(Request("red " * 2000, seed=1, num_frames=1)).latents
    np.testing.assert_array_equal(distilled.generate(Request("red " * 11, seed=1, num_frames=1)).latents, long)


def test_damaged_weights_are_noticed(folder: pathlib.Path):
    parameters = tiny_models.random_parameters("transformer", tiny_models.T2V)
    parameters["head.linear.bias"][0] = np.nan
    vae = tiny_models.random_parameters("vae", tiny_models.VAE)
    components = {"transformer": (tiny_models.T2V, parameters), "vae": (tiny_models.VAE, vae)}
    path = tiny_models.write_checkpoint(folder / "nan", changes={"components": components})
    text = save(
        folder / "text.safetensors", text=np.zeros((3, 24), np.float32), negative_text=np.ones((3, 24), np.float32)
    )
    with pytest.raises(UserError, match=r"the latents after step 1 of 3 hold NaN or infinity.*convert it again$"):
        Pipeline.from_checkpoint(path, dtype="float32").generate(Request(text_embeddings=text))


def test_bfloat16_is_close_to_float32(distilled: Pipeline):
    other = Pipeline(distilled.checkpoint, dtype=jnp.bfloat16)
    exact = distilled.generate(Request(PROMPT, seed=3)).latents
    rounded = other.generate(Request(PROMPT, seed=3))
    error = np.linalg.norm(rounded.latents - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.05
    params = functional.flatten(other._components.networks["transformer"].load())
    assert params["blocks.ffn.linear_1.kernel"].dtype == jnp.bfloat16
    assert params["time_embedding.linear_1.kernel"].dtype == params["blocks.modulation"].dtype == jnp.float32
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(other._components.networks["vae"].load()))


def lora_file(path: pathlib.Path) -> pathlib.Path:
    rng = np.random.default_rng(1)
    return save(
        path,
        **{
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight": rng.standard_normal((4, 32)).astype(np.float32),
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight": rng.standard_normal((32, 4)).astype(np.float32),
        },
    )


def test_loras_are_merged_when_the_transformer_is_loaded(base: Pipeline, tmp_path: pathlib.Path):
    file = lora_file(tmp_path / "l.safetensors")
    plain = base.generate(Request(PROMPT, seed=3)).latents
    none = Pipeline(base.checkpoint, dtype="float32", loras=[(file, 0.0)])
    np.testing.assert_array_equal(none.generate(Request(PROMPT, seed=3)).latents, plain)
    full = Pipeline(base.checkpoint, dtype="float32", loras=[file])
    assert np.abs(full.generate(Request(PROMPT, seed=3)).latents - plain).max() > 1e-3
    steps = full.generate(Request(PROMPT, seed=3, denoising_step_list=(1000, 500), shift=5.0))
    assert steps.request.num_inference_steps == 2
    with pytest.raises(UserError, match="not distilled"):
        base.generate(Request(PROMPT, denoising_step_list=(1000, 500)))


def test_a_lora_whose_name_says_that_it_distills_is_a_warning_where_it_should_not_be(
    base: Pipeline, distilled: Pipeline, tmp_path: pathlib.Path
):
    file = lora_file(tmp_path / "step_distill.safetensors")
    with pytest.warns(UserWarning, match="distilled already"):
        Pipeline(distilled.checkpoint, loras={file: 0.5}).resolve(Request(PROMPT))
    pipeline = Pipeline(base.checkpoint, lora=str(file))
    assert pipeline.lora_report is not None and pipeline.lora_report.files[0].strength == 1.0
    with pytest.warns(UserWarning, match="3 steps of the original model; give its denoising_step_list"):
        pipeline.resolve(Request(PROMPT))
    pipeline.resolve(Request(PROMPT, denoising_step_list=(1000, 500)))
    with pytest.raises(UserError, match="loras and lora are both given"):
        Pipeline(base.checkpoint, lora=str(file), loras=str(file))


def test_options_that_do_not_exist_are_refused(base: Pipeline, tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="dtype is 'int8'"):
        Pipeline(base.checkpoint, dtype="int8")
    with pytest.raises(UserError, match="vae_decode is 'fast'"):
        Pipeline(base.checkpoint, vae_decode="fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not exist"):
        Pipeline.from_checkpoint(tmp_path / "none")
    with pytest.raises(UserError):
        Pipeline(base.checkpoint, loras=[tmp_path / "none.safetensors"])


def test_times_and_peak_are_reported(distilled: Pipeline):
    result = distilled.generate(Request(PROMPT, seed=3))
    assert {"load", "denoise", "vae"} <= set(result.seconds) and all(value >= 0 for value in result.seconds.values())
    assert result.peak_bytes > 50e6


@pytest.fixture(autouse=True)
def no_stray_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    assert not [w for w in recwarn if "donated" in str(w.message)]


def test_the_published_rule_rounds_the_size_and_the_exact_one_takes_it(i2v: Pipeline):
    picture = np.zeros((480, 832, 3), np.uint8)
    asked = Request(PROMPT, image=picture, height=480, width=832, num_frames=1)
    assert i2v.output_size(asked) == (1, 464, 832)
    exact = Request(PROMPT, image=PICTURE, height=32, width=48, num_frames=1, size_rule="exact", seed=1)
    assert i2v.output_size(exact) == (1, 32, 48) and i2v.generate(exact).frames.shape == (1, 32, 48, 3)
    for fields, sentence in (({"height": 40}, "height is 40"), ({"size_rule": "near"}, "give published or exact")):
        with pytest.raises(UserError, match=sentence):
            i2v(PROMPT, image=PICTURE, **{"width": 48, "size_rule": "exact", **fields})
