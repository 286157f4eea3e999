"""The distribution of a layer's x as a few quantiles of a sample."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._inspection.hooks import Call
from jaxbn._op import devices
from jaxbn._op.arguments.cells import check_cells
from jaxbn._op.arguments.pools import resolve

QUANTILES = 64  # equally probable values
SAMPLE = 4096  # cells; the share below any value is then right to 0.8 %, one sd


def quantiles(call: Call) -> jax.Array:
    """Values of x that are equally probable, [QUANTILES], in order; of |x| if x is complex.

    They are those of a sample of cells, spread evenly over rows, positions and channels. Devices
    whose statistics the layer pools are pooled. Cells behind the mask, or not finite, take no part;
    if nothing is left, all values are NaN.

    >>> import jaxbn, jax.numpy as jnp
    >>> from jaxbn import calls
    >>> from jaxbn._inspection import sketch
    >>> x = jnp.linspace(0, 1, 6400).reshape(64, 100)
    >>> q = sketch.quantiles(calls.Call(jaxbn.linen.BatchNorm(), x, None, True))
    >>> [round(float(v), 2) for v in q[jnp.array([0, 32, 63])]]
    [0.01, 0.51, 0.99]
    """
    layer = call.layer
    mask, _ = check_cells("watch", call.mask, None, call.x)
    # Where shardings are types, JAX can neither merge sharded axes nor pick from them.
    x = devices.sharded_as(call.x, call.x, [None] * call.x.ndim)
    cells = _some(x, x.shape)
    valid = jnp.isfinite(cells)
    if mask is not None:
        mask = devices.sharded_as(mask, mask, [None] * mask.ndim)
        valid &= _some(mask, x.shape) > 0
    pool = resolve("watch", layer.axis_name, layer.axis_index_groups)
    # Zeros for what does not count, as `gather` adds: it would spread what is not finite.
    both = jnp.stack([jnp.where(valid, cells, 0), valid.astype(jnp.float32)], -1)
    if pool is not None:
        for name in pool.mapped:
            both = devices.parts(both, name, pool.groups)
        both = devices.gather(both, pool) if pool.axis_name else both
    cells = jnp.sort(jnp.where(both[..., 1] > 0, both[..., 0], jnp.inf).ravel())
    number = both[..., 1].sum().astype(np.int32)
    middles = jnp.asarray(np.arange(1, 2 * QUANTILES, 2), np.int32)  # of QUANTILES equal parts
    return jnp.where(number > 0, cells[middles * number // (2 * QUANTILES)], jnp.nan)


def _some(v: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Some cells of each row of v, broadcast to the shape: float32 [rows, cells]."""
    rows, width = shape[0], math.prod(shape[1:])
    number = min(width, -(-SAMPLE // max(rows, 1)))
    # A step without a common factor visits all cells of a row before any again, and the golden
    # ratio spreads the first few of them evenly.
    step = max(1, round(width * 0.618))
    while math.gcd(step, width) > 1:
        step += 1
    places = (np.arange(rows * number) * step % max(width, 1)).reshape(rows, number)
    v = jnp.abs(v) if jnp.iscomplexobj(v) else v
    flat = jnp.broadcast_to(v, shape).reshape(rows, width)
    return jnp.take_along_axis(flat, jnp.asarray(places), axis=1).astype(jnp.float32)
