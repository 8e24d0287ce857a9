"""Wan2.1 T2V 14B with LightX2V's distillation LoRA: 4 steps without guidance, 81 frames of 480x832.

The LoRA is merged into the original weights when they are loaded. `--config.lora` takes other files and strengths.

Hardware: one GPU with 80 GB.
Time: not measured at full size.
Result: as wan_t2v_4step, a little weaker, because the LoRA is a rank-64 part of that change of the weights.
"""

from x2v_jax.config.inference import inference_config


def get_config():
    return inference_config(
        task="t2v",
        checkpoint="checkpoints/wan_t2v_14b",
        lora=(("Wan2.1-T2V-14B/loras/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors", 1.0),),
        denoising_step_list=(1000, 750, 500, 250),
        shift=5.0,
        guidance_scale=1.0,
        height=480,
        width=832,
        num_frames=81,
        seed=42,
    )
