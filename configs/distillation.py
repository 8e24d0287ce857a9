"""The old place of x2v_jax.config.distillation, for config files of users, in a clone and for one release."""

import warnings

from x2v_jax.config.distillation import *  # noqa: F403

warnings.warn("configs.distillation has moved; import x2v_jax.config.distillation", DeprecationWarning, stacklevel=2)
