"""`BatchNorm` for Flax linen: variables to `Params` and `State`, and back."""

import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors
from flax.linen import dtypes

from jaxbn import _elsewhere
from jaxbn._op.arguments.choices import check_choices, check_tables
from jaxbn._op.arguments.values import array, check_update_stats
from jaxbn._op.axes import resolve, wide
from jaxbn._op.one_value import train_anyway
from jaxbn._op.state import Params, State


class BatchNorm(nn.BatchNorm):
    """Equals `flax.linen.BatchNorm`, computed by `jaxbn.batch_norm`.

    Arguments, defaults, collections, leaves, random keys and output dtype are Flax's, so a model or
    a checkpoint moves over by changing the import, and back. `docs/differences-from-flax.md` lists
    where the numbers differ: there Flax's are wrong. `use_fast_variance` is accepted and changes
    nothing, since the one pass here is also accurate. `force_float32_reductions=False` gives the
    statistics `param_dtype` as their dtype, but never one narrower than float32.

    Attributes:
      use_running_average: normalize by batch_stats and leave them; set here or in the call.
      axis: feature axis.
      momentum: fraction of the old statistics kept. New here: None for the cumulative average;
        then `batch_stats/count` is stored.
      epsilon: added to var.
      dtype: of y; by default what x, scale and bias promote to.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of bias.
      scale_init: initializer of scale.
      axis_name: mapped axis to pool statistics over; `init` may run without that axis.
      axis_index_groups: pool within these subgroups of the axis.
      use_fast_variance: accepted, changes nothing.
      force_float32_reductions: decides the dtype of the statistics, see above.
      virtual_batch_size: new here: normalize by statistics of groups of this many rows.
      unbiased: new here: the running var takes n / (n - 1) times the batch's, as PyTorch's does.
      activation: new here: applied to y last. `flax.linen.relu` costs least, see
        `jaxbn.batch_norm`.
      renorm: new here: `(r_max, d_max)`, batch renormalization: y in training is nearly that of
        eval, for batches of 4 to 16; see `jaxbn.batch_norm`.
      domains: new here: the number of sets of statistics, which `domain` in the call chooses from;
        mean and var are [domains, C].
      affine_per_domain: new here: whether each domain has a scale and a bias of its own too,
        [domains, C].
      classes: new here: the number of scales and biases, [classes, C], which `labels` in the call
        chooses from (conditional batch norm).

    Raises:
      TypeError, ValueError: as `jaxbn.batch_norm`, with one exception. In training on one value per
        channel, y is bias, as Flax's y is, and `jaxbn.OneValueWarning` is given, except in `init`.

    >>> import jax, jax.numpy as jnp, jaxbn
    >>> layer = jaxbn.linen.BatchNorm(use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> y, updates = layer.apply(variables, jnp.eye(2, 3), mutable=["batch_stats"])
    >>> print(updates["batch_stats"]["mean"])
    [0.005 0.005 0.   ]
    """

    momentum: float | None = 0.99  # type: ignore[assignment]
    virtual_batch_size: int | None = None
    unbiased: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    renorm: tuple[float, float] | None = None
    domains: int | None = None
    affine_per_domain: bool = False
    classes: int | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_stats: bool = True,
        renorm: tuple[float | jax.Array, float | jax.Array] | None = None,
        weights: jax.Array | None = None,
        domain: int | jax.Array | None = None,
        labels: int | jax.Array | None = None,
    ) -> jax.Array:
        """Equals `batch_norm(x, …, train=not use_running_average)`; batch_stats is updated.

        Args:
          x: any rank, features on `axis`.
          use_running_average: normalize by batch_stats and leave them; here or in the constructor.
          mask: broadcastable to x; False cells take no part in the statistics.
          residual: of x's shape; added to y before the activation.
          update_stats: False leaves batch_stats as they are in training too, so they need not be
            mutable; y is the same. For a second pass over a batch, an adversarial step, a probe.
            A Python bool.
          renorm: in place of the constructor's, for a schedule; may hold traced numbers.
          weights: broadcastable to x, at least 0: the share of each cell in the statistics.
          domain: with `domains`: the set of statistics that x belongs to: an integer, or one for
            each row of x; either may be traced. See `jaxbn.batch_norm`.
          labels: with `classes`: the scale and bias that x takes: an integer, or one for each row.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        check_update_stats("BatchNorm", update_stats)
        x = array("BatchNorm", "x", x)
        axes = resolve("BatchNorm", x, self.axis).features
        features = tuple(x.shape[a] for a in axes)
        stats_dtype = jnp.float32 if self.force_float32_reductions else wide(self.param_dtype)
        tables = check_tables("BatchNorm", self.domains, self.affine_per_domain, self.classes)
        check_choices("BatchNorm", self.domains, self.classes, domain, labels)
        of_stats, of_params = (*tables.statistics, *features), (*tables.affine, *features)
        mean = self.variable("batch_stats", "mean", jnp.zeros, of_stats, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, of_stats, stats_dtype)
        count = None
        if self.momentum is None:
            counter = self.variable("batch_stats", "count", jnp.zeros, tables.statistics, jnp.int32)
            count = counter.value
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, of_params, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, of_params, self.param_dtype)

        for name, held in (("mean", mean.value), ("var", var.value)):
            if jnp.shape(held) == of_stats[1:] == features:
                raise ValueError(
                    f"BatchNorm: batch_stats/{name} has shape {features}, one set of statistics, "
                    f"but domains={self.domains}; write "
                    f"jax.tree.map(lambda v: jnp.stack([v] * {self.domains}), batch_stats) for "
                    f"domains that start alike."
                )
            if jnp.shape(held) != of_stats:
                raise ValueError(
                    f"BatchNorm: batch_stats/{name} has shape {jnp.shape(held)}, but x with shape "
                    f"{x.shape} has features {features} on axes {axes}; write model.init(key, x) "
                    f"for variables of this x, or pass the feature axis as axis=."
                )
        initializing = self.is_initializing()
        updates = update_stats and not (use_running_average or initializing)
        if updates and not self.is_mutable_collection("batch_stats"):
            raise _immutable("/" + "/".join(self.path))
        options: dict[str, Any] = {}
        if not initializing:
            options |= {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
            options |= {"virtual_batch_size": self.virtual_batch_size}
        elif mask is None:
            # `init` may see one row. Training refuses one row, but not with a mask.
            mask = jnp.ones((1,) * x.ndim, bool)
        with jax.numpy_dtype_promotion("standard"):
            dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        y, state = train_anyway(
            "/".join(self.path),
            x,
            Params(scale, bias),
            State(mean.value, var.value, count),
            train=not use_running_average,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            unbiased=self.unbiased,
            mask=mask,
            dtype=dtype,
            activation=self.activation,
            residual=residual,
            renorm=self.renorm if renorm is None else renorm,
            weights=weights,
            domain=domain,
            labels=domain if self.affine_per_domain else labels,
            **options,
        )
        if updates:
            mean.value, var.value = state.mean, state.var
            if state.count is not None:
                counter.value = state.count
        return y


# Set after the class: the dataclass decorator makes `__init__` from the fields.
_named = _elsewhere.names_keywords("BatchNorm", _elsewhere.ARGUMENTS)
BatchNorm.__init__ = _named(BatchNorm.__init__)  # type: ignore[method-assign]


def _immutable(path: str) -> errors.ModifyScopeVariableError:
    """Flax's error, in words that say what to write."""
    error = errors.ModifyScopeVariableError("batch_stats", "mean", path)
    error.args = (
        f'BatchNorm: layer "{path}" normalizes by the batch and updates batch_stats, which is '
        f'immutable here; expected mutable=["batch_stats"]; write y, updates = model.apply('
        f'variables, x, mutable=["batch_stats"]) and keep updates["batch_stats"], or '
        f"use_running_average=True for eval, or update_stats=False to normalize by the batch and "
        f"learn nothing.",
    )
    return error


def __getattr__(name: str) -> Any:
    raise _elsewhere.missing(name, sys.modules[__name__], sys._getframe(1))
