"""Self-Forcing: Wan2.1 T2V 1.3B block by block, 4 steps a block, as long as wanted with a sliding window.

Make the checkpoint with `python -m convert wan SOURCE checkpoints/wan_t2v_1_3b_self_forcing --variant self_forcing`,
where SOURCE is the Wan2.1-T2V-1.3B folder with Self-Forcing's checkpoint in it.

81 frames are the trained window, which the cache holds: 21 latent frames in 7 blocks. Longer videos
(`--config.seconds=60`, `--config.endless=true`) forget the oldest block for each new one; `--config.rollout.sink=3`
keeps the first block in sight, `--config.rollout.mode=fragments` starts again from the last block of a window instead.

Task: text to video, of any length; `--config.image=FILE` gives the first frame, `--config.continue_from=FILE` the last
blocks of an earlier run, `--config.prompt_schedule="5: …; 10: …"` the prompts from these seconds on.
Hardware: one GPU with 24 GB (2.8 GB of weights and 6.0 GB of keys and values in bfloat16).
Time: not measured at full size. 4 network passes and one to remember the block for every 12 frames.
Result: a video of 5 seconds at 16 frames a second, which can be watched while it is made.
Command: python -m infer --config=configs/self_forcing/wan_t2v_self_forcing.py --config.prompt="…"
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(
        task="t2v",
        checkpoint="checkpoints/wan_t2v_1_3b_self_forcing",
        rollout_mode="sliding",
        rollout_window=21,
        num_frame_per_block=3,
        denoising_step_list=(1000, 750, 500, 250),
        warp_denoising_step=True,
        shift=5.0,
        guidance_scale=1.0,
        height=480,
        width=832,
        num_frames=81,
        seed=42,
    )
