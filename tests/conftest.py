"""Eight CPU devices and the strictest JAX there is; pyproject.toml turns warnings into errors."""

import jax
import pytest

from tests.support.compiling import Compiling

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    config.pluginmanager.register(Compiling())


@pytest.fixture
def switched(monkeypatch):
    """Sets a constant of a module for one test, and drops JAX's traces, which hold the old one."""

    def switch(module, name, value):
        monkeypatch.setattr(module, name, value)
        jax.clear_caches()

    yield switch
    monkeypatch.undo()
    jax.clear_caches()
