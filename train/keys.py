"""What each key of a training config means, for `--help`. A test holds that no config has another key."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from x2v_jax.config.distillation import dmd_config
from x2v_jax.config.training import phase, training_config

# Heading, the keys' defaults, key -> meaning.
Section = tuple[str, dict[str, Any], dict[str, str]]

_EVERY = {
    "task": "what is learnt: vae, flow_matching, dmd, causvid, ode_pairs (data for ode_regression) or ode_regression",
    "run_dir": "folder of checkpoints, logs and samples; a run goes on from the newest checkpoint there",
    "resume_any": "go on although the folder was made with another config",
    "seed": "of weights, data and noise",
    "optimizer": "adam or muon",
    "clip_norm": "longer gradients are shortened to this norm",
    "max_grad_norm": "an update with a longer gradient is left out",
    "ema_decay": "of the averaged weights, which are evaluated and exported",
    "ema_start": "step from which the average is an average",
    "accumulate": "parts of a batch, one after the other, whose gradients are accumulated",
    "devices": "how many; 0 for all",
    "read_ahead": "steps whose batches are made while the device works",
    "log_every": "steps between lines of the log",
    "eval_every": "steps between evaluations, which leave samples",
    "save_every": "steps between checkpoints",
}
_PHASE = {
    "name": "for the log",
    "steps": "updates",
    "learning_rate": "after the warm-up",
    "batch_size": "samples an update, over all devices",
    "warmup": "steps in which the learning rate rises from 0",
    "decay_share": "share of the steps, at the end, in which it falls",
    "final_scale": "what it falls to, as a share of itself",
    "num_frames": "of the videos (vae)",
    "generator.every": "generator updates once in so many steps (dmd, causvid)",
    "critic.learning_rate": "of the critic, where it has its own",
    "continuation_share": "share of steps in which the student goes on from a video instead of starting one",
    "own_share": "share of these in which that video is the student's own",
    "own_most": "it goes on from a chain of 1 to so many videos of its own",
}
_DISTILLATION = {
    "teacher": "converted checkpoint with guidance and many steps",
    "student": "converted checkpoint that the student starts from; empty for the teacher",
    "dtype": "of the matmuls of student and critic, whose weights are float32",
    "teacher_dtype": "of the teacher's weights and matmuls",
    "export_dtype": "of the exported weights",
    "remat": "what gradients keep of a block: none (all of it), attention or block (its input)",
    "adam.b1": "decay of Adam's mean",
    "adam.b2": "decay of its mean square",
    "adam.weight_decay": "decoupled, a step",
    "student_schedule.denoising_step_list": "the timesteps at which the student is asked",
    "student_schedule.shift": "of its noise levels",
    "student_schedule.warp_denoising_step": "whether the list is of unshifted timesteps, to be shifted",
    "lora.rank": "train low-rank pairs of this rank beside the student's frozen weights; unset: all weights",
    "lora.alpha": "their change is scaled by alpha / rank; 64 if unset",
    "lora.targets": "modules that get pairs; attention and feed-forward of all blocks if unset",
    "causal.block": "latent frames a block of an autoregressive student; unset: whole videos",
    "causal.context_timestep": "timestep at which later blocks see a finished one",
    "causal.mode": "sliding, or fragments",
    "data.prompts": "text file or folder of captions; shapes for the tiny world",
    "data.images": "cache of first frames (train.prepare images)",
    "data.latents": "cache of real videos (train.prepare videos)",
    "data.count": "how many of them; 0 for all",
    "data.seed": "of their order",
    "size.height": "pixels",
    "size.width": "pixels",
    "size.num_frames": "4n + 1",
    "evaluation.prompts": "how many samples an evaluation makes",
    "dmd.real_guidance_scale": "of the teacher: uncond + g (cond - uncond)",
    "dmd.guidance_scale": "instead, in Self-Forcing's form: cond + g (cond - uncond), 5 where the other is 6",
    "dmd.fake_guidance_scale": "of the critic; 1 is none",
    "dmd.timestep_shift": "of the noise levels at which teacher and critic are compared",
    "dmd.min_timestep": "the least of them",
    "dmd.max_timestep": "the greatest",
    "generator_every": "the generator is updated once in so many steps, the critic in each",
    "continuation.max_blocks": "how many blocks come before a continuation, at most",
    "continuation.pairs": "trajectories of ode_pairs from whose ends continuations start",
    "share_batches": "whether critic and generator learn from the same rows",
}
_PAIRS = {
    "pairs": "trajectories to learn from (ode_regression)",
    "output": "folder of the trajectories (ode_pairs)",
    "num_steps": "of the teacher's solver (ode_pairs)",
    "guidance_scale": "of the teacher (ode_pairs)",
    "batch_size": "videos at a time (ode_pairs)",
}
_BASE = {
    "vae": "exported checkpoint whose VAE and tokenizer are used",
    "share_vae": "whether the export names it instead of holding its weights",
    "init_from": "checkpoint whose weights are the first ones",
    "num_videos": "of the tiny world, made before the first step",
    "caption_dropout": "share of samples without a caption, for guidance",
    "shift": "of the noise levels that are drawn",
    "sampling_shift": "of those that samples are made with",
    "evaluation.steps": "of the solver that makes samples",
    "model.*, text_encoder.*, image_encoder.*": "sizes of the networks, by the names in model.json",
}
_VAE = {
    "foreground_weight": "of pixels that are not background, in the loss",
    "l1_weight": "of the absolute error, beside the squared one",
    "kl_weight": "of the latents' distance from a normal distribution",
    "eval_videos": "how many an evaluation reconstructs",
    "statistics_videos": "from which mean and deviation of the latents are taken; a multiple of 8",
}


def sections() -> Iterator[Section]:
    """Headings with the keys below them, in the order of `--help`."""
    common, distillation = training_config("", ""), dmd_config("")
    yield "every training", flat(common), _EVERY
    numbers = flat(phase("", steps=0, learning_rate=0.0, batch_size=0))
    defaults = {name: numbers[name] for name in ("warmup", "decay_share", "final_scale")}
    yield "phases, counted from 0", {f"phases.0.{k}": v for k, v in defaults.items()}, {
        f"phases.0.{name}": meaning for name, meaning in _PHASE.items()
    }  # fmt: skip
    yield "distillations (dmd, causvid, ode_pairs, ode_regression)", flat(distillation), _DISTILLATION
    yield "trajectories", {}, _PAIRS
    yield "flow_matching", {}, _BASE
    yield "vae", {}, _VAE


def flat(config: ConfigDict, before: str = "") -> dict[str, Any]:
    """All keys with dots between groups and keys; an entry of a tuple of groups has its number."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        entries = value if isinstance(value, tuple) else ()
        if isinstance(value, ConfigDict):
            result |= flat(value, f"{before}{name}.")
        elif entries and all(isinstance(entry, ConfigDict) for entry in entries):
            for i, entry in enumerate(entries):
                result |= flat(entry, f"{before}{name}.{i}.")
        else:
            result[f"{before}{name}"] = value
    return result


def help_lines() -> str:
    """The keys, their meanings and in brackets their defaults; a config sets those of its recipe."""
    lines = ["keys (--config.KEY=VALUE), in brackets what a recipe begins from; --dry-run shows what one has:"]
    for heading, defaults, meanings in sections():
        lines += ["", f"{heading}:"]
        for name, meaning in meanings.items():
            value = defaults.get(name, "")
            lines.append(f"  {name:<38} {meaning}" + ("" if value in ("", None) else f" [{value}]"))
    return "\n".join(lines)
