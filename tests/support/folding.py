"""What tests of folding share."""

import math
import operator

import jax
import numpy as np

from jaxbn._folding.program import bodies


def equations(jaxpr, known=()):
    """(equation, whether each operand is a constant of more than one number), calls looked into."""
    constants = {*jaxpr.constvars, *known}
    for eqn in jaxpr.eqns:
        given = [hasattr(v, "val") or v in constants for v in eqn.invars]
        if all(given):
            constants |= set(eqn.outvars)
        inner = list(bodies(eqn))
        if not inner:
            large = (math.prod(v.aval.shape) > 1 for v in eqn.invars)
            yield eqn.primitive.name, list(map(operator.and_, given, large))
        for body, _ in inner:
            inside = zip(body.invars, given, strict=False)
            yield from equations(body, [v for v, known in inside if known])


def affines(fn, x):
    """How often each affine primitive meets a constant of each channel in the jaxpr of fn."""
    names = [
        name
        for name, given in equations(jax.make_jaxpr(fn)(x).jaxpr)
        if any(given) and not all(given) and name in ("add", "sub", "mul", "div", "rsqrt", "sqrt")
    ]
    return {name: names.count(name) for name in names}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES = normal(0, 2, 8, 8, 3)
