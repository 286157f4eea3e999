"""Other norms in place of a model's batch norms: other batch norms, or norms of one sample."""

from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

from jaxbn._inspection import layers
from jaxbn._inspection.hooks import check_apply
from jaxbn._inspection.selection import Where, check_where, select
from jaxbn._misuse import misuse
from jaxbn._op.arguments.values import check_numbers
from jaxbn._op.axes import is_integer
from jaxbn._swapping.batch_norms import as_batch_norms
from jaxbn._swapping.sample_norms import NORMS, as_sample_norms
from jaxbn._swapping.swapped import Swapped

BATCH_NORMS = ("batch", "flax")
# Option → the batch norms that have it.
OPTIONS = {
    "axis_name": BATCH_NORMS,
    "momentum": BATCH_NORMS,
    "unbiased": ("batch",),
    "virtual_batch_size": ("batch",),
}


def swap(
    model: Any,
    variables: Any = None,
    to: str = "group",
    where: Where = "*",
    *,
    groups: int | None = None,
    standardize: Where | None = None,
    axis_name: str | Sequence[str] | EllipsisType | None = ...,
    virtual_batch_size: int | EllipsisType | None = ...,
    unbiased: bool | EllipsisType = ...,
    momentum: float | EllipsisType | None = ...,
) -> Swapped:
    """The model with other norms in place of its batch norms; the model's source stays as it is.

    `to="batch"` puts this library's BatchNorm in place of Flax's, or gives this library's layers
    other options. Use it for a model that you did not write: its statistics are then those of all
    devices (`axis_name`, as PyTorch's `convert_sync_batchnorm` does), of ghost batches, or right
    at large means. Parameters, statistics and everything else that a layer was given stay. The
    network computes what it computed, but for the options and for where Flax's numbers are wrong.
    `to="flax"` is the way back to Flax's BatchNorm.

    `to="group"`, "layer" and "instance" put Flax's own norms of these names in place. Use them when
    batches are too small for their statistics. The new norms use the old scale, bias, epsilon and
    dtypes, and the masks of the calls. The running statistics go, and momentum, axis_name and the
    mode of the call have no effect any more. The network then computes another function and must be
    trained. Wu & He 2018, "Group Normalization".

    Parameters keep their names in either case, so the optimizer and checkpoints stay as they are.

    Args:
      model: linen's `net.apply`, or an nnx model, which is changed in place.
      variables: linen's variables.
      to: "batch", "flax", "group", "layer" (over the features of each position, as in a
        transformer) or "instance" (over the positions of each feature; x [N, ..., C] must have
        positions).
      where: the layers to swap: a glob over the paths, several globs, or a predicate.
      groups: the number of groups of a GroupNorm. None: the largest number up to 32 that divides
        the features into groups of 8 or more.
      standardize: with "group": the convolutions (Flax's Conv) whose kernels are standardized at
        every call, by `jaxbn.standardize`: as `where`, over the paths of the convolutions. Leave
        out those that no norm follows.
      axis_name: with "batch" or "flax": the mapped axes to pool statistics over, or None for those
        of each device. `...`, the default of this option and of those below, is what each layer
        says. Another axis drops the layer's axis_index_groups.
      virtual_batch_size: with "batch": normalize by statistics of groups of this many rows.
      unbiased: with "batch": the running var takes n / (n - 1) times the batch's.
      momentum: with "batch" or "flax": the fraction of the old statistics kept. With "batch" also
        None for the average of all batches from here on: the count of batches starts at 0.

    Returns:
      `Swapped(model, variables, report)`. Linen's model pickles if `net.apply` pickles.

    Raises:
      TypeError: linen's apply came without variables or an nnx model with some, the model is a
        linen module or variables, or an option is of another type.
      ValueError: there is no such layer, norm or convolution, groups do not divide the features, an
        option is not one of the new norm, or a layer has a call of its own, which would be lost.
        Features are not on the last axis (not with "batch" or "flax"). For linen, what only a call
        shows is raised when the model is called.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
    >>> net = nn.Sequential([nn.Conv(16, (1, 1)), nn.BatchNorm(use_running_average=False)])
    >>> variables = net.init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
    >>> apply, variables, report = jaxbn.swap(net.apply, variables, "batch", axis_name="data")
    >>> y, updates = jax.vmap(  # 8 devices with a row each, as one batch of 8 rows
    ...     lambda x: apply(variables, x, mutable=["batch_stats"]), axis_name="data"
    ... )(jax.random.normal(jax.random.key(0), (8, 1, 4, 4, 3)))
    >>> print(jnp.ptp(updates["batch_stats"]["layers_1"]["mean"], axis=0).max())
    0.0
    >>> apply, variables, report = jaxbn.swap(net.apply, variables, "group")
    >>> report["layers_1"].groups, apply(variables, jnp.ones((1, 4, 4, 3))).shape
    (2, (1, 4, 4, 16))
    """
    nnx_model = layers.is_nnx(model)
    if nnx_model and variables is not None:
        expected = "an nnx model alone, or linen's apply and its variables"
        write = "swap(model, to=...) or swap(net.apply, variables)"
        raise misuse("swap", (model, variables), expected, write)
    if not nnx_model and (not isinstance(variables, Mapping) or "params" not in variables):
        raise TypeError(
            f"swap: {type(model).__name__} without variables, expected an nnx model, or linen's "
            f'apply and its variables, "params" and "batch_stats"; write '
            f"swap(net.apply, variables)."
        )
    if not isinstance(to, str) or to not in (*BATCH_NORMS, *NORMS):
        raise ValueError(f"swap: to={to!r}, expected one of {[*BATCH_NORMS, *NORMS]}.")
    given = {
        "axis_name": axis_name,
        "momentum": momentum,
        "unbiased": unbiased,
        "virtual_batch_size": virtual_batch_size,
    }
    options = {name: v for name, v in given.items() if v is not ...}
    _check_options(to, options, groups, standardize)
    if not nnx_model:
        check_apply("swap", model, "swap(net.apply, variables)")
    chosen = select("swap", model if nnx_model else variables, where)
    if to in BATCH_NORMS:
        return as_batch_norms(model, variables, to, chosen, options)
    return as_sample_norms(model, variables, to, chosen, groups, standardize)


