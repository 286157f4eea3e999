# The training step twice: Flax linen, Flax nnx. All else in this folder takes either, and
# asks four things of it:
#
#   init(key)                    → state    parameters, running statistics, optimizer's state
#   train(state, images, labels) → state, loss, logits, seen  one step, training statistics
#   logits(state, images)        → logits                     running statistics, any batch
#   params(state)                → its parameters             to look at
#
# `seen` is what the norm layers saw and learned in this step, with watched=True; else {}.
# `kernels`, from jaxbn.watch.kernels, adds the norms of the kernel before each layer. `more` are
# the options of jaxbn.watch: shards=N also compares N parts of the batch.
# `state` is a pytree of arrays that nobody but its owner looks into.

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from jaxbn import watch


class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any


class Linen:
    def __init__(self, model, tx: optax.GradientTransformation, loss, shape=(32, 32, 3)):
        self.model, self.tx, self.loss = model, tx, loss
        self.image = np.zeros((1, *shape), np.float32)

    def init(self, key) -> State:
        variables = self.model.init(key, self.image, train=False)
        params = variables["params"]
        # Norms of one sample have no statistics.
        return State(params, variables.get("batch_stats", {}), self.tx.init(params))

    def train(self, state: State, images, labels, watched=False, kernels=None, **more):
        def loss(params):
            (logits, new), seen = watch.linen(self.model.apply, on=watched, **more)(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return self.loss(logits, labels), (logits, new.get("batch_stats", {}), seen)

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        logits, batch_stats, seen = aux
        variables = {"params": state.params, "batch_stats": batch_stats}
        seen = watch.records(seen, variables, grads, kernels=kernels)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), value, logits, seen

    def logits(self, state: State, images):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return self.model.apply(variables, images, train=False)

    def params(self, state: State):
        return state.params


class Nnx:
    """`make_model(rngs)` makes the model. Its structure is kept here, its arrays are the state."""

    def __init__(self, make_model, tx: optax.GradientTransformation, loss):
        self.make_model, self.tx, self.loss = make_model, tx, loss
        self.graphdef, _ = nnx.split(nnx.eval_shape(lambda: self.make(jax.random.key(0))))

    def make(self, key):
        model = self.make_model(nnx.Rngs(key))
        return model, nnx.Optimizer(model, self.tx, wrt=nnx.Param)

    def init(self, key) -> nnx.State:
        return nnx.state(self.make(key))

    def train(self, state: nnx.State, images, labels, watched=False, kernels=None, **more):
        model, optimizer = nnx.merge(self.graphdef, state)

        def loss(model):
            logits = model(images, train=True)  # updates the running statistics in place
            return self.loss(logits, labels), logits

        with watch.nnx(model, on=watched, **more) as seen:
            (value, logits), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        seen = watch.records(seen, model, grads, kernels=kernels)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), value, logits, seen

    def logits(self, state: nnx.State, images):
        model, _ = nnx.merge(self.graphdef, state)
        return model(images, train=False)

    def params(self, state: nnx.State):
        model, _ = nnx.merge(self.graphdef, state)
        return nnx.state(model, nnx.Param)
