"""A listener hears every marked input of every layer by its number; without one there is nothing in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

from x2v_jax.checkpoint.names.smoothing import GROUPS
from x2v_jax.models import functional
from x2v_jax.models.activation_stats import in_layer, is_listening, listening, observe
from x2v_jax.models.host_blocks import with_blocks_on_host
from x2v_jax.models.wan import WanModel

CONFIG = tiny_models.T2V


def network(*, host: bool = False):
    """A call of it, compiled when it is first made."""
    flat = tiny_models.random_parameters("transformer", CONFIG)

    def make():
        made = WanModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
        return with_blocks_on_host(made) if host else made

    graphdef, _ = functional.abstract(make)
    params = functional.unflatten({name: jnp.asarray(value) for name, value in flat.items()})
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((1, 2, 4, 6, 16)), jnp.float32)
    text = jnp.asarray(rng.standard_normal((1, CONFIG.text_len, CONFIG.text_dim)), jnp.float32)
    call = jax.jit(lambda params: functional.merge(graphdef, params)(latents, jnp.full((1,), 700.0), text))
    return lambda: call(params)


@pytest.mark.slow
@pytest.mark.parametrize("host", [False, True])
def test_every_input_is_heard_once_a_layer(host: bool):
    call = network(host=host)
    silent = call()
    heard: list[tuple[str, int, np.ndarray]] = []
    with listening(lambda *said: heard.append(said)):
        loud = call()
    assert jnp.array_equal(silent, loud)
    expected = sorted((name, layer) for name in GROUPS for layer in range(CONFIG.num_layers))
    assert sorted((name, layer) for name, layer, _ in heard) == expected
    assert all(x.shape == (CONFIG.dim,) and x.dtype == np.float32 and (x > 0).all() for *_, x in heard)


def test_what_is_heard_is_the_largest_magnitude():
    x = jnp.asarray([[[1.0, -5.0]], [[-3.0, 2.0]]])
    heard = []
    with listening(lambda name, layer, largest: heard.append((name, layer, largest.tolist()))):
        assert is_listening()
        jax.jit(lambda x: observe("here", x))(x).block_until_ready()
        jax.effects_barrier()
        with in_layer(4):
            observe("now", x.at[0, 0, 0].set(jnp.nan))
    assert not is_listening()
    assert heard[0] == ("here", 0, [3.0, 5.0])
    assert heard[1][:2] == ("now", 4) and np.isnan(heard[1][2][0]) and heard[1][2][1] == 5.0


def test_without_a_listener_the_program_is_as_if_nothing_were_marked():
    call = network()
    heard = []
    with listening(lambda *said: heard.append(said)):
        call()
    count = len(heard)
    call()  # traced anew: the program that called the host is forgotten
    assert len(heard) == count == 5 * CONFIG.num_layers
    assert "callback" not in str(jax.make_jaxpr(lambda x: observe("here", x))(jnp.ones((2, 3))))
    x = object()
    assert observe("here", x) is x


def test_only_one_listens_and_8_bit_rows_cannot_be_heard():
    with listening(lambda *said: None):
        with pytest.raises(RuntimeError, match="already"), listening(lambda *said: None):
            pass
        with pytest.raises(TypeError, match="only networks of floats"):
            observe("here", jnp.ones((2, 3), jnp.int8))
    with pytest.raises(KeyError), listening(lambda *said: None):
        raise KeyError
    with listening(lambda *said: None):  # an error leaves nobody listening
        pass
