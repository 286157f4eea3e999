"""Which kernel stands before each batch norm layer."""

from collections.abc import Callable, Mapping
from operator import add
from typing import Any

import jax
from jax.tree_util import GetAttrKey

from jaxbn._inspection import hooks
from jaxbn._inspection.layers import is_nnx, join, plain
from jaxbn._misuse import misuse

WRITE = "watch.kernels(model.apply, variables, x)"


def kernels(model: Any, *args: Any, **kwargs: Any) -> dict[str, str | tuple[str, ...]]:
    """The kernel before each batch norm layer: path of the layer → path of the kernel.

    Use it once before the training loop, and give the result to `records`, for `kernel_grad_norm`
    and `effective_rate` in `metrics`. The model is traced and does not run.

    Args:
      model: linen's `model.apply`, or an nnx model.
      *args: of a call of the model: for linen, variables and a batch; for nnx, a batch.
      **kwargs: of the call, `mutable=["batch_stats"]` say.

    Returns:
      Path → path, for the layers whose x is the result of one convolution or dense layer, with or
      without a bias. A layer after an activation or a sum is left out. Of a layer in `nn.scan` or
      `nn.vmap` the kernel is the stack of all kernels, and so are the norms. A layer that is called
      several times, after different kernels, has a tuple of their paths, in the order of the calls;
      the norms are then those of all these kernels together.

    Raises:
      TypeError: model is neither of the two, or the arguments of the call are missing.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from jaxbn import watch
    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
    >>> variables = model.init(jax.random.key(0), jnp.eye(2))
    >>> watch.kernels(model.apply, variables, jnp.eye(2), mutable=["batch_stats"])
    {'layers_1': 'layers_0/kernel'}
    """
    from jaxbn._folding.program import trace  # slow to import

    if is_nnx(model):
        from flax import nnx

        if not (args or kwargs):
            raise misuse("watch.kernels", [model], "a model and a batch", "watch.kernels(model, x)")
        graphdef, tree = nnx.split(model)

        def inputs(tree: Any) -> dict[str, Any]:
            with hooks.hooked_nnx(copy := nnx.merge(graphdef, tree), _input, add) as seen:
                copy(*args, **kwargs)
            return dict(seen)
    else:
        hooks.check_apply("watch.kernels", model, WRITE)
        if not args:
            raise TypeError(
                f"watch.kernels: called with apply alone, expected the arguments of a call of the "
                f"model; write {WRITE}."
            )
        if not isinstance(args[0], Mapping):
            expected = "a linen model's apply, its variables and a batch"
            raise misuse("watch.kernels", [model, *args], expected, WRITE)
        (tree, *batch), hooked = args, hooks.hooked_apply(model, _input, add)

        def inputs(tree: Any) -> dict[str, Any]:
            return hooked(tree, *batch, **kwargs)[1]

    program = trace(inputs, [tree], lambda _: True, one_turn=True)
    paths = dict(zip(program.inputs, leaves(tree), strict=True))
    made = {i: op for op in program.ops for i in op.outputs}
    inputs_of = jax.tree.unflatten(program.tree, program.outputs)
    before = {
        layer: tuple(dict.fromkeys(filter(None, (_kernel_of(x, made, paths) for x in of_calls))))
        for layer, of_calls in inputs_of.items()
    }
    return {layer: of if len(of) > 1 else of[0] for layer, of in before.items() if of}


def _input(call: hooks.Call, run: Callable[[bool], jax.Array]) -> tuple[jax.Array, Any]:
    return run(call.train), (call.x,)


def _kernel_of(x: int, made: Mapping[int, Any], paths: Mapping[int, str]) -> str | None:
    """The path of the kernel that x is the result of; None if x is something else."""
    from jaxbn._folding.chains import CONTRACTIONS, LAYOUT

    op = made.get(x)
    if op is None:
        return None
    if op.name in LAYOUT:
        return _kernel_of(op.inputs[0], made, paths)

    def leaf(i: int) -> str | None:
        while i in made and made[i].name in LAYOUT:
            i = made[i].inputs[0]
        return paths.get(i)

    if op.name == "add":  # of a bias; any other sum is not the result of one kernel
        terms = [i for i in op.inputs if leaf(i) is None]
        return _kernel_of(terms[0], made, paths) if len(terms) == 1 else None
    if op.name not in CONTRACTIONS:
        return None
    found = next(filter(None, map(leaf, op.inputs[::-1])), None)
    return found and found.removeprefix("params/")


def leaves(tree: Any) -> dict[str, Any]:
    """Path → leaf, in JAX's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(plain(tree))
    # The attribute of one of Flax's boxes is not part of the path.
    keys = ([k for k in path if not isinstance(k, GetAttrKey)] for path, _ in leaves)
    named = (join("", *(getattr(k, "key", getattr(k, "idx", k)) for k in path)) for path in keys)
    return dict(zip(named, (leaf for _, leaf in leaves), strict=True))
