"""The old place of x2v_jax.config.flags, for config files of users, in a clone and for one release."""

import warnings

from x2v_jax.config.flags import *  # noqa: F403

warnings.warn("configs.flags has moved; import x2v_jax.config.flags", DeprecationWarning, stacklevel=2)
