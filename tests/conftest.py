"""Eight CPU devices and the strictest JAX there is; pyproject.toml turns warnings into errors."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
