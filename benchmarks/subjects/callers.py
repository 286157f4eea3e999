"""The op, the linen module and the nnx module behind one signature.

    y, (mean, var) = caller(x, params, state, train=True, **options)

Options of a module's call go there, and the others to its constructor.
"""

import inspect
from typing import Any

import jax
from flax import nnx

import jaxbn


def functional(x, params, state, *, train, update_stats=True, **options):
    options = {k: v for k, v in options.items() if k not in ("domains", "classes")}  # as the arrays
    y, new = jaxbn.batch_norm(x, params, state, train=train, **options)
    return y, (new if update_stats else state)[:2]


def linen(x, params, state, *, train, **options):
    call, constructor = _split(jaxbn.linen.BatchNorm, options)
    layer = jaxbn.linen.BatchNorm(use_running_average=not train, **constructor)
    held = {"params": params._asdict(), "batch_stats": _statistics(state, options)}
    y, updates = layer.apply(held, x, mutable=["batch_stats"], **call)
    stats = updates["batch_stats"]
    return y, (stats["mean"], stats["var"])


def nnx_(x, params, state, *, train, **options):
    call, constructor = _split(jaxbn.nnx.BatchNorm, options)
    constructor |= {"num_features": x.shape[-1], "use_running_average": not train}
    layer = nnx.eval_shape(lambda: jaxbn.nnx.BatchNorm(**constructor, rngs=nnx.Rngs(0)))
    for name, value in (params._asdict() | _statistics(state, options)).items():
        getattr(layer, name).set_value(value)
    y = layer(x, **call)
    return y, (layer.mean[...], layer.var[...])


def _statistics(state, options) -> dict[str, jax.Array]:
    counted = options.get("momentum", 0.99) is None
    return {name: v for name, v in state._asdict().items() if counted or name != "count"}


def _split(module, options) -> tuple[dict[str, Any], dict[str, Any]]:
    known = inspect.signature(module.__call__).parameters
    call = {name: value for name, value in options.items() if name in known}
    return call, {name: value for name, value in options.items() if name not in known}


CALLERS = {"functional": functional, "linen": linen, "nnx": nnx_}
