"""How tests compile: as a user's session does, or quickly."""

import contextlib

import jax


@contextlib.contextmanager
def as_pasted():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@contextlib.contextmanager
def compiled_quickly():
    """Half of the compile time, for what is run and not read."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