def _check_options(
    to: str, options: Mapping[str, Any], groups: int | None, standardize: Where | None
) -> None:
    """Refuses options that the new norm does not have, and values that no layer takes."""
    if standardize is not None:
        check_where("swap", "standardize", standardize)
    if standardize is not None and to != "group":
        raise ValueError(
            f'swap: standardize={standardize!r} with to={to!r}, expected to="group"; standardized '
            f"kernels make GroupNorm as good as batch norm on small batches; leave standardize out."
        )
    if groups is not None and not is_integer(groups):
        raise TypeError(
            f"swap: groups={groups!r}, expected how many groups a GroupNorm has, an integer, or "
            f"None to choose for each layer; write groups=32."
        )
    if groups is not None and to != "group":
        raise ValueError(
            f"swap: groups={groups} with to={to!r}, which has no groups; write "
            f'to="group", or leave groups out.'
        )
    for name, value in options.items():
        if to not in OPTIONS[name]:
            raise ValueError(
                f"swap: {name}={value!r} with to={to!r}, whose norm has no {name}; write "
                f'to="batch", or leave {name} out.'
            )
    axis_name = options.get("axis_name")
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if names is not None and not (isinstance(names, list | tuple) and names):
        raise TypeError(
            f"swap: axis_name={axis_name!r}, expected the name of a mapped axis, several in a "
            f'tuple, or None for statistics of each device; write axis_name="data".'
        )
    rows = options.get("virtual_batch_size")
    if rows is not None and not (is_integer(rows) and rows > 0):
        raise ValueError(
            f"swap: virtual_batch_size={rows!r}, expected how many rows a group has, an integer "
            f"of at least 1, or None for no groups; write virtual_batch_size=32."
        )
    if not isinstance(unbiased := options.get("unbiased", False), bool):
        raise TypeError(
            f"swap: unbiased={unbiased!r}, expected True or False; write unbiased=True for the "
            f"running variance of PyTorch."
        )
    if "momentum" in options:
        check_numbers("swap", options["momentum"], 0.0)
