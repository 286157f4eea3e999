"""Bad input: refused before any work, by a message that names the call, what came, what was
expected and what to write instead. Compared whole.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.jet import jet
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn

X = jnp.ones((8, 5, 3))
PARAMS, STATE = jaxbn.init(3)
DOMAINS = jaxbn.init(3, domains=2)[1]
GROUPS = "must name each index of axis 'd' with size 8 once, in groups of one size; for pairs"
GROUPS = f"{GROUPS} write [[0, 1], [2, 3], [4, 5], [6, 7]]."
MOMENTUM = (
    "expected a number in [0, 1], the fraction of the old value that is kept (PyTorch's momentum "
    "m is 1 - m here), or None for the cumulative average; write momentum=0.99."
)
EPSILON = "expected a finite number of at least 0, added to the variance; write epsilon=1e-5."
FEATURES = "pass the feature axis as axis=."
AXIS = "expected integers from -3 to 2, axis=-1 for channels last."
MASK = "but x has shape (8, 5, 3); expected a shape that broadcasts to x."
BOTH = (
    "Both return the same types, so a traced flag can choose: jax.lax.cond(flag, train_step, "
    "eval_step, x)."
)
ONE_VALUE = (
    "and its variance is 0, so y would be bias whatever x is; expected at least 2 in training."
)
UNBOUND = (
    "Call it under shard_map, pmap or vmap with that axis name; under plain jit statistics are "
    "global already, write axis_name=None."
)


def call(x=X, params=PARAMS, state=STATE, **options):
    return jaxbn.batch_norm(x, params, state, **{"train": True, **options})


def of_domains(state=DOMAINS, **options):
    return call(state=state, **options)


def mapped(**options):
    """The call under vmap, with axis "d" of size 8."""
    return jax.vmap(lambda x: call(x, **options), axis_name="d")(X)


def over_d(f):
    """F under a shard_map over the axis "d" of the mesh that is set, and no other."""
    return lambda x: jax.shard_map(f, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})(x)


def on_mesh(f, kind=AxisType.Explicit):
    """f(X), the rows of X over the axis "d" of a mesh with another axis, "m"."""
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        return f(jax.device_put(X, P("d")))


def tensor(library):
    return type("Tensor", (), {"__module__": f"{library}.core"})()


WEIGHTED = {
    "batch_norm": lambda mask: call(mask=mask),
    "batch_norm in eval": lambda mask: call(mask=mask, train=False),
    "moments": lambda mask: jaxbn.moments(X, mask=mask),
}
WEIGHTS = {
    "batch_norm": lambda weights: call(weights=weights),
    "moments": lambda weights: jaxbn.moments(X, weights=weights),
}
CASES = {
    **{
        f"renorm of {name}": (
            lambda limits=limits: call(renorm=limits),
            error(
                f"batch_norm: renorm={limits!r}, expected (r_max, d_max), numbers of at least 1 "
                f"and 0, or traced ones; write renorm=(3.0, 5.0), or renorm=(1.0, 0.0) for plain "
                f"batch norm."
            ),
        )
        for name, limits, error in (
            ("r_max below 1", (0.5, 0.0), ValueError),
            ("NaN", (float("nan"), 0.0), ValueError),
            ("d_max below 0", (1.0, -1.0), ValueError),
            ("three", (1.0, 0.0, 0.0), ValueError),
            ("one number", 3.0, TypeError),
            ("words", ("3", 0.0), ValueError),
            ("r_max per channel", (np.ones(3), 0.0), ValueError),
        )
    },
    "renorm in eval mode too": (
        lambda: call(renorm=(0.0, 0.0), train=False),
        ValueError(
            "batch_norm: renorm=(0.0, 0.0), expected (r_max, d_max), numbers of at least 1 and 0, "
            "or traced ones; write renorm=(3.0, 5.0), or renorm=(1.0, 0.0) for plain batch norm."
        ),
    ),
    "renorm of complex x": (
        lambda: call(X.astype(jnp.complex64), renorm=(1.0, 0.0)),
        TypeError(
            "batch_norm: renorm=(1.0, 0.0) with x of dtype complex64, but d is clipped, and "
            "complex numbers have no order; leave renorm out."
        ),
    ),
    "renorm without a state": (
        lambda: call(state=None, renorm=(1.0, 0.0)),
        ValueError(
            "batch_norm: renorm=(1.0, 0.0) with state=None, but y is drawn to the running "
            "statistics; start from params, state = jaxbn.init(features)."
        ),
    ),
    "train is not given": (
        lambda: jaxbn.batch_norm(X, PARAMS, STATE),
        TypeError("batch_norm() missing 1 required keyword-only argument: 'train'"),
    ),
    "activation is a word": (
        lambda: call(activation="relu"),
        TypeError(
            "batch_norm: activation='relu', expected None or a function of y; write "
            "activation=jax.nn.relu."
        ),
    ),
    "an activation that is a class": (
        lambda: call(activation=nnx.PReLU),
        TypeError(
            "batch_norm: activation=PReLU, a class, expected None or a function of y; write "
            "activation=PReLU() where such a layer is a function."
        ),
    ),
    "an activation that returns nothing": (
        lambda: call(activation=print),
        TypeError(
            "batch_norm: activation=<built-in function print> returned None, expected an array; "
            "write activation=jax.nn.relu, or a function that returns one."
        ),
    ),
    **{
        f"{name} is {flag!r}": (
            lambda name=name, flag=flag: call(**{name: flag}),
            TypeError(
                f"batch_norm: {name}={flag!r}, expected True or False, known when tracing. {more}"
            ),
        )
        for name, flag, more in (
            ("train", None, BOTH),
            ("train", 1, BOTH),
            ("unbiased", "no", "Write unbiased=False."),
        )
    },
    "residual of another shape": (
        lambda: call(residual=jnp.ones((8, 1))),
        ValueError(
            "batch_norm: residual has shape (8, 1) but x has shape (8, 5, 3); expected the same. "
            "Project the shortcut as x is, or write residual=jnp.broadcast_to(residual, x.shape) "
            "for one that repeats."
        ),
    ),
    "complex residual": (
        lambda: call(residual=X.astype(jnp.complex64), train=False),
        TypeError(
            "batch_norm: residual has dtype complex64 but y has dtype float32; write "
            "dtype='complex64' for a complex y."
        ),
    ),
    "state is a dict": (
        lambda: call(state={"mean": STATE.mean, "var": STATE.var}),
        TypeError(
            "batch_norm: state is dict of ['mean', 'var'], expected jaxbn.State(mean, var, count) "
            'or None; write jaxbn.State(state["mean"], state["var"], state.get("count")).'
        ),
    ),
    "params are a dict": (
        lambda: call(params={"scale": PARAMS.scale}),
        TypeError(
            "batch_norm: params is dict of ['scale'], expected jaxbn.Params(scale, bias) or None; "
            'write jaxbn.Params(params.get("scale"), params.get("bias")).'
        ),
    ),
    "linen's variables": (
        lambda: call(params={"params": {}, "batch_stats": {}}),
        TypeError(
            "batch_norm: params is dict of ['batch_stats', 'params'], expected "
            "jaxbn.Params(scale, bias) or None; linen holds each layer's under its name, so write "
            'v = variables["params"]["BatchNorm_0"] and jaxbn.Params(v.get("scale"), '
            'v.get("bias")).'
        ),
    ),
    "linen's batch_stats": (
        lambda: call(state={f"BatchNorm_{i}": {} for i in range(5)}),
        TypeError(
            "batch_norm: state is dict of ['BatchNorm_0', 'BatchNorm_1', 'BatchNorm_2', "
            "'BatchNorm_3'], …, expected jaxbn.State(mean, var, count) or None; linen holds each "
            "layer's under its name, so write "
            'v = variables["batch_stats"]["BatchNorm_0"] and jaxbn.State(v["mean"], v["var"], '
            'v.get("count")).'
        ),
    ),
    "params and state swapped": (
        lambda: call(params=STATE, state=PARAMS),
        TypeError(
            "batch_norm: params is State, expected jaxbn.Params(scale, bias) or None; the order is "
            "batch_norm(x, params, state)."
        ),
    ),
    "params twice": (
        lambda: call(state=PARAMS),
        TypeError(
            "batch_norm: state is Params, expected jaxbn.State(mean, var, count) or None; the "
            "order is batch_norm(x, params, state)."
        ),
    ),
    "params of three": (
        lambda: call(params=(1, 2, 3)),
        TypeError(
            "batch_norm: params is tuple, expected jaxbn.Params(scale, bias) or None; write "
            "params, state = jaxbn.init(features)."
        ),
    ),
    "cumulative average without a count": (
        lambda: call(state=STATE._replace(count=None), momentum=None),
        ValueError(
            "batch_norm: state.count=None with momentum=None, but the cumulative average weighs "
            "by the updates so far; start from jaxbn.init(features), or write momentum=0.99."
        ),
    ),
    "integer x": (
        lambda: call(X.astype(int)),
        TypeError(
            "batch_norm: x has dtype int32, but statistics need a floating or complex dtype; "
            "write x.astype(jnp.float32)."
        ),
    ),
    "boolean x": (
        lambda: jaxbn.moments(X > 0),
        TypeError(
            "moments: x has dtype bool, but statistics need a floating or complex dtype; "
            "write x.astype(jnp.float32)."
        ),
    ),
    "integer dtype": (
        lambda: call(dtype="int32"),
        TypeError(
            "batch_norm: dtype=int32, but values of y are floating or complex; write "
            "dtype=jnp.float32, or leave dtype out for that of x."
        ),
    ),
    "integer statistics": (
        lambda: call(state=STATE._replace(var=jnp.ones(3, int)), train=False),
        TypeError(
            "batch_norm: state.var has dtype int32, in which no average can move; write "
            "state._replace(var=state.var.astype(jnp.float32))."
        ),
    ),
    "x of 8 bits": (
        lambda: jaxbn.moments(X.astype(jnp.float8_e4m3fn)),
        TypeError(
            "moments: x has dtype float8_e4m3fn, but JAX promotes no dtype of fewer than 16 bits; "
            "write x.astype(jnp.bfloat16)."
        ),
    ),
    "y of 8 bits": (
        lambda: call(dtype=jnp.float8_e5m2),
        TypeError(
            "batch_norm: dtype=float8_e5m2, but JAX promotes no dtype of fewer than 16 bits; write "
            "dtype=jnp.bfloat16, or leave dtype out for that of x, and cast what comes out."
        ),
    ),
    "parameters of integers": (
        lambda: jaxbn.init(3, int),
        TypeError(
            "init: dtype=int64, but parameters and statistics are floating or complex; write "
            "dtype=jnp.float32, or leave dtype out for float32."
        ),
    ),
    **{
        f"scalar x: {x}": (
            lambda x=x: call(x),
            ValueError(
                "batch_norm: x is a scalar, expected an array [..., features] of many values for "
                "each feature; write x of shape [batch, features] or [batch, height, width, "
                "features]."
            ),
        )
        for x in (1.5, 3, jnp.float32(1))
    },
    **{
        f"a tensor of {library}": (
            lambda what=what, library=library: call(**{what: tensor(library)}),
            TypeError(
                f"batch_norm: {what} is a tensor of {library}, expected an array of JAX or NumPy; "
                f"write jnp.asarray({what}.numpy())."
            ),
        )
        for what, library in (("x", "torch"), ("mask", "tensorflow"))
    },
    **{
        f"another library's {name}": (
            lambda name=name, given=given: call(**{name: given}),
            TypeError(
                f"batch_norm: {name}={given} is another library's keyword; write {expected}."
            ),
        )
        for name, given, expected in (
            ("eps", 0.001, "epsilon=0.001"),
            ("training", True, "train=True"),
            ("is_training", False, "train=False"),
            ("use_running_average", True, "train=not use_running_average"),
            ("decay", 0.9, "momentum=0.9"),
            ("decay_rate", 0.9, "momentum=0.9"),
            ("weight", 1, "params=jaxbn.Params(scale, bias)"),
        )
    },
    **{
        f"jet of {name}": (
            lambda f=f: jet(f, (X,), ((X, X),)),
            NotImplementedError(
                f"{name}: x is traced by jax.experimental.jet, which has no rule for lax.cond, "
                "jax.checkpoint and jax.custom_jvp; nest jax.jvp for higher orders, write "
                "jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))."
            ),
        )
        for name, f in (("moments", jaxbn.moments), ("batch_norm", call))
    },
    "axis out of range": (
        lambda: call(axis=3),
        ValueError(f"batch_norm: axis=3 does not name axes of x with shape (8, 5, 3); {AXIS}"),
    ),
    "no axis": (
        lambda: jaxbn.moments(X, axis=()),
        ValueError(f"moments: axis=() does not name axes of x with shape (8, 5, 3); {AXIS}"),
    ),
    "params of another layer": (
        lambda: call(params=jaxbn.init(4)[0]),
        ValueError(
            "batch_norm: params.scale has shape (4,), but x with shape (8, 5, 3) has features "
            "(3,) on axes (2,), as state has; pass this layer's params and not another's, or "
            "jaxbn.init(3)[0] for fresh ones."
        ),
    ),
    "both of another size": (
        lambda: call(X, *jaxbn.init(4)),
        ValueError(
            "batch_norm: params.scale has shape (4,), but x with shape (8, 5, 3) has features "
            f"(3,) on axes (2,); write jaxbn.init(3), or {FEATURES}"
        ),
    ),
    "channels first": (
        lambda: call(X, *jaxbn.init(5)),
        ValueError(
            "batch_norm: params.scale has shape (5,), but x with shape (8, 5, 3) has features "
            "(3,) on axes (2,); write axis=1 (channels first: x has 5 there), or jaxbn.init(3)."
        ),
    ),
    "channels last, given as first": (
        lambda: call(axis=1),
        ValueError(
            "batch_norm: params.scale has shape (3,), but x with shape (8, 5, 3) has features "
            "(5,) on axes (1,); write axis=2 (x has 3 there), or jaxbn.init(5)."
        ),
    ),
    "a bias that would broadcast": (
        lambda: call(params=PARAMS._replace(bias=jnp.ones(1))),
        ValueError(
            "batch_norm: params.bias has shape (1,), but x with shape (8, 5, 3) has features "
            f"(3,) on axes (2,); write jaxbn.init(3), or {FEATURES}"
        ),
    ),
    "state of another layer": (
        lambda: call(state=jaxbn.init(5)[1], train=False),
        ValueError(
            "batch_norm: state.mean has shape (5,), but x with shape (8, 5, 3) has features "
            "(3,) on axes (2,), as params have; pass this layer's state and not another's, or "
            "jaxbn.init(3)[1] for a fresh one."
        ),
    ),
    "state.var of another size": (
        lambda: call(state=STATE._replace(var=jnp.ones(5))),
        ValueError(
            "batch_norm: state.var has shape (5,), but x with shape (8, 5, 3) has features "
            f"(3,) on axes (2,); write jaxbn.init(3), or {FEATURES}"
        ),
    ),
    "params for one of two feature axes": (
        lambda: call(axis=(1, 2)),
        ValueError(
            "batch_norm: params.scale has shape (3,), but x with shape (8, 5, 3) has features "
            f"(5, 3) on axes (1, 2); write jaxbn.init((5, 3)), or {FEATURES}"
        ),
    ),
    "mask per sample": (
        lambda: call(mask=jnp.ones(8)),
        ValueError(
            f"batch_norm: mask has shape (8,) {MASK} "
            "A mask over the leading axes: mask[..., None, None]."
        ),
    ),
    "mask per step": (
        lambda: jaxbn.moments(X, mask=jnp.ones((8, 5))),
        ValueError(
            f"moments: mask has shape (8, 5) {MASK} A mask over the leading axes: mask[..., None]."
        ),
    ),
    "mask of another size": (
        lambda: call(mask=jnp.ones((8, 4, 1))),
        ValueError(
            f"batch_norm: mask has shape (8, 4, 1) {MASK} "
            "A mask broadcasts as in NumPy, from the last axis backwards."
        ),
    ),
    **{
        f"mask of {held} in {of}": (
            lambda held=held, of=of: WEIGHTED[of](jnp.full((8, 1, 1), held)),
            ValueError(
                f"{of.split()[0]}: mask holds {held}, expected True and False, or 1 and 0: a cell "
                "takes part in the statistics or it does not; write mask > 0, or weights=mask for "
                "a share."
            ),
        )
        for held, of in ((0.5, "batch_norm"), (-1, "moments"), (2, "batch_norm in eval"))
    },
    **{
        f"weights of {held} in {of}": (
            lambda held=held, of=of: WEIGHTS[of](jnp.full((8, 1, 1), held)),
            ValueError(
                f"{of}: weights hold {held}, expected finite numbers of at least 0, the share that "
                "a cell has in the statistics; write weights=jnp.clip(weights, 0, 1), or mask= for "
                "cells that take no part."
            ),
        )
        for held in (-0.5, float("nan"), float("inf"))
        for of in WEIGHTS
    },
    "complex weights": (
        lambda: call(weights=jnp.ones((8, 1, 1), jnp.complex64)),
        TypeError(
            "batch_norm: weights have dtype complex64, expected real numbers of at least 0; write "
            "weights=jnp.abs(weights)."
        ),
    ),
    "a domain of float": (
        lambda: of_domains(domain=1.0),
        TypeError(
            "batch_norm: domain has dtype float32, expected an integer, or integers, one for each "
            "row of x; write jnp.asarray(domain, jnp.int32)."
        ),
    ),
    "a domain of bool": (
        lambda: of_domains(domain=True),
        TypeError(
            "batch_norm: domain has dtype bool, expected an integer, or integers, one for each row "
            "of x; write jnp.asarray(domain, jnp.int32)."
        ),
    ),
    **{
        f"a domain of {k}, train={train}": (
            lambda k=k, train=train: of_domains(domain=k, train=train),
            ValueError(
                f"batch_norm: domain={k}, expected 0 to 1, one of 2 domains; write domain=1 for "
                f"the last{f', or domains={k + 1} where they are made' if k > 0 else ''}."
            ),
        )
        for k, train in ((2, True), (-1, False), (np.int32(5), True))
    },
    "a domain out of range in one row": (
        lambda: of_domains(domain=jnp.array([0, 1, 0, 1, 2, 0, 0, 0])),
        ValueError(
            "batch_norm: domain holds 2, expected 0 to 1, one of 2 domains; write domain=1 for the "
            "last, or domains=3 where they are made."
        ),
    ),
    "domains of other rows": (
        lambda: of_domains(domain=jnp.zeros(5, int)),
        ValueError(
            "batch_norm: domain has shape (5,) but x has shape (8, 5, 3); expected () or (8,), one "
            "for each row; write domain=0, or jnp.full(8, 0)."
        ),
    ),
    "a domain without a state": (
        lambda: call(state=None, domain=0),
        ValueError(
            "batch_norm: domain= with state=None, but domains are sets of running statistics; "
            "start from params, state = jaxbn.init(3, domains=2)."
        ),
    ),
    "a domain of one set": (
        lambda: call(domain=0),
        ValueError(
            "batch_norm: domain= with state.mean of shape (3,), which is one set of statistics; "
            "write jaxbn.init(3, domains=2) for two, or leave domain out."
        ),
    ),
    "no domain": (
        lambda: of_domains(),
        ValueError(
            "batch_norm: state.mean has shape (2, 3), but x with shape (8, 5, 3) has features (3,) "
            "on axes (2,); write domain=, which of the 2 sets of statistics x takes, or one for "
            "each row."
        ),
    ),
    "a count for each channel": (
        lambda: call(state=STATE._replace(count=jnp.zeros(3, int)), train=False),
        ValueError(
            "batch_norm: state.count has shape (3,), expected (), the updates; write "
            "state._replace(count=jnp.zeros((), jnp.int32)), or start from jaxbn.init(features)."
        ),
    ),
    "a complex var": (
        lambda: call(state=STATE._replace(var=jnp.ones(3, jnp.complex64)), train=False),
        TypeError(
            "batch_norm: state.var has dtype complex64, expected real numbers; write "
            "state._replace(var=state.var.real)."
        ),
    ),
    "a dtype that is none": (
        lambda: call(dtype="float33"),
        TypeError(
            "batch_norm: dtype='float33', expected a dtype of JAX or NumPy; write "
            "dtype=jnp.float32, or leave dtype out for that of x."
        ),
    ),
    "domains in words": (
        lambda: jaxbn.moments(X, domain=0, domains="2"),
        TypeError(
            "moments: domains='2', expected how many there are, an integer of at least 1, or None "
            "for one without an axis of its own; write domains=2."
        ),
    ),
    "one count for all domains": (
        lambda: of_domains(state=DOMAINS._replace(count=jnp.int32(7)), domain=0),
        ValueError(
            "batch_norm: state.count has shape (), expected (2,), the updates of each domain; "
            "write state._replace(count=jnp.zeros((2,), jnp.int32)), or start from "
            "jaxbn.init(features, domains=2)."
        ),
    ),
    "domains of rows and ghosts": (
        lambda: of_domains(domain=jnp.zeros(8, int), virtual_batch_size=4),
        ValueError(
            "batch_norm: virtual_batch_size=4 where each row of x has a domain, a scale or a bias "
            "of its own, expected one or the other; leave virtual_batch_size out."
        ),
    ),
    "labels without a table": (
        lambda: call(labels=0),
        ValueError(
            "batch_norm: labels= with scale and bias of shape [(3,), (3,)], expected a table "
            "('classes', 3), with a row for each label; write jaxbn.init(3, classes=10), or leave "
            "labels out."
        ),
    ),
    "labels beside a scale for each row": (
        # Of x's shape, where features come first: as long as a table that has x's rank.
        lambda: jaxbn.batch_norm(
            X[:, 0], jaxbn.Params(X[:, 0], None), None, train=True, axis=0, labels=jnp.zeros(3, int)
        ),
        ValueError(
            "batch_norm: labels= with scale and bias of shape [(8, 3)], expected a table "
            "('classes', 8), with a row for each label; write jaxbn.init(8, classes=10), or leave "
            "labels out."
        ),
    ),
    "no labels": (
        lambda: call(params=jaxbn.init(3, classes=4)[0]),
        ValueError(
            "batch_norm: params.scale has shape (4, 3), but x with shape (8, 5, 3) has features "
            "(3,) on axes (2,); write labels=, which of the 4 of them x takes, or one for each row."
        ),
    ),
    "labels out of range": (
        lambda: call(params=jaxbn.init(3, classes=4)[0], labels=jnp.full(8, -1)),
        ValueError(
            "batch_norm: labels hold -1, expected 0 to 3, one of 4 classes; write labels=3 for the "
            "last."
        ),
    ),
    "a scale of each row without the axes of x": (
        lambda: call(params=(jnp.ones((8, 3)), None)),
        ValueError(
            "batch_norm: params.scale has shape (8, 3), but x with shape (8, 5, 3) has features "
            "(3,) on axes (2,); write params.scale.reshape((8, 1, 3)) for one in each row of x."
        ),
    ),
    "moments of domains without their number": (
        lambda: jaxbn.moments(X, domain=0),
        ValueError(
            "moments: domain= alone, expected the domain of x, or of each row, and the number of "
            "domains; write domains=2 too."
        ),
    ),
    "no domains": (
        lambda: jaxbn.init(3, domains=0),
        ValueError(
            "init: domains=0, expected how many there are, an integer of at least 1, or None for "
            "one without an axis of its own; write domains=2."
        ),
    ),
    "domains that are no number": (
        lambda: jaxbn.init(3, classes="4"),
        TypeError(
            "init: classes='4', expected how many there are, an integer of at least 1, or None for "
            "one without an axis of its own; write classes=2."
        ),
    ),
    "weights per sample": (
        lambda: call(weights=jnp.ones(8)),
        ValueError(
            f"batch_norm: weights have shape (8,) {MASK} Weights over the leading axes: "
            "weights[..., None, None]."
        ),
    ),
    "weights of higher rank": (
        lambda: call(weights=jnp.ones((1, 8, 5, 3)), train=False),
        ValueError(
            f"batch_norm: weights have shape (1, 8, 5, 3) {MASK} Weights broadcast as in NumPy, "
            "from the last axis backwards."
        ),
    ),
    "mask of higher rank": (
        lambda: call(mask=jnp.ones((1, 8, 5, 3))),
        ValueError(
            f"batch_norm: mask has shape (1, 8, 5, 3) {MASK} "
            "A mask broadcasts as in NumPy, from the last axis backwards."
        ),
    ),
    "momentum below 0": (
        lambda: call(momentum=-0.1),
        ValueError(f"batch_norm: momentum=-0.1, {MOMENTUM}"),
    ),
    "momentum above 1": (
        lambda: call(momentum=1.5, train=False),
        ValueError(f"batch_norm: momentum=1.5, {MOMENTUM}"),
    ),
    "momentum NaN": (
        lambda: call(momentum=float("nan")),
        ValueError(f"batch_norm: momentum=nan, {MOMENTUM}"),
    ),
    "momentum of text": (
        lambda: call(momentum="0.9"),
        TypeError(f"batch_norm: momentum='0.9', {MOMENTUM}"),
    ),
    "momentum of each channel": (
        lambda: call(momentum=[0.9, 0.9, 0.9]),
        TypeError(f"batch_norm: momentum=[0.9, 0.9, 0.9], {MOMENTUM}"),
    ),
    "epsilon of None": (
        lambda: call(epsilon=None),
        TypeError(f"batch_norm: epsilon=None, {EPSILON}"),
    ),
    "epsilon below 0": (
        lambda: call(epsilon=-1e-5),
        ValueError(f"batch_norm: epsilon=-1e-05, {EPSILON}"),
    ),
    "epsilon infinite": (
        lambda: call(epsilon=float("inf"), train=False),
        ValueError(f"batch_norm: epsilon=inf, {EPSILON}"),
    ),
    "virtual_batch_size that does not divide": (
        lambda: call(virtual_batch_size=3),
        ValueError(
            "batch_norm: virtual_batch_size=3 does not divide the 8 rows on axis 0 of x with "
            "shape (8, 5, 3); write one of [1, 2, 4, 8]."
        ),
    ),
    "virtual_batch_size 0": (
        lambda: call(virtual_batch_size=0),
        ValueError(
            "batch_norm: virtual_batch_size=0 does not divide the 8 rows on axis 0 of x with "
            "shape (8, 5, 3); write one of [1, 2, 4, 8]."
        ),
    ),
    "virtual_batch_size of text": (
        lambda: call(virtual_batch_size="4"),
        TypeError(
            "batch_norm: virtual_batch_size='4', expected how many rows a group has, an integer "
            "that divides the 8 on axis 0 of x; write virtual_batch_size=8."
        ),
    ),
    "virtual_batch_size without a batch": (
        lambda: call(X[0, 0], virtual_batch_size=1),
        ValueError(
            "batch_norm: virtual_batch_size=1 but x with shape (3,) has no batch axis beside its "
            "feature axes (0,); leave virtual_batch_size out."
        ),
    ),
    "groups of one value": (
        lambda: call(X[:, 0], virtual_batch_size=1),
        ValueError(
            "batch_norm: x with shape (8, 3) has one value per channel in each group of "
            f"virtual_batch_size=1, {ONE_VALUE} Use a larger virtual_batch_size, or normalize by "
            "the running statistics with train=False."
        ),
    ),
    "one value per channel": (
        lambda: call(X[:1, 0]),
        ValueError(
            f"batch_norm: x with shape (1, 3) has one value per channel over all devices, "
            f"{ONE_VALUE} Use a larger batch, pool devices with axis_name=, or normalize by the "
            "running statistics with train=False."
        ),
    ),
    "one value per channel under vmap": (
        lambda: jax.vmap(lambda x: call(x[:1]), axis_name="d")(X),
        ValueError(
            f"batch_norm: x with shape (1, 3) has one value per channel over all devices, "
            f"{ONE_VALUE} Use a larger batch, pool devices with axis_name=, or normalize by the "
            "running statistics with train=False."
        ),
    ),
    "eval without state": (
        lambda: call(state=None, train=False),
        ValueError(
            "batch_norm: state=None with train=False, but eval normalizes by the running "
            "statistics; pass the State that training returned, or write train=True."
        ),
    ),
    "axis name that is not bound": (
        lambda: call(axis_name="batch"),
        ValueError(f"batch_norm: axis_name='batch' is not bound here; bound axes: []. {UNBOUND}"),
    ),
    "axis name beside the bound one": (
        lambda: mapped(axis_name="batch"),
        ValueError(
            f"batch_norm: axis_name='batch' is not bound here; bound axes: ['d']. {UNBOUND}"
        ),
    ),
    "one axis name of two": (
        lambda: jax.vmap(lambda x: jaxbn.moments(x, axis_name=("d", "e")), axis_name="d")(X),
        ValueError(
            f"moments: axis_name=('d', 'e') is not bound here; bound axes: ['d']. {UNBOUND}"
        ),
    ),
    "axis name where a pmap has none": (
        lambda: jax.pmap(lambda x: call(x, axis_name="d"))(X),
        ValueError(f"batch_norm: axis_name='d' is not bound here; bound axes: []. {UNBOUND}"),
    ),
    "axis name of a mesh under jit": (
        lambda: on_mesh(jax.jit(lambda x: call(x, axis_name="d"))),
        ValueError(f"batch_norm: axis_name='d' is not bound here; bound axes: []. {UNBOUND}"),
    ),
    "axis names of which a shard_map maps one": (
        lambda: on_mesh(over_d(lambda x: call(x, axis_name=("d", "m"))[0])),
        ValueError(
            "batch_norm: axis_name=('d', 'm') is not bound here; bound axes: ['d']. This shard_map "
            "does not map axis 'm' of the mesh, over which statistics are global already, write "
            "axis_name='d'."
        ),
    ),
    "axis name that a shard_map does not map": (
        lambda: on_mesh(over_d(lambda x: jaxbn.moments(x, axis_name="m").mean), AxisType.Auto),
        ValueError(
            "moments: axis_name='m' is not bound here; bound axes: ['d']. This shard_map does not "
            "map axis 'm' of the mesh, over which statistics are global already, write "
            "axis_name=None."
        ),
    ),
    "axis name under jit, of statistics to sync": (
        lambda: jaxbn.sync_state(STATE, "d"),
        ValueError(
            "sync_state: axis_name='d' is not bound here; bound axes: []. Call it under shard_map, "
            "pmap or vmap with that axis name; under plain jit statistics are global already, "
            "leave sync_state out."
        ),
    ),
    "axis name of a vmap in a shard_map": (
        lambda: on_mesh(over_d(jax.vmap(lambda x: call(x, axis_name=("d", "v")), axis_name="v"))),
        NotImplementedError(
            "batch_norm: axis_name=('d', 'v'), but JAX has no collectives over axis 'v' of a vmap "
            "where a shard_map checks types; write check_vma=False in the shard_map."
        ),
    ),
    "ghost batches on two devices each": (
        lambda: on_mesh(lambda x: call(x, virtual_batch_size=4)),
        ValueError(
            "batch_norm: virtual_batch_size=4, but the type of x has axis 0 of its shape (8, 5, 3) "
            "on 4 devices, 2 rows on each; expected groups of rows on one device; write one of "
            "[1, 2]."
        ),
    ),
    "groups that do not cover the axis": (
        lambda: mapped(axis_name="d", axis_index_groups=[[0, 1], [2, 3]]),
        ValueError(f"batch_norm: axis_index_groups=[[0, 1], [2, 3]] {GROUPS}"),
    ),
    "groups that overlap": (
        lambda: mapped(axis_name="d", axis_index_groups=[[0, 1, 2, 3, 4], [4, 5, 6, 7]]),
        ValueError(f"batch_norm: axis_index_groups=[[0, 1, 2, 3, 4], [4, 5, 6, 7]] {GROUPS}"),
    ),
    "groups of two sizes": (
        lambda: mapped(axis_name="d", axis_index_groups=[[0, 1, 2], [3, 4, 5, 6, 7]]),
        ValueError(f"batch_norm: axis_index_groups=[[0, 1, 2], [3, 4, 5, 6, 7]] {GROUPS}"),
    ),
    **{
        f"axis_index_groups={groups!r}": (
            lambda groups=groups: mapped(axis_name="d", axis_index_groups=groups),
            ValueError(f"batch_norm: axis_index_groups={groups!r} {GROUPS}"),
        )
        for groups in (4, [], [[]], ["d"], [[0.5 + i for i in range(8)]], [[*range(8)] * 2])
    },
    **{
        f"axis_name={name!r}": (
            lambda name=name: mapped(axis_name=name),
            error(
                f"batch_norm: axis_name={name!r}, expected the name of a mapped axis, or several, "
                "each once; write axis_name='batch'."
            ),
        )
        for name, error in ((0, TypeError), (("d", "d"), ValueError))
    },
    "groups without an axis name": (
        lambda: call(axis_index_groups=[[0, 1]]),
        ValueError(
            "batch_norm: axis_index_groups=[[0, 1]] without axis_name; groups are indices along "
            "a mapped axis, write axis_name= too, or virtual_batch_size= for groups of rows "
            "under jit."
        ),
    ),
    "groups over two axes": (
        lambda: mapped(axis_name=("d",), axis_index_groups=[list(range(8))]),
        ValueError(
            "batch_norm: axis_index_groups with axis_name=('d',): groups index one axis; write "
            "one name, or pool over one axis of a mesh that has more."
        ),
    ),
    **{
        f"axis_name of {names!r}": (
            lambda names=names: jaxbn.moments(X, axis_name=names),
            TypeError(
                f"moments: axis_name={names!r}, expected the name of a mapped axis, or several, "
                "each once; write axis_name='batch'."
            ),
        )
        for names in ([1, 2], b"d", PARAMS)
    },
    "a module as dtype": (
        lambda: call(dtype=jnp),
        TypeError(
            f"batch_norm: dtype={jnp!r}, expected a dtype of JAX or NumPy; write "
            "dtype=jnp.float32, or leave dtype out for that of x."
        ),
    ),
    **{
        f"features of {features!r}": (
            lambda features=features: jaxbn.init(features),
            error(
                f"init: features={features!r}, expected the size of the feature axis (or axes); "
                "write jaxbn.init(x.shape[-1])."
            ),
        )
        for features, error in (((3, -1), ValueError), ("16", TypeError), (2.5, TypeError))
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_message_says_all(case):
    f, expected = CASES[case]
    with pytest.raises(type(expected)) as error:
        f()
    assert str(error.value) == str(expected)


@pytest.mark.parametrize("case", ["params of another layer", "mask per sample", "integer x"])
def test_refused_under_jit_too(case):
    f, expected = CASES[case]
    with pytest.raises(type(expected)) as error:
        jax.jit(f)()
    assert str(error.value) == str(expected)


NUMBERS = "expected an array of numbers, of JAX or NumPy; write jnp.asarray(numbers)."
OPERANDS = {
    "x": lambda v: call(v),
    "residual": lambda v: call(residual=v),
    "mask": lambda v: call(mask=v),
    "weights": lambda v: call(weights=v),
    "domain": lambda v: of_domains(domain=v),
    "params.scale": lambda v: call(params=PARAMS._replace(scale=v)),
    "params.bias": lambda v: call(params=PARAMS._replace(bias=v)),
    "state.mean": lambda v: call(state=STATE._replace(mean=v), train=False),
    "state.var": lambda v: call(state=STATE._replace(var=v)),
    "state.count": lambda v: call(state=STATE._replace(count=v)),
}
NO_ARRAYS = {
    "is None": None,
    "is str": "relu",
    "is int": 10**12,  # more than JAX's integers hold
    "is dict": {"mean": X},
    "is list": [X[0], X[0, 0]],
    "is ShapeDtypeStruct": jax.ShapeDtypeStruct(X.shape, X.dtype),
    "has dtype object": np.array([None]),
    "has dtype key<fry>": jax.random.split(jax.random.key(0), 3),
}


@pytest.mark.parametrize("what", OPERANDS)
@pytest.mark.parametrize("was", NO_ARRAYS)
def test_what_is_no_array_of_numbers(was, what):
    if was == "is None" and what not in ("x", "state.mean", "state.var"):
        return  # these may be left out
    if (was, what) == ("is int", "domain"):
        return  # an integer is a domain, and this one is out of range
    with pytest.raises(TypeError) as error:
        OPERANDS[what](NO_ARRAYS[was])
    assert str(error.value) == f"batch_norm: {what} {was}, {NUMBERS}"


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("what", ["x", "scale", "bias", "mean", "residual"])
def test_complex_numbers_do_not_enter_a_real_y(what, train):
    """Or their imaginary parts would be lost; they enter a complex y."""
    v = (X if what in ("x", "residual") else X[0, 0]).astype(jnp.complex64)
    options = {
        "x": lambda: {"x": v, "dtype": "float32"},
        "residual": lambda: {"residual": v},
        "mean": lambda: {"state": STATE._replace(mean=v)},
    }.get(what, lambda: {"params": PARAMS._replace(**{what: v})})()
    name = {"scale": "params.scale", "bias": "params.bias", "mean": "state.mean"}.get(what, what)
    with pytest.raises(TypeError) as error:
        call(**options, train=train)
    assert str(error.value) == (
        f"batch_norm: {name} has dtype complex64 but y has dtype float32; write dtype='complex64' "
        "for a complex y."
    )
    with jax.numpy_dtype_promotion("standard"):
        call_ = functools.partial(call, **options | {"dtype": "complex64"}, train=train)
        assert jax.eval_shape(call_)[0].dtype == jnp.complex64


@pytest.mark.parametrize("value", [np.ones(3), np.complex64(0.5)])
@pytest.mark.parametrize("name", ["momentum", "epsilon", "renorm"])
def test_a_traced_number_is_one_real_number(name, value):
    """As a number that is not traced."""
    given = (lambda v: (v, 0.0)) if name == "renorm" else lambda v: v
    for run in (jax.jit, lambda f: f):
        with pytest.raises((TypeError, ValueError), match=f"^batch_norm: {name}=.*, expected "):
            run(lambda v: call(**{name: given(v)}))(value)


def test_a_traced_train_is_refused():
    with pytest.raises(TypeError, match=r"^batch_norm: train=.*, expected True or False, known"):
        jax.jit(lambda flag: call(train=flag))(True)


def test_numbers_of_numpy_are_numbers():
    """And a traced mask is taken at its word: its values are not there to be seen."""
    plain = call(axis=2, momentum=0.5, epsilon=0.25, virtual_batch_size=4)
    numbers = {"axis": np.int64(2), "momentum": np.float64(0.5), "epsilon": jnp.float32(0.25)}
    given = call(**numbers, train=np.True_, virtual_batch_size=np.int8(4))
    jax.tree.map(np.testing.assert_array_equal, given, plain)
    ones = jax.jit(lambda mask: call(mask=mask)[0])(jnp.full((8, 1, 1), 0.5))
    np.testing.assert_array_equal(ones, call(mask=np.ones((8, 1, 1), int))[0])


@pytest.mark.parametrize(
    "options",
    [
        {"x": X[:1, 0], "mask": jnp.ones((1, 3))},  # a mask is known only when it runs
        {"x": X[:1, 0], "train": False},
        {"x": X[:1]},
        {"x": X[:0]},
        {"x": jnp.ones(0), "params": None, "state": jaxbn.init(0)[1]},
    ],
)
def test_one_row_is_no_error_where_it_may_be_right(options):
    jax.eval_shape(functools.partial(call, **options))


def test_one_row_on_each_device_is_a_batch():
    run = jax.vmap(lambda x: call(x, axis_name="d")[0], axis_name="d")
    assert jax.eval_shape(run, X[:, 0]).shape == (8, 3)
