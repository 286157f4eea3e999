"""`BatchNorm` for Flax nnx: variables to `Params` and `State`, and back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jaxbn.axes import array
from jaxbn.functional import batch_norm
from jaxbn.state import Params, State


class BatchNorm(nnx.BatchNorm):
    """Equals `flax.nnx.BatchNorm`, computed by `jaxbn.batch_norm`.

    Same arguments, defaults, variables (`BatchStat`, `Param`), random keys and output dtype: a
    model or a checkpoint moves over by changing the import, and back.
    `docs/differences-from-flax.md` lists where the numbers differ, which is where Flax's are
    wrong. `use_fast_variance` is accepted and has nothing to choose: the one pass here is also
    the accurate one.

    Args (new here; all others as Flax's):
      momentum: may be None for the cumulative average; then a `BatchStat` count is stored.
      virtual_batch_size: normalize by statistics of groups of this many rows.
      unbiased: the running var takes n / (n - 1) times the batch's, as PyTorch's does.
      activation: applied to y last; `flax.nnx.relu` in its own way, see `jaxbn.batch_norm`.

    Raises:
      TypeError, ValueError: as `jaxbn.batch_norm`.

    >>> import jax.numpy as jnp, jaxbn
    >>> from flax import nnx
    >>> layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.eye(2, 3))
    >>> print(layer.mean[...])
    [0.005 0.005 0.   ]
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.99,
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        **kwargs: Any,
    ):
        super().__init__(num_features, momentum=momentum, **kwargs)  # type: ignore[arg-type]
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased
        self.activation = activation
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Equals `batch_norm(x, …, train=not use_running_average)`; mean and var are updated.

        Args:
          x: any rank, features on `axis`.
          use_running_average: normalize by the running statistics, which stay; here, in the
            constructor, or by `model.eval()`.
          mask: broadcastable to x; False cells take no part in the statistics.
          residual: of x's shape, added to y before the activation.
        """
        use_running_average = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="BatchNorm: use_running_average was given neither in the call nor in the "
            "constructor; expected True or False: model.train(), model.eval(), or "
            "bn(x, use_running_average=False).",
        )
        x = array("BatchNorm", "x", x)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        mean, var = self.mean[...], self.var[...]
        # What Flax computes in decides y's dtype; we compute in float32 or wider from x as it
        # is, unless the user brought a promotion of their own.
        with jax.numpy_dtype_promotion("standard"):
            promoted = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
            dtype = dtypes.canonicalize_dtype(promoted[0], *promoted[3:], dtype=self.dtype)
        if self.promote_dtype is not dtypes.promote_dtype:
            x, _, _, scale, bias = promoted
        cumulative = self.momentum is None
        y, state = batch_norm(
            x,
            Params(scale, bias),
            State(mean, var, self.count[...] if cumulative else None),
            train=not use_running_average,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            unbiased=self.unbiased,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            mask=mask,
            dtype=dtype,
            activation=self.activation,
            residual=residual,
        )
        if not use_running_average:
            # Anew: `mean[...] = ` would cast to the dtype that mean had.
            self.mean.set_value(state.mean)
            self.var.set_value(state.var)
            if state.count is not None:
                self.count.set_value(state.count)
        return y
