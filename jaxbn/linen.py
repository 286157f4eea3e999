"""`BatchNorm` for Flax linen: variables to `Params` and `State`, and back."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from jaxbn.axes import array, resolve, wide
from jaxbn.functional import batch_norm
from jaxbn.state import Params, State


class BatchNorm(nn.BatchNorm):
    """Equals `flax.linen.BatchNorm`, computed by `jaxbn.batch_norm`.

    Same arguments, defaults, collections, leaves, random keys and output dtype: a model or a
    checkpoint moves over by changing the import, and back. `docs/differences-from-flax.md`
    lists where the numbers differ, which is where Flax's are wrong. `use_fast_variance` is
    accepted and has nothing to choose: the one pass here is also the accurate one.
    `force_float32_reductions=False` only gives the statistics `param_dtype` as their dtype, where
    that is float64: they are float32 or wider.

    Attributes (new here):
      momentum: may be None for the cumulative average; then `batch_stats/count` is stored.
      virtual_batch_size: normalize by statistics of groups of this many rows.
      unbiased: the running var takes n / (n - 1) times the batch's, as PyTorch's does.
      activation: applied to y last; `flax.linen.relu` in its own way, see `jaxbn.batch_norm`.

    Raises:
      TypeError, ValueError: as `jaxbn.batch_norm`; not for one value per channel in `init`.

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

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Equals `batch_norm(x, …, train=not use_running_average)`; batch_stats is updated.

        Args:
          x: any rank, features on `axis`.
          use_running_average: normalize by batch_stats, which stay; here or in the constructor.
          mask: broadcastable to x; False cells take no part in the statistics.
          residual: of x's shape, added to y before the activation.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = array("BatchNorm", "x", x)
        features = tuple(x.shape[a] for a in resolve("BatchNorm", x, self.axis).features)
        stats_dtype = jnp.float32 if self.force_float32_reductions else wide(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, features, stats_dtype)
        count = None
        if self.momentum is None:
            counter = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
            count = counter.value
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, features, self.param_dtype)

        initializing = self.is_initializing()
        options: dict[str, Any] = {}
        if not initializing:
            options |= {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
            options |= {"virtual_batch_size": self.virtual_batch_size}
        elif mask is None:
            # `init` may see one row, which training must refuse and a masked batch may hold.
            mask = jnp.ones((1,) * x.ndim, bool)
        with jax.numpy_dtype_promotion("standard"):
            dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        y, state = batch_norm(
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
            **options,
        )
        if not use_running_average and not initializing:
            mean.value, var.value = state.mean, state.var
            if state.count is not None:
                counter.value = state.count
        return y
