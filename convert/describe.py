"""`python -m convert inspect`: what a path holds and what running it takes; or what became of each 8-bit matrix."""

import argparse
import dataclasses
import json
import sys
import types
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from x2v_jax.checkpoint.names.smoothing import ASIDE, smoothing_shapes
from x2v_jax.checkpoint.names.wan import native_shapes
from x2v_jax.memory import predict
from x2v_jax.models.config import Schedule, VaeConfig

COUNTED = (
    "weights in bfloat16 (those in 8 bits as they are, norms and the VAE in float32) and estimated activations; the "
    "text encoder and CLIP leave the device before denoising"
)


def describe(args: argparse.Namespace) -> None:
    """Runs the parsed command; with --layers or --against it tells of each 8-bit matrix.

    Raises:
        UserError: the path cannot be read; with --layers, nothing is 8-bit; with --against, the source does not fit.
    """
    if args.layers or args.against:
        _each_matrix(args)
        return
    from x2v_jax.checkpoint.conversion.inspect import inspect, to_text

    found = inspect(args.path, phases)
    print(json.dumps(found.to_dict(), indent=2) if args.json else to_text(found, COUNTED))


def _each_matrix(args: argparse.Namespace) -> None:
    from x2v_jax.checkpoint.conversion.compare import against_notes
    from x2v_jax.checkpoint.conversion.quantization_report import quantization_report, summary

    if args.against:
        for note in against_notes(args.path, args.against):
            print(f"note: {note}", file=sys.stderr if args.json else sys.stdout)
    reports = []
    for report in quantization_report(args.path, args.against):
        reports.append(report)
        if not args.json:
            print(f"  {report}", flush=True)  # as it is read: a large model takes minutes
    if args.json:
        print(json.dumps([dataclasses.asdict(r) | {"decibels": r.decibels} for r in reports], indent=1))
    else:
        print("\n".join(summary(reports)))


class _Sizes:
    """Stands for a checkpoint that has these networks."""

    def __init__(self, configs: Mapping[str, Any], smoothed: Collection[str]):
        self._configs, self._smoothed = configs, smoothed

    def has(self, component: str) -> bool:
        return component in self._configs

    def tensors(self, component: str) -> dict[str, Any]:
        dtype = np.dtype(np.float32)  # of the file; the plan counts each tensor in the type that it has on the device
        config = self._configs[component]
        shapes = native_shapes(component, config)
        if component in self._smoothed:
            shapes |= {name: n for name, n in smoothing_shapes(config).items() if not name.startswith(ASIDE)}
        return {name: types.SimpleNamespace(shape=shape, dtype=dtype) for name, shape in shapes.items()}


def phases(
    configs: Mapping[str, Any], schedule: Schedule, quantized: Collection[str] = (), smoothed: Collection[str] = ()
) -> dict[str, int]:
    """Bytes on the device by phase, for one video at the schedule's size, as the pipeline itself predicts them.

    Args:
        configs: component -> its config, of those that are there. Without a transformer there is nothing to predict.
        quantized: those whose matrices are 8-bit.
        smoothed: those of them that multiply their modulation by factors.
    """
    if "transformer" not in configs or (configs["transformer"].model_type == "i2v" and "image_encoder" not in configs):
        return {}
    vae = configs.get("vae", VaeConfig())
    latents = (
        (schedule.num_frames - 1) // vae.temporal_stride + 1,
        schedule.height // vae.spatial_stride,
        schedule.width // vae.spatial_stride,
    )
    guided = not schedule.is_distilled and schedule.guidance_scale != 1
    sizes, all_configs = _Sizes(configs, smoothed), {"vae": vae, **configs}
    work = predict.Workload(latents, guided, quantized=tuple(quantized))
    return predict.plan(sizes, all_configs, work).phases
