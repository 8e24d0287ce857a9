"""The VAE of Moving Shapes: 668 thousand parameters, 33 frames of 64x64 <-> 9x8x8x16 latents."""

from ml_collections import ConfigDict

from x2v_jax.config.training import phase, training_config


def get_config() -> ConfigDict:
    config = training_config(task="vae", run_dir="runs/shapes_vae")
    config.model = ConfigDict(
        {
            "dim": 8,
            "z_dim": 16,
            "dim_mult": (1, 2, 4, 4),
            "num_res_blocks": 1,
            "temporal_downsample": (False, True, True),
        }
    )
    config.foreground_weight = 9.0
    config.l1_weight = 0.1
    config.kl_weight = 1e-4
    config.eval_videos = 16
    config.statistics_videos = 128  # from which the mean and deviation of the latents are taken
    config.ema_decay = 0.99
    config.optimizer = "adam"
    config.clip_norm = 0.5
    config.phases = (
        phase("images", steps=1400, learning_rate=2e-3, decay_share=0.3, final_scale=0.3, batch_size=16, num_frames=1),
        phase("5 frames", steps=400, learning_rate=5e-4, warmup=50, batch_size=4, num_frames=5),
        phase("9 frames", steps=200, learning_rate=4e-4, warmup=20, batch_size=3, num_frames=9),
        phase(
            "33 frames",
            steps=200,
            learning_rate=2e-4,
            warmup=20,
            decay_share=0.7,
            final_scale=0.05,
            batch_size=1,
            num_frames=33,
        ),
    )
    return config
