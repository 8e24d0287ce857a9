"""The network of each config: made, or its structure and shapes alone."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from x2v_jax.models.clip import ClipVisionTower
from x2v_jax.models.config import ClipConfig, Config, Umt5Config, VaeConfig, WanConfig
from x2v_jax.models.functional import Params, abstract
from x2v_jax.models.umt5 import Umt5Encoder
from x2v_jax.models.vae import WanVae
from x2v_jax.models.wan import WanModel

_NETWORKS: Mapping[type, Callable[..., nnx.Module]] = {
    WanConfig: WanModel,
    VaeConfig: WanVae,
    Umt5Config: Umt5Encoder,
    ClipConfig: ClipVisionTower,
}


def make_network(config: Config, *, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """The network of a config with drawn weights.

    Args:
        options: as the network takes them: dtype and param_dtype all; quantization and ops all but the VAE; smoothed
            and remat WanModel.
    """
    return _NETWORKS[type(config)](config, rngs=rngs, **options)


def abstract_network(config: Config, **options: Any) -> tuple[nnx.GraphDef, Params]:
    """The structure of a config's network, and its parameters as `jax.ShapeDtypeStruct`; nothing is allocated.

    >>> _, params = abstract_network(VaeConfig())
    >>> params["decoder"]["conv1"]["kernel"].shape
    (3, 3, 3, 16, 384)

    Args:
        options: see `make_network`.
    """
    return abstract(lambda: make_network(config, rngs=nnx.Rngs(0), **options))
