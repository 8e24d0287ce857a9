"""LightX2V's own JSON files: `python -m infer --config=configs/lightx2v.py:FILE.json --config.checkpoint=… `.

x2v_jax/config/lightx2v.py reads them and says which settings mean what here; configs/causvid/wan_t2v_causvid.py says
what the keys of its autoregressive files mean.

Hardware and time: those of the model that the file configures; not measured here.
Result: the request that the JSON describes. Its model_path must be a checkpoint that `python -m convert` made.
"""

from x2v_jax.config.lightx2v import get_config

__all__ = ["get_config"]
