"""One network of a checkpoint on the device: its structure at once, its weights when first needed, until released."""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx

from x2v_jax.checkpoint.files.lazy_tensor import LazyTensor
from x2v_jax.checkpoint.lora import merge
from x2v_jax.checkpoint.names import wan
from x2v_jax.checkpoint.names.smoothing import is_smoothed
from x2v_jax.checkpoint.native.load import load_tensors
from x2v_jax.checkpoint.native.reader import NativeCheckpoint
from x2v_jax.checkpoint.quantize.eight_bit import quantization_of
from x2v_jax.memory.predict import device_dtype
from x2v_jax.models import functional
from x2v_jax.models.config import COMPONENTS, ClipConfig, Config, Umt5Config, VaeConfig, WanConfig
from x2v_jax.models.host_blocks import with_blocks_on_host
from x2v_jax.models.networks import make_network
from x2v_jax.ops.choice import DEFAULT_OPS, OpChoice


class Network[C: Config]:
    """A network whose weights come and go.

    Args:
        component: its name in the checkpoint.
        config: as `NativeCheckpoint.config` gives it.
        tensors: its weights as `NativeCheckpoint.tensors` gives (and has checked) them; read when they are loaded.
        dtype: "bfloat16" or "float32", of all networks but the VAE.
        vae_dtype: "bfloat16" or "float32", of the VAE.
        quantization: "int8" or "float8_e4m3fn" where the matrices of its blocks are; None: as the tensors say.
        ops: who computes its large operations.
        blocks_on_host: leave the weights of its blocks in the host's memory; see `models.host_blocks`.
    """

    def __init__(
        self,
        component: str,
        config: C,
        tensors: Mapping[str, LazyTensor],
        *,
        dtype: str,
        vae_dtype: str = "float32",
        quantization: str | None = None,
        ops: OpChoice = DEFAULT_OPS,
        blocks_on_host: bool = False,
    ):
        self.component = component
        self.config = config
        self.quantization = quantization = quantization or quantization_of(tensors)
        self._tensors = tensors
        self.dtype = vae_dtype if component == "vae" else dtype
        self._blocks_on_host = blocks_on_host
        options: dict[str, Any] = {"dtype": jnp.dtype(self.dtype)}
        if component != "vae":
            options |= {"quantization": quantization, "ops": ops}
        if component == "transformer":
            options["smoothed"] = is_smoothed(tensors)

        def network() -> nnx.Module:
            made = make_network(self.config, rngs=nnx.Rngs(0), **options)  # the numbers are never drawn
            return with_blocks_on_host(made) if blocks_on_host else made

        self.graphdef, _ = functional.abstract(network)
        self._params: functional.Params | None = None

    @overload
    @classmethod
    def of(
        cls, checkpoint: NativeCheckpoint, component: Literal["transformer"], **options: Any
    ) -> "Network[WanConfig]": ...
    @overload
    @classmethod
    def of(cls, checkpoint: NativeCheckpoint, component: Literal["vae"], **options: Any) -> "Network[VaeConfig]": ...
    @overload
    @classmethod
    def of(
        cls, checkpoint: NativeCheckpoint, component: Literal["text_encoder"], **options: Any
    ) -> "Network[Umt5Config]": ...
    @overload
    @classmethod
    def of(
        cls, checkpoint: NativeCheckpoint, component: Literal["image_encoder"], **options: Any
    ) -> "Network[ClipConfig]": ...
    @overload
    @classmethod
    def of(cls, checkpoint: NativeCheckpoint, component: str, **options: Any) -> "Network[Config]": ...
    @classmethod
    def of(
        cls,
        checkpoint: NativeCheckpoint,
        component: str,
        *,
        dtype: str,
        tensors: Mapping[str, LazyTensor] | None = None,
        quantized: bool = True,
        **options: Any,
    ) -> "Network[Any]":
        """A network of a checkpoint.

        Args:
            tensors: in place of the checkpoint's own.
            quantized: whether the caller runs 8-bit weights too.
            options: see `Network`.

        Raises:
            UserError: the component is missing or damaged; or it is 8-bit and `quantized` is not set.
        """
        if not quantized:
            checkpoint.require_floats(component)
        tensors = checkpoint.tensors(component) if tensors is None else tensors
        stored = checkpoint.quantization(component)
        return Network(component, checkpoint.config(component), tensors, dtype=dtype, quantization=stored, **options)

    @property
    def is_loaded(self) -> bool:
        return self._params is not None

    @property
    def shapes(self) -> functional.Params:
        """What `load` will give, without its numbers: the tree with a `jax.ShapeDtypeStruct` for each parameter."""
        return functional.unflatten({name: self._shape(name, tensor) for name, tensor in self._tensors.items()})

    def load(self) -> functional.Params:
        """The parameters on the device, read from the file unless they are there already.

        Raises:
            UserError: a weight is stored in a type that is not a plain float.
        """
        if self._params is None:
            targets = {name: self._shape(name, tensor) for name, tensor in self._tensors.items()}
            self._params = load_tensors(self._tensors, targets)
        return self._params

    def jit(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the network and inputs -> the program of parameters, as `load` gives them, and inputs."""
        return jax.jit(lambda params, *inputs: call(functional.merge(self.graphdef, params), *inputs))

    def release(self) -> None:
        """Lets the device have its memory back; a later `load` reads the file again."""
        self._params = None
        gc.collect()

    def _shape(self, name: str, tensor: LazyTensor) -> jax.ShapeDtypeStruct:
        dtype = device_dtype(self.component, name, tensor.dtype, self.dtype)
        there = None
        if self._blocks_on_host and name.startswith("blocks."):
            there = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
        return jax.ShapeDtypeStruct(tensor.shape, dtype, sharding=there)


def describe_networks(
    checkpoint: NativeCheckpoint,
    loras: Sequence[tuple[str, float]],
    *,
    dtype: str,
    vae_dtype: str = "float32",
    ops: OpChoice = DEFAULT_OPS,
    offload: str = "none",
    allow_partial: bool = False,
) -> tuple[dict[str, Network[Config]], merge.LoraReport | None]:
    """The networks that a checkpoint has, by component, none of them loaded; LoRAs are merged into the transformer.

    Args:
        dtype, vae_dtype, ops: see `Network`.
        allow_partial: merge what fits of a LoRA and report the rest.
        offload: "none", or "blocks" for those of the transformer in the host's memory.

    Raises:
        UserError: the checkpoint is damaged, or a LoRA does not fit it.
    """
    networks: dict[str, Network[Config]] = {}
    report = None
    for name in filter(checkpoint.has, COMPONENTS):
        tensors = checkpoint.tensors(name)
        if name == "transformer" and loras:
            files = [(merge.LoraFile.open(path), strength) for path, strength in loras]
            rows = wan.table(name, checkpoint.config(name))
            tensors, report = merge.merge_into_native(tensors, files, rows, allow_partial)
        on_host = offload == "blocks" and name == "transformer"
        networks[name] = Network.of(
            checkpoint, name, dtype=dtype, tensors=tensors, vae_dtype=vae_dtype, ops=ops, blocks_on_host=on_host
        )
    return networks, report
