"""`BatchNorm` for Flax nnx: variables to `Params` and `State`, and back."""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from jaxbn import _elsewhere
from jaxbn._inspection.hooks import PATH
from jaxbn._op.arguments.choices import check_choices, check_tables
from jaxbn._op.arguments.values import array, check_update_stats
from jaxbn._op.axes import resolve
from jaxbn._op.one_value import train_anyway
from jaxbn._op.state import Params, State


class BatchNorm(nnx.BatchNorm):
    """Equals `flax.nnx.BatchNorm`, computed by `jaxbn.batch_norm`.

    Arguments, defaults, variables (`BatchStat`, `Param`), random keys and output dtype are Flax's,
    so a model or a checkpoint moves over by changing the import, and back.
    `docs/differences-from-flax.md` lists where the numbers differ: there Flax's are wrong.
    `use_fast_variance` is accepted and changes nothing, since the one pass here is also accurate.

    Args:
      num_features: size of the feature axis.
      use_running_average: normalize by the running statistics and leave them; `model.train()` and
        `model.eval()` set it.
      axis: feature axis.
      momentum: fraction of the old statistics kept. New here: None for the cumulative average;
        then a `BatchStat` count is stored.
      epsilon: added to var.
      dtype: of y; by default what x, scale and bias promote to.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of bias.
      scale_init: initializer of scale.
      axis_name: mapped axis to pool statistics over.
      axis_index_groups: pool within these subgroups of the axis.
      use_fast_variance: accepted, changes nothing.
      promote_dtype: where it is not Flax's own, it is applied to x, scale and bias.
      rngs: random keys, "params" among them.
      bias_metadata: of the `Param` of bias, such as its sharding.
      scale_metadata: of the `Param` of scale.
      virtual_batch_size: new here: normalize by statistics of groups of this many rows.
      unbiased: new here: the running var takes n / (n - 1) times the batch's, as PyTorch's does.
      activation: new here: applied to y last. `flax.nnx.relu` costs least, see
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
        channel, y is bias, as Flax's y is, and `jaxbn.OneValueWarning` is given.

    >>> import jax.numpy as jnp, jaxbn
    >>> from flax import nnx
    >>> layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.eye(2, 3))
    >>> print(layer.mean[...])
    [0.005 0.005 0.   ]
    """

    @_elsewhere.names_keywords("BatchNorm", _elsewhere.ARGUMENTS)
    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
        scale_init: Initializer = initializers.ones_init(),  # noqa: B008
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        renorm: tuple[float, float] | None = None,
        domains: int | None = None,
        affine_per_domain: bool = False,
        classes: int | None = None,
    ):
        tables = check_tables("BatchNorm", domains, affine_per_domain, classes)
        if tables.affine:
            scale_init, bias_init = (_table_of(f, tables.affine) for f in (scale_init, bias_init))
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,  # type: ignore[arg-type]
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased
        self.activation = activation
        self.renorm = renorm
        self.domains = domains
        self.affine_per_domain = affine_per_domain
        self.classes = classes
        if tables.statistics:
            for stat in (self.mean, self.var):
                stat.set_value(jnp.stack([stat[...]] * tables.statistics[0]))
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros(tables.statistics, jnp.int32))

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
        """Equals `batch_norm(x, …, train=not use_running_average)`; mean and var are updated.

        Args:
          x: any rank, features on `axis`.
          use_running_average: normalize by the running statistics and leave them; set here, in
            the constructor, or by `model.eval()`.
          mask: broadcastable to x; False cells take no part in the statistics.
          residual: of x's shape; added to y before the activation.
          update_stats: False leaves mean and var as they are in training too; y is the same. For
            a second pass over a batch, an adversarial step, a probe. A Python bool.
          renorm: in place of the constructor's, for a schedule; may hold traced numbers.
          weights: broadcastable to x, at least 0: the share of each cell in the statistics.
          domain: with `domains`: the set of statistics that x belongs to: an integer, or one for
            each row of x; either may be traced. See `jaxbn.batch_norm`.
          labels: with `classes`: the scale and bias that x takes: an integer, or one for each row.
        """
        use_running_average = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="BatchNorm: use_running_average was given neither in the call nor in the "
            "constructor; expected True or False: model.train(), model.eval(), or "
            "bn(x, use_running_average=False).",
        )
        check_update_stats("BatchNorm", update_stats)
        check_choices("BatchNorm", self.domains, self.classes, domain, labels)
        x = array("BatchNorm", "x", x)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        mean, var = self.mean[...], self.var[...]
        axes = resolve("BatchNorm", x, self.axis).features
        features = tuple(x.shape[a] for a in axes)
        if features != mean.shape[0 if self.domains is None else 1 :]:
            raise ValueError(
                f"BatchNorm: num_features={self.num_features}, but x with shape {x.shape} has "
                f"features {features} on axes {axes}; write num_features={x.shape[axes[0]]}, or "
                f"pass the feature axis as axis=."
            )
        # Flax's promotion decides the dtype of y. The op computes in float32 or wider from x as
        # it is, unless the user passed a promotion of their own.
        with jax.numpy_dtype_promotion("standard"):
            promoted = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
            dtype = dtypes.canonicalize_dtype(promoted[0], *promoted[3:], dtype=self.dtype)
        if self.promote_dtype is not dtypes.promote_dtype:
            x, _, _, scale, bias = promoted
        cumulative = self.momentum is None
        y, state = train_anyway(
            getattr(self, PATH, ""),
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
            renorm=self.renorm if renorm is None else renorm,
            weights=weights,
            domain=domain,
            labels=domain if self.affine_per_domain else labels,
        )
        if update_stats and not use_running_average:
            # By set_value, since `mean[...] = ` would cast to the dtype that mean had.
            self.mean.set_value(state.mean)
            self.var.set_value(state.var)
            if state.count is not None:
                self.count.set_value(state.count)
        return y


def _table_of(init: Initializer, before: tuple[int, ...]) -> Initializer:
    """The initializer of a table of what `init` makes, by the same random key."""
    return lambda key, shape, *more: init(key, (*before, *shape), *more)


def __getattr__(name: str) -> Any:
    raise _elsewhere.missing(name, sys.modules[__name__], sys._getframe(1))
