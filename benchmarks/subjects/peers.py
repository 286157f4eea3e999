"""Every library's batch norm behind one signature.

    y, (mean, var) = batch_norm(x, (scale, bias), (mean, var), train=True)

x is channels-last. Weights and running statistics are float32 and y comes back in x's dtype:
by the library's own option where it has one, else by a cast. epsilon is 1e-5 everywhere, and
momentum is the fraction of the old value kept. What a library does not have raises
`NotImplementedError` with the words to print in its place.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn

os.environ.setdefault("KERAS_BACKEND", "jax")


class Peer(NamedTuple):
    name: str
    module: str  # what must be importable
    batch_norm: Callable[..., Any]


def ours(x, params, state, *, train, momentum=0.99, mask=None, axis_name=None, **options):
    state = jaxbn.State(*state, jnp.zeros((), jnp.int32))
    y, state = jaxbn.batch_norm(
        x,
        jaxbn.Params(*params),
        state,
        train=train,
        momentum=momentum,
        mask=mask,
        axis_name=axis_name,
        **options,
    )
    return y, (state.mean, state.var)


FUSED = "jaxbn, activation and residual"  # the name of `fused` in tables


def fused(x, params, state, **options):
    """Ours, with what follows inside: `activation` and `residual`."""
    return ours(x, params, state, **options)


def linen(x, params, state, *, train, momentum=0.99, mask=None, axis_name=None, **options):
    layer = flax.linen.BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        dtype=x.dtype,
        axis_name=axis_name,
        **options,
    )
    variables = {
        "params": dict(zip(("scale", "bias"), params, strict=True)),
        "batch_stats": dict(zip(("mean", "var"), state, strict=True)),
    }
    y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, (updates["batch_stats"]["mean"], updates["batch_stats"]["var"])


def flax_nnx(x, params, state, *, train, momentum=0.99, mask=None, axis_name=None):
    layer = nnx.BatchNorm(
        x.shape[-1],
        use_running_average=not train,
        momentum=momentum,
        dtype=x.dtype,
        axis_name=axis_name,
        rngs=nnx.Rngs(0),
    )
    layer.scale[...], layer.bias[...] = params
    layer.mean[...], layer.var[...] = state
    y = layer(x, mask=mask)
    return y, (layer.mean[...], layer.var[...])


def haiku(x, params, state, *, train, momentum=0.99, mask=None, axis_name=None):
    import haiku as hk

    if mask is not None:
        raise NotImplementedError("no mask")

    def forward(x):
        layer = hk.BatchNorm(True, True, momentum, cross_replica_axis=axis_name)
        return layer(x, is_training=train)

    # Haiku's weights and statistics keep the reduced axes, with size 1.
    keep = (1,) * (x.ndim - 1) + (-1,)
    scale, bias, mean, var = (v.reshape(keep) for v in (*params, *state))
    counter = jnp.zeros((), jnp.int32)
    before = {
        f"batch_norm/~/{name}": {"counter": counter, "hidden": v, "average": v}
        for name, v in (("mean_ema", mean), ("var_ema", var))
    }
    y, after = hk.transform_with_state(forward).apply(
        {"batch_norm": {"scale": scale, "offset": bias}}, before, None, x
    )
    mean, var = (after[key]["average"].reshape(-1) for key in before)
    return y.astype(x.dtype), (mean, var)


def equinox(x, *arguments, **options):
    y, state = equinox_channels_first(jnp.moveaxis(x, -1, 1), *arguments, **options)
    return jnp.moveaxis(y, 1, -1), state


def equinox_channels_first(x, params, state, *, train, momentum=0.99, mask=None, axis_name=None):
    """As Equinox lays out its images, and one example at a time, as its layers work."""
    import equinox as eqx

    if mask is not None:
        raise NotImplementedError("no mask")
    layer, store = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        x.shape[1],
        axis_name=("rows",) if axis_name is None else ("rows", axis_name),
        momentum=momentum,
        inference=not train,
        mode="batch",
    )
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, params)
    store = store.set(layer.batch_state_index, tuple(state))
    apply = jax.vmap(layer, axis_name="rows", in_axes=(0, None), out_axes=(0, None))
    y, store = apply(x, store)
    return y.astype(x.dtype), store.get(layer.batch_state_index)


@functools.cache
def _keras_layer(features, momentum, dtype):
    import keras

    layer = keras.layers.BatchNormalization(momentum=momentum, epsilon=1e-5, dtype=dtype)
    with jax.ensure_compile_time_eval():
        layer.build((None, features))
    layer.input_spec = None  # any rank
    return layer


def keras(x, params, state, *, train, momentum=0.99, mask=None, axis_name=None):
    if axis_name is not None:
        raise NotImplementedError("no axis_name")
    policy = "float32" if x.dtype == jnp.float32 else f"mixed_{x.dtype}"
    layer = _keras_layer(x.shape[-1], momentum, policy)
    layer._reduction_axes = list(range(x.ndim - 1))
    mask = None if mask is None else jnp.broadcast_to(mask, x.shape)[..., 0]
    y, state = layer.stateless_call(list(params), list(state), x, training=train, mask=mask)
    return y.astype(x.dtype), tuple(state)


def torch(x, params, state, *, train, momentum=0.99, mask=None, axis_name=None):
    if mask is not None:
        raise NotImplementedError("no mask")
    if axis_name is not None:
        raise NotImplementedError("no axis_name")
    from torch.nn.functional import batch_norm

    scale, bias, mean, var = (to_torch(v) for v in (*params, *state))
    old = np.array(var)
    y = batch_norm(channels_first(to_torch(x)), mean, var, scale, bias, train, 1 - momentum, 1e-5)
    n = x.size // x.shape[-1]
    if train and n > 1:  # torch's running var takes n / (n - 1) times the batch's; others' do not
        var = momentum * old + (var.numpy() - momentum * old) * (n - 1) / n
    y = jnp.asarray(y.float().moveaxis(1, -1).numpy(), x.dtype)
    return y, (jnp.asarray(mean.numpy()), jnp.asarray(np.asarray(var)))


def to_torch(x):
    """Equals x, as a torch tensor of its own memory and the same dtype (NumPy has no bfloat16)."""
    import torch

    return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, str(x.dtype)))


def channels_first(x):
    """The same memory under torch's axis order: for rank 4, its `channels_last` format."""
    return x.moveaxis(-1, 1)


def installed() -> dict[str, Callable[..., Any] | None]:
    """Each peer's function by its name, None where it cannot be imported."""
    return {
        peer.name: peer.batch_norm if importlib.util.find_spec(peer.module) else None
        for peer in PEERS
    }


def failure(name: str, error: Exception) -> str:
    """What stands in the table where a library failed; where ours did, its error is raised."""
    if name == PEERS[0].name:
        raise error
    return type(error).__name__


PEERS = (
    Peer("jaxbn", "jaxbn", ours),
    Peer("Flax linen", "flax", linen),
    Peer("Flax nnx", "flax", flax_nnx),
    Peer("Haiku", "haiku", haiku),
    Peer("Equinox", "equinox", equinox),
    Peer("Keras", "keras", keras),
    Peer("torch", "torch", torch),
)
