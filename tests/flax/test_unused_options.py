"""An option that is not used costs nothing: the programs say so, before any compiler sees them."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import jaxbn
from benchmarks.subjects.callers import CALLERS
from tests.support import hlo

SHAPE, C = (8, 5, 3), 3
X = jax.ShapeDtypeStruct(SHAPE, "float32")
PARAMS, STATE = jax.eval_shape(lambda: jaxbn.init(C))
MODES = ("train", "gradient", "eval")

# Every option, as it is where it is not used, and in use.
UNUSED = {
    "mask": None,
    "weights": None,
    "renorm": None,
    "activation": None,
    "residual": None,
    "virtual_batch_size": None,
    "domain": None,
    "labels": None,
    "axis_name": None,
    "axis_index_groups": None,
    "unbiased": False,
    "update_stats": True,
}
USED = {
    "mask": jnp.ones((8, 1, 1), bool),
    "weights": jnp.ones((8, 1, 1)),
    "renorm": (3.0, 5.0),
    "activation": jax.nn.relu,
    "residual": jnp.ones(SHAPE),
    "virtual_batch_size": 4,
    "unbiased": True,
    "update_stats": False,
}
OF_TRAINING = ("renorm", "virtual_batch_size", "unbiased", "update_stats")

# Operations on values, not on shapes: those on arrays as large as x, and how many there are in all.
LARGE = {
    "eval": {"subtract": 1, "multiply": 1, "add": 1},
    "train": {"reduce": 2, "subtract": 2, "multiply": 2, "add": 1},
    "gradient": {"reduce": 4, "subtract": 4, "multiply": 5, "add": 3},
}
ALL = {"eval": 6, "train": 35, "gradient": 59}
OF_SHAPES = {"broadcast_in_dim", "reshape", "constant", "convert", "transpose", "slice"}


def program(caller, mode, **options):
    """The StableHLO of one call of x, params and a state without a count."""

    def run(x, params, state, dy):
        f = functools.partial(CALLERS[caller], state=state, train=mode != "eval", **options)
        if mode != "gradient":
            return f(x, params)
        y, vjp, new = jax.vjp(f, x, params, has_aux=True)
        return y, new, vjp(dy)

    return jax.jit(run).lower(X, PARAMS, STATE._replace(count=None), X).as_text()


def operations(text, at_least=0):
    """How often each operation stands in a program, its functions inlined."""
    found = collections.Counter()
    for name, size in re.findall(r"stablehlo\.(\w+)[^\n]*?tensor<([\dx]*)\w+>", hlo.inlined(text)):
        elements = math.prod(int(n) for n in size.split("x") if n)
        if name not in OF_SHAPES and elements >= at_least:
            found[name] += 1
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_program_holds_what_its_formula_needs(mode):
    """Eval: x - mean, times rstd * scale, plus bias. Training: two sums; in backward two more.

    The others are [C]: the moments from sums, rstd, the running statistics.
    """
    text = program("functional", mode)
    assert operations(text, math.prod(SHAPE)) == LARGE[mode]
    assert operations(text).total() == ALL[mode]


@pytest.mark.parametrize("caller", ["linen", "nnx"])
@pytest.mark.parametrize("mode", MODES)
def test_modules_run_the_ops_program(mode, caller):
    assert operations(program(caller, mode)) == operations(program("functional", mode))


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("mode", MODES)
def test_an_option_that_is_not_used_is_as_if_not_named(mode, caller):
    assert program(caller, mode, **UNUSED) == program(caller, mode)


@pytest.mark.parametrize("option", USED)
def test_an_option_in_use_shows_in_training(option):
    """Or the tests of this file would see nothing."""
    assert program("functional", "train", **{option: USED[option]}) != program(
        "functional", "train"
    )


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("option", OF_TRAINING)
def test_options_of_training_leave_the_program_of_eval(option, caller):
    assert program(caller, "eval", **{option: USED[option]}) == program(caller, "eval")
