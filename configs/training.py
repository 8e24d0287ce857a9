"""The old place of x2v_jax.config.training, for config files of users, in a clone and for one release."""

import warnings

from x2v_jax.config.training import *  # noqa: F403

warnings.warn("configs.training has moved; import x2v_jax.config.training", DeprecationWarning, stacklevel=2)
