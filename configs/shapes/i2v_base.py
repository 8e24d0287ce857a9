"""Image to video for Moving Shapes: the text-to-video model goes on with a first frame and a small CLIP tower."""

from ml_collections import ConfigDict

from x2v_jax.config.load import load_config
from x2v_jax.config.training import phase


def get_config() -> ConfigDict:
    config = load_config("configs/shapes/base.py", typed=False)
    config.unlock()
    config.run_dir = "runs/shapes_i2v_base"
    config.init_from = "assets/shapes"
    config.vae = "assets/shapes"
    config.share_vae = True
    config.export_dtype = "bfloat16"
    config.model.update({"model_type": "i2v", "in_dim": 36, "clip_dim": 64})
    config.image_encoder = ConfigDict(
        {"image_size": 64, "patch_size": 16, "dim": 64, "num_heads": 4, "num_layers": 3, "out_dim": 32}
    )
    config.phases = (
        phase(
            "image to video",
            steps=4000,
            learning_rate=1.5e-3,
            warmup=100,
            decay_share=0.5,
            final_scale=0.03,
            batch_size=16,
        ),
    )
    return config
