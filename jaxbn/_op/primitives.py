"""A function over the axes of x as one operation of JAX's.

Each platform lowers the operation in the form that the platform is fast at (see `sums`). To JAX
the operation is opaque: automatic differentiation, `vmap` and `jax.checkpoint` see one operation.
So they trace no branches for other platforms, and equal layers share one function in the compiled
program.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jaxbn._op.axes import Axes
from jaxbn._op.devices import alike, repeated

# As `jax.extend.core.Primitive`, which takes 20 ms to import: `jax.extend` brings Pallas.
Primitive: Any = type(jax.lax.neg_p)

# The `device` that an operation's function sees, by the platform that JAX lowers for.
DEVICES = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


class Operation:
    """A function `f(device, *operands, axes, **static)`, to several arrays, as one operation.

    An operand has x's rank, or the shape of x's features, or is one number, or None. The results
    are linear in the first `linear` operands together. `device` is a value of `DEVICES`, or "" in
    every trace that no platform's lowering makes, such as a derivative by the other operands.
    `transposed` and `differentiated` register the operation's transpose and derivative.
    """

    def __init__(self, name: str, f: Callable[..., Any], linear: int = 0) -> None:
        self.f, self.linear = f, linear
        self.primitive = p = Primitive(f"batch_norm_{name}")
        p.multiple_results = True
        p.def_impl(jax.jit(self._run, static_argnames=("platform", "given", "axes", "static")))
        p.def_abstract_eval(self._results)
        ad.primitive_jvps[p] = self._jvp
        ad.primitive_transposes[p] = self._transpose
        batching.primitive_batchers[p] = self._batch
        for platform in ("", *DEVICES):
            rule = mlir.lower_fun(functools.partial(self._run, platform=platform))
            mlir.register_lowering(p, rule, platform=platform or None, inline=False)

    def __call__(self, *operands: Any, axes: Axes, **static: Any) -> tuple[jax.Array, ...]:
        """The results of f for these operands."""
        given = tuple(v is not None for v in operands)
        there = alike(*(v for v in operands if v is not None))
        static_ = tuple(sorted(static.items()))
        return tuple(self.primitive.bind(*there, given=given, axes=axes, static=static_))

    def _run(self, *there: Any, given: Any, axes: Axes, static: Any, platform: str = "") -> Any:
        return self.f(DEVICES.get(platform, ""), *_all(there, given), axes=axes, **dict(static))

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (operations are made once and stay)
    def _results(self, *avals: Any, **params: Any) -> Any:
        return jax.make_jaxpr(functools.partial(self._run, **params))(*avals).out_avals

    def differentiated(self, rule: Callable[..., Any]) -> None:
        """Registers `rule(tangent of the first operand, operands, results, axes, **static)`.

        Results are then constant in the other operands, as far as derivatives go.
        """
        self.rule = rule

    def transposed(self, transpose: Callable[..., Any]) -> None:
        """Registers `transpose(cotangents, *others, axes, **static)`.

        It returns the cotangents of the linear operands.
        """
        self.transpose = transpose

    def _jvp(self, primals: Any, tangents: Any, **params: Any) -> Any:
        results = self.primitive.bind(*primals, **params)
        moves = [type(t) is not ad.Zero for t in tangents]
        if not any(moves if self.linear else moves[:1]):
            return results, [ad.Zero(jax.typeof(v).to_tangent_aval()) for v in results]
        if not self.linear:
            operands = _all(primals, params["given"])
            static = dict(params["static"])
            return results, self.rule(tangents[0], operands, results, axes=params["axes"], **static)
        first = sum(params["given"][: self.linear])
        total = None
        if any(moves[:first]):
            along = [ad.instantiate_zeros(t) for t in tangents[:first]]
            total = self.primitive.bind(*along, *primals[first:], **params)
        if varied := [i for i in range(first, len(primals)) if moves[i]]:

            def by_others(*values: Any) -> Any:
                at = list(primals)
                for i, v in zip(varied, values, strict=True):
                    at[i] = v
                return self._run(*at, **params)

            _, along = jax.jvp(
                by_others, [primals[i] for i in varied], [tangents[i] for i in varied]
            )
            total = along if total is None else [a + b for a, b in zip(total, along, strict=True)]
        return results, total

    def _transpose(self, cotangents: Any, *there: Any, given: Any, axes: Axes, static: Any) -> Any:
        cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
        others = _all(there, given)[self.linear :]
        cts = iter(self.transpose(*cotangents, *others, axes=axes, **dict(static)))
        found = [next(cts) if i < self.linear else None for i in range(len(given))]
        return [
            ct if ad.is_undefined_primal(v) else None
            for ct, v in zip(
                [c for c, g in zip(found, given, strict=True) if g], there, strict=True
            )
        ]

    def _batch(self, there: Sequence[Any], dims: Sequence[Any], **params: Any) -> Any:
        """Makes the mapped axis the first axis of features."""
        axes, given = params.pop("axes"), params["given"]
        first = sum(given[: max(self.linear, 1)])
        mapped = next(
            jnp.moveaxis(v, i, 0) for v, i in zip(there, dims, strict=True) if i is not None
        )

        def widened(at: int, v: jax.Array, i: int | None) -> jax.Array:
            if i is None and at < first:
                return repeated(v, mapped)
            if i is None:
                # An operand that only broadcasts stays small, since backward may keep it.
                return v[None] if v.ndim else v
            v = jnp.moveaxis(v, i, 0) if i else v
            return v if v.ndim > 1 else v.reshape(len(v), *(1,) * len(axes.features))

        there = list(map(widened, range(len(there)), there, dims))
        features, reduced = (tuple(a + 1 for a in part) for part in axes)
        axes = Axes((0, *features), reduced)
        results = self.primitive.bind(*there, axes=axes, **params)
        return results, [0] * len(results)


def _all(there: Sequence[Any], given: Sequence[bool]) -> list[Any]:
    """The operands, with None for those that were not given."""
    values = iter(there)
    return [next(values) if here else None for here in given]
