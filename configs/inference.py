"""The old place of x2v_jax.config.inference, for config files of users, in a clone and for one release."""

import warnings

from x2v_jax.config.inference import *  # noqa: F403

warnings.warn("configs.inference has moved; import x2v_jax.config.inference", DeprecationWarning, stacklevel=2)
