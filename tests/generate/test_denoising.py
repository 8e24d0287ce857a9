"""The samplers' two drivers: where latents stop being finite they say at which step, and buffers are given away."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

from x2v_jax.diffusion import unipc
from x2v_jax.generate.denoise import Conditions, Denoiser, NotFinite
from x2v_jax.generate.programs import compile_all
from x2v_jax.models import functional
from x2v_jax.models.wan import WanModel

SHAPE = (1, 2, 4, 6, 16)
CONDITIONS = Conditions(jnp.zeros((1, tiny_models.T2V.text_len, tiny_models.T2V.text_dim)), np.float32(1))
SIGMAS = np.float32([1.0, 0.9, 0.7, 0.4])
SCAN = {"loop": "scan"}


@pytest.fixture
def denoiser() -> Denoiser:
    """Its network's answer is NaN below timestep 800."""
    made = Denoiser(nnx.graphdef(nnx.Module()))
    made._velocity = lambda params, conditions, latents, timestep: jnp.where(timestep < 800, jnp.nan, latents)  # type: ignore[assignment]
    return made


def watch(step: int, count: int, latents: Any) -> None:
    assert np.isfinite(latents).all()


@pytest.mark.parametrize("on_step", [None, watch])
def test_the_step_after_which_latents_are_not_finite_is_named(denoiser: Denoiser, on_step: Any):
    noise, key = denoiser.draw(3, SHAPE)
    with pytest.raises(NotFinite, match=r"^step 3 of 4$") as error:
        denoiser.sample_step_distill({}, CONDITIONS, noise, SIGMAS, key, on_step)
    assert (error.value.step, error.value.count) == (2, 4)
    table = unipc.unipc_table(5, 3.0)
    first = int(np.argmax(table.timestep < 800))
    with pytest.raises(NotFinite) as error:
        denoiser.sample_unipc({}, CONDITIONS, denoiser.draw(3, SHAPE)[0], table, on_step)
    assert error.value.step == first > 0


def test_the_noise_of_a_seed_is_that_of_its_key(denoiser: Denoiser):
    for seed in (0, 7, 2**31, 2**32 - 1):
        noise, key = denoiser.draw(seed, SHAPE)
        assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(seed))).all()
        assert noise.shape == SHAPE and np.isfinite(noise).all()


def test_the_initial_noise_is_given_away(denoiser: Denoiser):
    noise, key = denoiser.draw(1, SHAPE)
    denoiser.sample_step_distill({}, CONDITIONS, noise, SIGMAS[:2], key)
    assert noise.is_deleted()


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_one_program_unrolled_or_a_scan_and_a_loop_of_steps_give_the_same(given: bool):
    graphdef, params = functional.split(WanModel(tiny_models.T2V, rngs=nnx.Rngs(0)))
    params["head"]["linear"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["linear"]["kernel"].shape)
    denoiser, scanning = Denoiser(graphdef), Denoiser(graphdef, loop="scan")
    # One more than there are re-noisings.
    noise = np.random.default_rng(0).standard_normal((len(SIGMAS), *SHAPE[1:]), np.float32)

    def sample(denoiser: Denoiser, on_step: Any = None) -> np.ndarray:
        initial, key = denoiser.draw(5, SHAPE)
        renoise = noise if given else key
        return np.asarray(denoiser.sample_step_distill(params, CONDITIONS, initial, SIGMAS, renoise, on_step))

    steps: list[np.ndarray] = []
    loop = sample(denoiser, lambda i, count, latents: steps.append(np.array(latents)))
    assert len(steps) == len(SIGMAS) > 2 and np.abs(steps[0] - loop).max() > 0.1
    np.testing.assert_array_equal(sample(denoiser), loop)
    np.testing.assert_array_equal(sample(scanning), loop)


@pytest.mark.parametrize(
    ("options", "steps", "unrolled"), [({}, 1, True), ({}, 4, True), ({}, 16, True), ({}, 17, False), (SCAN, 4, False)]
)
def test_a_list_of_up_to_16_steps_is_unrolled_as_calls_of_one_function(
    options: dict[str, Any], steps: int, unrolled: bool
):
    """Of one: what is traced and lowered once has kernels whose text is the same, and these are compiled once."""
    graphdef, params = functional.abstract(lambda: WanModel(tiny_models.T2V, rngs=nnx.Rngs(0)))
    sigmas = np.linspace(1, 0.2, steps, dtype=np.float32)
    *_, program = Denoiser(graphdef, **options).programs(params, CONDITIONS, SHAPE, sigmas, watched=False)
    # On a mesh an array made inside the program is of another type than an argument, and would make the function two.
    there = jax.NamedSharding(jax.make_mesh((1,), ("x",)), jax.P())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)  # noqa: E731
    text = program.function.lower(*jax.tree.map(place, program.arguments)).as_text()
    main = text[text.index("func.func public @main") :]
    main = main[: main.index("func.func private")]
    assert ("stablehlo.while" in main) is not unrolled
    assert main.count("call @_distill_step_fn(") == (steps if unrolled else 0)
    assert text.count("func.func private @_distill_step_fn") == unrolled


@pytest.mark.slow
@pytest.mark.parametrize("watched", [False, True])
def test_what_is_compiled_ahead_is_what_sampling_calls(watched: bool):
    """After a warm-up nothing is traced again: shapes, types and static arguments are those of the real calls."""
    graphdef, params = functional.split(WanModel(tiny_models.T2V, rngs=nnx.Rngs(0)))
    shapes: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, CONDITIONS))
    for schedule in (SIGMAS[:2], unipc.unipc_table(2, 3.0)):
        denoiser = Denoiser(graphdef)
        names = [name for name, _ in compile_all(denoiser.programs(*shapes, SHAPE, schedule, watched=watched))]
        assert names[0] == "noise" and any(name.startswith("denoising") for name in names)
        with no_new_traces():
            noise, key = denoiser.draw(5, SHAPE)
            on_step = (lambda *_: None) if watched else None
            if isinstance(schedule, unipc.Coefficients):
                denoiser.sample_unipc(params, CONDITIONS, noise, schedule, on_step)
            else:
                denoiser.sample_step_distill(params, CONDITIONS, noise, schedule, key, on_step)


class no_new_traces:
    """A context in which no function of these tests is traced."""

    def __enter__(self) -> None:
        self.traced: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, seconds: float, **details: Any) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            self.traced.append(str(details.get("fun_name")))

    def __exit__(self, kind: Any, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)
        assert kind is not None or not [name for name in self.traced if "_fn" in name or "_draw" in name], self.traced


@pytest.fixture(autouse=True)
def no_stray_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    assert not [w for w in recwarn if "donated" in str(w.message)]
