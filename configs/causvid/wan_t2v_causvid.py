"""LightX2V's CausVid model: Wan2.1 T2V 14B block by block, 9 steps a block, in fragments that overlap by one block.

Make the checkpoint with `python -m convert wan SOURCE checkpoints/wan_t2v_14b_causvid --variant causvid`, where SOURCE
is a folder that holds causvid_models/. The keys below are those of LightX2V's configs/causvid/wan_t2v_causvid.json
(which `--config=configs/lightx2v.py:FILE.json` reads as it is):

    LightX2V                   here
    num_fragments 3            the same: the length, 21 + 2 (21 - 3) = 57 latent frames or 225 frames
    num_frames 21              rollout_window: latent frames of a fragment (num_frames here counts the video's frames)
    num_frame_per_block 3      the same: latent frames that are made together
    num_blocks 7               the same: 7 blocks of 3 are the 21 frames
    frame_seq_length 1560      the same: tokens of a latent frame, (480 / 16) (832 / 16)
    denoising_step_list        the same, and not warped: it is shifted by 8 already. LightX2V shifts it again
    sample_shift 8             the checkpoint's
    infer_steps 9              the length of the list
    target_video_length 81     nothing, there or here

Numbers that do not agree with each other or with height and width are refused. Another length is
`--config.seconds=60` or `--config.endless=true`; `--config.context_noise=-1` leaves the keys noisy, as LightX2V does.

Task: text to video, of any length; `--config.image=FILE` gives the first frame.
Hardware: one GPU with 80 GB (28.6 GB of weights and 26.8 GB of keys and values in bfloat16; `--config.kv_cache=int8`
halves the latter).
Time: not measured at full size. 9 network passes and one to remember the block for every 12 frames.
Result: a video of 14 seconds at 16 frames a second, which can be watched while it is made.
Command: python -m infer --config=configs/causvid/wan_t2v_causvid.py --config.prompt="…"
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(
        task="t2v",
        checkpoint="checkpoints/wan_t2v_14b_causvid",
        num_fragments=3,
        rollout_mode="fragments",
        rollout_window=21,
        num_frame_per_block=3,
        num_blocks=7,
        frame_seq_length=1560,
        denoising_step_list=(999, 934, 862, 756, 603, 410, 250, 140, 74),
        warp_denoising_step=False,
        guidance_scale=1.0,
        height=480,
        width=832,
        seed=42,
    )
