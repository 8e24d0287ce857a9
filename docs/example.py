"""A notebook-length tour of the Python API: one video, four seeds, progress, files, and what a refusal looks like."""

import pathlib

from x2v_jax import Pipeline, Request, UserError, read_metadata, write_video

OUTPUTS = pathlib.Path("outputs/example")

# Weights are memory-mapped and read when they are first needed.
pipe = Pipeline.from_checkpoint("assets/shapes_t2v_4step")
print("task:", pipe.checkpoint.task, "| schedule:", pipe.checkpoint.schedule)

# The shortest way: uint8 frames [F, H, W, 3].
frames = pipe("a red circle moves left", seed=0)
print("frames:", frames.shape, frames.dtype)

# `generate` gives the latents, the times and the memory too, and calls back after each step.
result = pipe.generate(
    Request(prompt="a yellow triangle moves up", seed=1),
    on_step=lambda step, steps, latents: None,  # a progress bar, a preview, or a reason to stop
)
print("latents:", result.latents.shape, "| seconds:", {k: round(v, 2) for k, v in result.seconds.items()})

# The same seed gives the same video; another seed another start, size and speed.
for seed in (1, 2):
    again = pipe("a yellow triangle moves up", seed=seed)
    print(f"seed {seed}: same frames as above: {(again == result.frames).all()}")

# An mp4 that carries its settings.
OUTPUTS.mkdir(parents=True, exist_ok=True)
path = OUTPUTS / "triangle.mp4"
path.unlink(missing_ok=True)
write_video(path, result.frames, fps=16, metadata={"prompt": result.request.prompt, "seed": result.request.seed})
print("wrote", path, read_metadata(path))

# Mistakes are sentences.
try:
    pipe("a blue square moves down", num_frames=32)
except UserError as error:
    print("refused:", error)
