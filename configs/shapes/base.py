"""The text-to-video model of Moving Shapes: 1.9 million parameters, flow matching, guidance by caption dropout."""

from ml_collections import ConfigDict

from x2v_jax.config.training import phase, training_config


def get_config() -> ConfigDict:
    config = training_config(task="flow_matching", run_dir="runs/shapes_base")
    config.vae = "runs/shapes_vae/export"
    config.model = ConfigDict({"dim": 128, "ffn_dim": 512, "num_heads": 4, "num_layers": 6, "freq_dim": 128})
    config.text_encoder = ConfigDict({"dim": 64, "dim_attn": 64, "dim_ffn": 128, "num_heads": 4, "num_layers": 2})
    config.dtype = "float32"  # on CPU 16 bits are no faster at this size
    config.share_vae = False  # whether the export names config.vae instead of holding it
    config.export_dtype = "float32"
    config.init_from = ""  # a native checkpoint to start from, such as assets/shapes
    config.num_videos = 4096
    config.caption_dropout = 0.1
    config.shift = 3.0
    config.sampling_shift = 3.0
    config.guidance_scale = 2.0  # more than this pinches the shapes: 5 is right for 83 prompts of 100, 2 for 99
    config.evaluation = ConfigDict({"prompts": 96, "steps": 25})
    config.optimizer = "muon"
    config.ema_decay = 0.998
    config.eval_every = 2000
    config.phases = (
        phase(
            "flow matching",
            steps=10000,
            learning_rate=2e-3,
            warmup=100,
            decay_share=0.4,
            final_scale=0.03,
            batch_size=16,
        ),
    )
    return config
