"""How tests compile: quickly, or as a user's session does."""

import contextlib
import functools
import os
from unittest import mock

import jax
import pytest
from jax._src import compiler

# The same collectives, fusions and buffers, as machine code that is made in a seventh of the time:
# without MLIR on the way to LLVM, in one module, and not optimized. Newer jaxlibs always take MLIR.
QUICKLY = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@contextlib.contextmanager
def as_pasted():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def quickly():
    """The options of `QUICKLY` that this jaxlib has."""

    def known(name, value):
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in QUICKLY.items() if known(name, value)}


@contextlib.contextmanager
def compiled_quickly():
    """For what is run and not read; a call's own `compiler_options` stay."""
    chosen, options = quickly(), compiler.get_compile_options

    @functools.wraps(options)
    def quick(*args, env_options_overrides=None, **kwargs):
        overrides = chosen | dict(env_options_overrides or {})
        return options(*args, env_options_overrides=overrides, **kwargs)

    with mock.patch.object(compiler, "get_compile_options", quick):
        yield


def environment(**variables):
    """The environment of another process, which then compiles quickly too."""
    flags = " ".join(f"--{name}={value}".lower() for name, value in quickly().items())
    return os.environ | {"XLA_FLAGS": flags} | variables


class Compiling:
    """A plugin: tests compile quickly, those marked `optimized` as a user's session does."""

    quickly = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before, self.quickly = self.quickly, item.get_closest_marker("optimized") is None
        if self.quickly:
            with compiled_quickly():
                return (yield)
        if before:
            jax.clear_caches()  # of programs that were compiled quickly
        return (yield)
