"""Batch norm in NumPy float64: what everything else is compared with. No jax here.

Arrays are put with their feature axes last, as rows [n, C]; a mask is a weight of 0 or 1, and
weights stand in its place.
"""

import math

import numpy as np


def rows(v, axis, shape=None):
    """v, broadcast to shape, as [n, C] in float64 (or complex128), C over the feature axes."""
    v = np.asarray(v)
    v = v.astype(np.complex128 if np.iscomplexobj(v) else np.float64)
    v = v if shape is None else np.broadcast_to(v, shape)
    axis = sorted(a % v.ndim for a in (axis if isinstance(axis, tuple) else (axis,)))
    last = range(v.ndim - len(axis), v.ndim)
    v = np.moveaxis(v, axis, last)
    return v.reshape(-1, math.prod(v.shape[a] for a in last))


def moments(x, axis=-1, mask=None):
    """Count, mean and biased variance, each [C]; 0, 0, 0 where no cell is valid."""
    w = rows(True if mask is None else mask, axis, np.shape(x)).real
    v = np.where(w != 0, rows(x, axis), 0)  # a NaN outside the mask is not there
    count = w.sum(0)
    n = np.where(count > 0, count, 1)
    mean = (v * w).sum(0) / n
    var = (np.abs(v - mean) ** 2 * w).sum(0) / n
    return count, mean, var


def normalize(x, mean, var, scale, bias, axis=-1, epsilon=1e-5):
    """Equals y as rows [n, C]."""
    return (rows(x, axis) - mean) / np.sqrt(var + epsilon) * scale + bias


def gradients(x, dy, scale, axis=-1, mask=None, epsilon=1e-5):
    """Equals dx as rows [n, C], dscale [C], dbias [C] of sum(y * dy), for real x."""
    w = rows(True if mask is None else mask, axis, np.shape(x))
    count, mean, var = moments(x, axis, mask)
    v, dy, n = rows(x, axis), rows(dy, axis), np.where(count > 0, count, 1)
    rstd = np.where(count > 0, 1 / np.sqrt(var + epsilon), 0)
    xhat = np.where((w != 0) | np.isfinite(v), (v - mean) * rstd, 0)
    dbias, dscale = dy.sum(0), (dy * xhat).sum(0)
    # Cells outside the mask are normalized too, so their dy reaches the statistics.
    dx = scale * rstd * (dy - w * (dbias + np.where(w != 0, xhat, 0) * dscale) / n)
    return dx, dscale, dbias


def gradient_of_weights(x, dy, scale, weights, axis=-1, epsilon=1e-5):
    """Equals the derivative of sum(y * dy) by each cell's own weight, as rows [n, C]."""
    _, dscale, dbias = gradients(x, dy, scale, axis, weights, epsilon)
    count, mean, var = moments(x, axis, weights)
    rstd = 1 / np.sqrt(var + epsilon)
    xhat = (rows(x, axis) - mean) * rstd
    return -scale / count * (xhat * dbias + (xhat**2 - var * rstd**2) * dscale / 2)


def corrections(mean, var, old_mean, old_var, r_max, d_max, epsilon=1e-5):
    """Equals r and d of batch renormalization, each [C]."""
    sd = np.sqrt(old_var + epsilon)
    r = np.clip(np.sqrt(var + epsilon) / sd, 1 / r_max, r_max)
    return r, np.clip((mean - old_mean) / sd, -d_max, d_max)


def running(old, new, momentum):
    """Equals momentum * old + (1 - momentum) * new."""
    old = np.asarray(old)
    return momentum * old.astype(np.result_type(old, np.float64)) + (1 - momentum) * new


def tolerance(dtype, count):
    """What rounding alone may do, relative to the largest entry.

    About eight rounded operations lie between x and a result, and a sum of count terms whose
    errors add up as a random walk; all in float32 or wider. Then one rounding to dtype.
    """
    eps = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "complex64": 2.0**-23}
    narrow = eps.get(np.dtype(dtype).name, 2.0**-52)
    return narrow / 2 + min(narrow, 2.0**-23) * (8 + math.sqrt(count))


def assert_close(actual, desired, tolerance, what=""):
    """The largest error is at most tolerance times the largest entry of desired."""
    actual = np.asarray(actual)
    actual = actual.astype(np.complex128 if np.iscomplexobj(actual) else np.float64)
    desired = np.asarray(desired)
    assert actual.size == desired.size, (what, actual.shape, desired.shape)
    error = np.abs(actual.reshape(desired.shape) - desired).max(initial=0)
    bound = tolerance * np.abs(desired).max(initial=0)
    assert error <= bound, f"{what}: error {error:.2e}, allowed {bound:.2e}"
