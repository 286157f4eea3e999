"""`BatchNorm` for Flax nnx: variables to `Params` and `State`, and back."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jaxbn import elsewhere
from jaxbn.axes import resolve
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

    Raises:
      TypeError, ValueError: as `jaxbn.batch_norm`.

    >>> import jax.numpy as jnp, jaxbn
    >>> from flax import nnx
    >>> layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.eye(2, 3))
    >>> print(layer.mean[...])
    [0.005 0.005 0.   ]
    """

    @elsewhere.takes_flax_arguments
    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.99,
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
        **kwargs: Any,
    ):
        super().__init__(num_features, momentum=momentum, **kwargs)  # type: ignore[arg-type]
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Equals `batch_norm(x, …, train=not use_running_average)`; mean and var are updated.

        Args:
          x: any rank, features on `axis`.
          use_running_average: normalize by the running statistics, which stay; here, in the
            constructor, or by `model.eval()`.
          mask: broadcastable to x; False cells take no part in the statistics.
        """
        use_running_average = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="BatchNorm: use_running_average was given neither in the call nor in the "
            "constructor; expected True or False: model.train(), model.eval(), or "
            "bn(x, use_running_average=False).",
        )
        x = jnp.asarray(x)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        mean, var = self.mean[...], self.var[...]
        axes = resolve("BatchNorm", x, self.axis).features
        features = tuple(x.shape[a] for a in axes)
        if features != mean.shape:
            raise ValueError(
                f"BatchNorm: num_features={self.num_features}, but x with shape {x.shape} has "
                f"features {features} on axes {axes}; write num_features={x.shape[axes[0]]}, or "
                f"pass the feature axis as axis=."
            )
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
        )
        if not use_running_average:
            self.mean[...], self.var[...] = state.mean, state.var
            if cumulative:
                self.count[...] = state.count
        return y
