"""Seeds bugs one at a time and shows the test that catches each: `python -m tests.seeded_bugs`.

Each bug is one replacement of text in a temporary copy of the package. It counts as caught when
its test runs there and fails, having passed on the package as it is. Give names to run some.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Bug(NamedTuple):
    name: str
    file: str  # its path from the root
    line: str  # as it stands there, once
    seeded: str
    test: str  # in tests/


ROAD = "op/test_roads.py::test_a_road_over_a_mesh_equals_one_device"

BUGS = (
    Bug(
        "mean of means, not weighted by count",
        "jaxbn/_op/pooling.py",
        "    kind = m.mean.dtype\n    weight",
        "    kind, m = m.mean.dtype, m._replace(count=jnp.ones_like(m.count))\n    weight",
        "op/test_devices.py::test_devices_equal_one_device_on_the_pooled_batch[shard_map-uneven]",
    ),
    Bug(
        "E[x²] - E[x]²",
        "jaxbn/_op/moments.py",
        "_about(device, _pivot(device, x, axes, mask, n), ",
        "_about(device, jnp.zeros_like(_pivot(device, x, axes, mask, n)), ",
        "op/test_moments.py::test_variance_does_not_cancel_at_large_means[shape0--1-jit]",
    ),
    Bug(
        "pivot of one row",
        "jaxbn/_op/moments.py",
        "        x = lax.slice_in_dim(x, 0, None, stride, axis=axis)",
        "        x = x[tuple(slice(1 if a in axes.reduced else None) for a in range(x.ndim))]",
        "op/test_moments.py::test_no_outlier_spoils_the_variance[a saturated pixel first]",
    ),
    Bug(
        "a sample of time that devices cannot share",
        "jaxbn/_op/moments.py",
        "        return axis, next(fits, 1) if x.size else 1",
        "        return axis, STRIDE if x.size else 1",
        f"{ROAD}[Explicit-height-jit-linen-replicated]",
    ),
    Bug(
        "sharded features in one row with a count",
        "jaxbn/_op/pooling.py",
        "    if any(jax.typeof(m.mean).sharding.spec):",
        "    if False:",
        f"{ROAD}[Explicit-features-shard_map, one axis-functional-as features]",
    ),
    Bug(
        "a mask that is not sharded as x",
        "jaxbn/_op/arguments.py",
        "    return sharded_as(v, x, range(x.ndim))",
        "    return v",
        f"{ROAD}[Explicit-features-jit-mask-as features]",
    ),
    Bug(
        "under vmap a sum over sharded features",
        "jaxbn/_op/arguments.py",
        "    of_devices = tuple(name for name in names if name in manual)",
        "    of_devices, manual = names, names",
        f"{ROAD}[Explicit-features-vmap-mask-as features]",
    ),
    Bug(
        "statistics in bfloat16",
        "jaxbn/_op/moments.py",
        "    d = x.astype(pivot.dtype) - axes.expand(pivot)",
        "    d = x - axes.expand(pivot).astype(x.dtype)",
        "op/test_batch_norm.py::test_training_equals_the_oracle[bfloat16]",
    ),
    Bug(
        "no pivot on TPUs, wherever the means are",
        "jaxbn/_op/moments.py",
        "near = jnp.all(real_product(mean, mean) <= NEAR * var)",
        "near = jnp.bool_(True)",
        "op/test_at_once.py::test_the_variance_is_right_at_any_mean[False-1000.0]",
    ),
    Bug(
        "on TPUs one channel near 0 speaks for all",
        "jaxbn/_op/moments.py",
        "near = jnp.all(",
        "near = jnp.any(",
        "op/test_at_once.py::test_one_channel_far_from_0_is_enough_for_the_pivot",
    ),
    Bug(
        "a pivot on TPUs, wherever the means are",
        "jaxbn/_op/moments.py",
        "near = jnp.all(real_product(mean, mean) <= NEAR * var)",
        "near = jnp.bool_(False)",
        "op/test_at_once.py::test_one_channel_far_from_0_is_enough_for_the_pivot",
    ),
    Bug(
        "a conditional's operands typed unlike",
        "jaxbn/_op/devices.py",
        'return lax.pcast(v, more, to="varying") if more else v',
        "return v",
        "op/test_at_once.py::test_devices_decide_for_themselves[True-False-options0-True]",
    ),
    Bug(
        "division by a constant count, rounded twice",
        "jaxbn/_op/moments.py",
        "return lax.optimization_barrier(jnp.where(count > 0, count, 1))",
        "return jnp.where(count > 0, count, 1)",
        "op/test_moments.py::test_a_constant_channel_is_exact[shape4]",
    ),
    Bug(
        "var clamped with its derivative",
        "jaxbn/_op/pooling.py",
        "return var - lax.stop_gradient(jnp.minimum(var, 0))",
        "return jnp.maximum(var, 0)",
        "op/test_moments.py::test_moments_are_differentiable_to_second_order[axis_name-True]",
    ),
    Bug(
        "parts of a vmap keep JAX's sharding",
        "jaxbn/_op/devices.py",
        "each = sharded_as(lax.all_gather(v, name), v, (None, *range(v.ndim)))",
        "each = lax.all_gather(v, name)",
        "op/test_devices.py::test_groups_of_a_vmap_on_an_explicit_mesh[features]",
    ),
    Bug(
        "the count of the first microbatch",
        "jaxbn/_adapt/replicas.py",
        "count.max(0)",
        "count[0]",
        "adapt/test_replicas.py::test_merged_updates_may_be_sharded_by_type[at0-None]",
    ),
    Bug(
        "relu on a CPU keeps both cotangents",
        "jaxbn/_op/tangent.py",
        "g, mean = lax.optimization_barrier((g, mean))",
        "pass",
        "benchmarks/test_benchmarks.py::test_a_training_step_with_ours_is_smaller_than_with_flax",
    ),
    Bug(
        "an operand of a vmap loses the sharding of the mapped axis",
        "jaxbn/_op/primitives.py",
        "return repeated(v, mapped)",
        "return jnp.broadcast_to(v[None], (len(mapped), *v.shape))",
        "op/test_roads.py::test_a_road_over_a_mesh_equals_one_device"
        "[Explicit-several-vmap-functional-as features]",
    ),
    Bug(
        "one part of a sum left out",
        "jaxbn/_op/sums.py",
        "return sum(rest, first)",
        "return sum(rest[1:], first)",
        "op/test_sums.py::test_training_equals_the_oracle[conv2d]",
    ),
    Bug(
        "a sum makes its own terms on CPU",
        "jaxbn/_op/sums.py",
        "return jnp.where(lax.optimization_barrier(jnp.bool_(True)), v, 0)",
        "return v",
        "op/test_sums.py::test_on_cpu_a_sum_is_of_one_array[shape0]",
    ),
    Bug(
        "the two sums on CPU change places",
        "jaxbn/_op/sums.py",
        "return jnp.where(first, 1, jnp.expand_dims(d, ABREAST))",
        "return jnp.where(first, jnp.expand_dims(d, ABREAST), 1)",
        "op/test_sums.py::test_sums_and_affine_are_each_others_transpose[False-shape0--1]",
    ),
    Bug(
        "merge forgets the distance of the means",
        "jaxbn/_op/pooling.py",
        " + real_product(delta, delta) * (share * (1 - share))",
        "",
        "op/test_moments.py::test_merge_equals_the_moments_of_both_sets[0]",
    ),
    Bug(
        "epsilon outside the root",
        "jaxbn/_op/normalize.py",
        "return lax.rsqrt(var + epsilon)",
        "return 1 / (lax.sqrt(var) + epsilon)",
        "op/test_batch_norm.py::test_eval_equals_the_oracle_and_keeps_the_state[dense]",
    ),
    Bug(
        "eval in x's dtype",
        "jaxbn/_op/normalize.py",
        "kind = promote(x.dtype, dtype, rstd.dtype)",
        "kind = promote(x.dtype, dtype)",
        "op/test_batch_norm.py::test_eval_of_bfloat16_is_rounded_once",
    ),
    Bug(
        "eval keeps x - mean for backward",
        "jaxbn/_op/normalize.py",
        "normalize_lean = jax.checkpoint(normalize, static_argnums=(4, 5))",
        "normalize_lean = normalize",
        "op/test_derivative.py::test_eval_keeps_x_in_its_own_dtype_and_nothing_where_nothing_trains"
        "[eval_functional-bfloat16]",
    ),
    Bug(
        "a NaN behind the mask is normalized as NaN",
        "jaxbn/_op/normalize.py",
        "d = jnp.where(mask | jnp.isfinite(x), d, 0)",
        "pass",
        "op/test_batch_norm.py::test_masked_out_cells_never_reach_the_layers_after[nan-True]",
    ),
    Bug(
        "0 times infinity where nothing varies",
        "jaxbn/_op/normalize.py",
        "jnp.where(sum_ == 0, jnp.inf, sum_)",
        "sum_",
        "op/test_batch_norm.py::test_epsilon_0_gives_bias_where_nothing_varies[True-False]",
    ),
    Bug(
        "sample weights taken for a mask",
        "jaxbn/_op/arguments.py",
        "if seen := _first(given, lambda v: (v != 0) & (v != 1)):",
        "if seen := []:",
        "op/test_errors.py::test_the_message_says_all[mask of 0.5 in batch_norm]",
    ),
    Bug(
        "x * a + (bias - mean * a)",
        "jaxbn/_op/normalize.py",
        "    y = d * axes.expand(a)",
        "    y = x.astype(kind) * axes.expand(a)\n"
        "    bias = (0 if bias is None else bias.astype(kind)) - mean.astype(kind) * a",
        "op/test_moments.py::test_a_constant_channel_is_exact[shape4]",
    ),
    Bug(
        "replicated statistics beside sharded features",
        "jaxbn/_op/arguments.py",
        "(sharded_as(v.astype(wide(v.dtype)), x, axes.features) for",
        "(v.astype(wide(v.dtype)) for",
        f"{ROAD}[Explicit-features-jit-functional-replicated]",
    ),
    Bug(
        "running var biased where unbiased was asked, and the reverse",
        "jaxbn/_op/state.py",
        " if unbiased else moments.var",
        " if not unbiased else moments.var",
        "op/test_batch_norm.py::test_running_state_follows_its_equation[0.99-False]",
    ),
    Bug(
        "momentum as in PyTorch",
        "jaxbn/_op/state.py",
        "keep = momentum if",
        "keep = 1 - momentum if",
        "op/test_batch_norm.py::test_running_state_follows_its_equation[0.99-False]",
    ),
    Bug(
        "cumulative average off by one update",
        "jaxbn/_op/state.py",
        "(state.count.astype(old.dtype) + 1)",
        "(state.count.astype(old.dtype) + 2)",
        "op/test_batch_norm.py::test_running_state_follows_its_equation[None-False]",
    ),
    Bug(
        "cumulative average by a weight near 1",
        "jaxbn/_op/state.py",
        "new = start + (batch - start) / (state.count.astype(old.dtype) + 1)",
        "keep = 1 - 1 / (state.count.astype(old.dtype) + 1)\n"
        "            new = keep * start + (1 - keep) * batch",
        "op/test_batch_norm.py::test_the_cumulative_average_weighs_each_update_alike[1000000-float32]",
    ),
    Bug(
        "statistics as narrow as they came",
        "jaxbn/_op/arguments.py",
        "sharded_as(v.astype(wide(v.dtype)), x, axes.features)",
        "sharded_as(v, x, axes.features)",
        "op/test_batch_norm.py::test_a_state_stored_narrow_arrives_at_the_truth[0.999-bfloat16]",
    ),
    Bug(
        "a count that wraps",
        "jaxbn/_op/state.py",
        "(learns & (count < jnp.iinfo(count.dtype).max))",
        "learns",
        "op/test_batch_norm.py::test_a_count_does_not_wrap[0.9-2147483647]",
    ),
    Bug(
        "state updated by NaN",
        "jaxbn/_op/state.py",
        "return jnp.where(learned, new.astype(old.dtype), old)",
        "return new.astype(old.dtype)",
        "op/test_batch_norm.py::test_a_channel_that_is_not_finite_keeps_its_statistics[float32-nan-0.9]",
    ),
    Bug(
        "state updated by a variance that is not finite",
        "jaxbn/_op/state.py",
        "finite = jnp.isfinite(var)",
        "finite = jnp.isfinite(mean)",
        "op/test_at_once.py::test_what_is_not_finite_leaves_its_channel[1e+30]",
    ),
    Bug(
        "state updated by what it cannot hold",
        "jaxbn/_op/state.py",
        "finite &= jnp.isfinite(mean)",
        "pass",
        "op/test_batch_norm.py::test_what_the_state_cannot_hold_is_not_finite",
    ),
    Bug(
        "one channel stops all",
        "jaxbn/_op/state.py",
        "finite = jnp.isfinite(var)",
        "finite = jnp.all(jnp.isfinite(var), keepdims=True)",
        "op/test_batch_norm.py::test_a_channel_that_is_not_finite_keeps_its_statistics[float32-nan-0.9]",
    ),
    Bug(
        "parts of the features count apart",
        "jaxbn/_op/state.py",
        "if split := varying_axes(state.mean) - varying_axes(count):",
        "if split := ():",
        "op/test_devices.py::test_parts_of_the_features_agree_on_one_count",
    ),
    Bug(
        "an nnx layer's statistics as narrow as they were",
        "jaxbn/nnx.py",
        "self.var.set_value(state.var)",
        "self.var[...] = state.var",
        "flax/test_nnx.py::test_statistics_stored_narrow_become_float32_in_training_alone[eager]",
    ),
    Bug(
        "recalibrated statistics as narrow as the old ones",
        "jaxbn/_inspection/layers.py",
        "value.astype(wide(dtype) if jnp.issubdtype(dtype, jnp.inexact) else dtype)",
        "value.astype(dtype)",
        "adapt/test_recalibrate.py::test_replaced_statistics_are_float32_or_wider",
    ),
    Bug(
        "gradient through the running state",
        "jaxbn/_op/state.py",
        "return jax.tree.map(lax.stop_gradient, new)",
        "return new",
        "op/test_batch_norm.py::test_no_gradient_flows_through_the_state",
    ),
    Bug(
        "y normalized by the unbiased variance",
        "jaxbn/_op/training.py",
        "r = rstd(m.var, ",
        "r = rstd(m.var * m.count / (m.count - 1), ",
        "op/test_batch_norm.py::test_training_equals_the_oracle[dense]",
    ),
    Bug(
        "dscale times the number of devices",
        "jaxbn/_op/training.py",
        "by_d = by_d + r * tparams.scale.astype(kind)",
        "by_d = by_d + r * tparams.scale.astype(kind) * (pool.devices if pool else 1)",
        "op/test_devices.py::test_devices_equal_one_device_on_the_pooled_batch[pmap-even]",
    ),
    Bug(
        "second sum of backward not pooled",
        "jaxbn/_op/training.py",
        "s1, s2 = devices.totals((s1, s2), pool)",
        "s1 = devices.total(s1, pool)",
        "op/test_devices.py::test_devices_equal_one_device_on_the_pooled_batch[pmap-even]",
    ),
    Bug(
        "mask ignored in backward",
        "jaxbn/_op/tangent.py",
        "ty = jnp.where(mask, ty, 0)",
        "pass",
        "op/test_derivative.py::test_gradients_equal_the_oracle[padded batch]",
    ),
    Bug(
        "a NaN outside the mask reaches dscale",
        "jaxbn/_op/tangent.py",
        "return d if mask is None else jnp.where(mask | jnp.isfinite(x), d, 0)",
        "return d",
        "op/test_batch_norm.py::test_masked_out_cells_never_reach_the_statistics_or_a_gradient[nan]",
    ),
    Bug(
        "statistics no longer functions of x in second order",
        "jaxbn/_op/training.py",
        "y, m, r, change = _forward(spec, v)",
        "y, m, r, change = _forward(spec, v); m, r = jax.lax.stop_gradient((m, r))",
        "op/test_derivative.py::test_derivatives_of_first_and_second_order[masked]",
    ),
    Bug(
        "a traced epsilon has no derivative",
        "jaxbn/_op/training.py",
        "half = half + t.epsilon.astype(kind) / 2",
        "pass",
        "op/test_derivative.py::test_derivatives_of_first_and_second_order[traced epsilon]",
    ),
    Bug(
        "x kept for backward in float32",
        "jaxbn/_op/training.py",
        "others = a, v.x, m.mean,",
        "others = a, v.x.astype(kind), m.mean,",
        "op/test_derivative.py::test_kept_for_backward_is_x_in_its_own_dtype[plain-bfloat16]",
    ),
    Bug(
        "x - mean shared by forward and backward",
        "jaxbn/_op/tangent.py",
        "        mean, a = lax.optimization_barrier((mean, a))\n",
        "        pass\n",
        "op/test_derivative.py::test_a_resnet_step_needs_less_memory_than_with_flax[float32-0.7-plain]",
    ),
    Bug(
        "a collective for dscale and one for dbias",
        "jaxbn/_op/training.py",
        "by_d, by_1 = devices.alike(jnp.stack([by_d, by_1]), v.x)[0]",
        "pass",
        "op/test_devices.py::test_collectives_are_one_and_one_as_written",
    ),
    Bug(
        "groups contiguous whatever was asked",
        "jaxbn/_op/arguments.py",
        "    groups = tuple(tuple(int(i) for i in group) for group in axis_index_groups)\n",
        "    groups = tuple(tuple(int(i) for i in group) for group in axis_index_groups)\n"
        "    k = len(groups[0]) if groups else 1\n"
        "    groups = tuple(tuple(range(i, i + k)) for i in range(0, size, k))\n",
        "op/test_devices.py::test_groups_equal_one_device_on_each_group[scattered-pmap]",
    ),
    Bug(
        "ghost batches interleaved",
        "jaxbn/_op/batch_norm.py",
        "        return v.reshape(*before, ghosts, v.shape[batch_axis] // ghosts, *after)",
        "        v = v.reshape(*before, v.shape[batch_axis] // ghosts, ghosts, *after)\n"
        "        return v.swapaxes(batch_axis, batch_axis + 1)",
        "op/test_batch_norm.py::test_ghost_batches_equal_a_loop_over_groups[rows]",
    ),
    Bug(
        "another library's argument is Python's error",
        "jaxbn/_elsewhere.py",
        "        for name in kwargs.keys() & ARGUMENTS:",
        "        for name in ():",
        "test_first_day.py::test_arguments_of_other_libraries[eps-linen]",
    ),
    Bug(
        "another library's name is a plain AttributeError",
        "jaxbn/_elsewhere.py",
        "    if found is None:",
        "    if found is None or not found[1]:",
        "test_first_day.py::test_names_of_other_libraries[BatchNorm]",
    ),
    Bug(
        "weights count as a mask",
        "jaxbn/_op/moments.py",
        "    w = weights.astype(jnp.finfo(kind).dtype)",
        "    w = mask.astype(jnp.finfo(kind).dtype)",
        "op/test_weights.py::test_moments_equal_the_oracle[conv2d]",
    ),
    Bug(
        "no derivative by a weight of 0",
        "jaxbn/_op/moments.py",
        "    x = jnp.where(mask | jnp.isfinite(x), x.astype(kind), 0)",
        "    x = jnp.where(mask, x.astype(kind), 0)",
        "op/test_weights.py::test_y_state_and_gradients_equal_the_oracle[conv2d]",
    ),
    Bug(
        "weights of this device alone",
        "jaxbn/_op/moments.py",
        "    count = devices_.total(_count(w, x, axes, w.dtype), pool)",
        "    count = _count(w, x, axes, w.dtype)",
        "op/test_weights.py::test_devices_equal_one_device[vmap]",
    ),
    Bug(
        "a weighted variance without its pivot",
        "jaxbn/_op/moments.py",
        "    pivot = lax.stop_gradient(mean_of(x))",
        "    pivot = 0 * lax.stop_gradient(mean_of(x))",
        "op/test_weights.py::test_the_variance_does_not_cancel_at_large_means[1000.0]",
    ),
    Bug(
        "a mask that weights forget",
        "jaxbn/_op/arguments.py",
        "weights = weights if mask is None else jnp.where(mask, weights, 0)",
        "weights = weights + 0",
        "op/test_weights.py::test_mask_and_weights_multiply",
    ),
    Bug(
        "negative weights pass",
        "jaxbn/_op/arguments.py",
        "lambda v: ~((v >= 0) & (v < np.inf))",
        "lambda v: ~(v < np.inf)",
        "op/test_errors.py::test_the_message_says_all[weights of -0.5 in moments]",
    ),
    Bug(
        "hooks forget the weights of a call",
        "jaxbn/_inspection/hooks.py",
        "layer.axis_name, groups, call.weights)",
        "layer.axis_name, groups)",
        "op/test_weights.py::test_the_modules_and_recalibration_take_them_from_the_call",
    ),
    Bug(
        "r and d are differentiated",
        "jaxbn/_op/renorm.py",
        "lambda v: lax.stop_gradient(v.astype(kind)), (m",
        "lambda v: v.astype(kind), (m",
        "op/test_derivative.py::test_derivatives_of_first_and_second_order[renorm, masked]",
    ),
    Bug(
        "r is clipped from above alone",
        "jaxbn/_op/renorm.py",
        "near / r, 1), 1 / r_max, r_max)",
        "near / r, 1), 0, r_max)",
        "op/test_renorm.py::test_y_state_and_gradients_equal_the_oracle[conv2d]",
    ),
    Bug(
        "d is added after scale",
        "jaxbn/_op/renorm.py",
        "by_r, by_d = (v * params.scale.astype(both) for v in (by_r, by_d))",
        "by_r = by_r * params.scale.astype(both)",
        "op/test_renorm.py::test_y_state_and_gradients_equal_the_oracle[conv2d]",
    ),
    Bug(
        "d where no value is valid",
        "jaxbn/_op/renorm.py",
        "d = jnp.where(m.count > 0, d, 0)",
        "d = jnp.where(m.count >= 0, d, 0)",
        "op/test_renorm.py::test_where_nothing_can_be_told",
    ),
    Bug(
        "recalibration is drawn to the old statistics",
        "jaxbn/_inspection/observer.py",
        'plain = {"renorm": (1.0, 0.0)} if drawn else {}',
        "plain = {}",
        "op/test_renorm.py::test_recalibration_does_not_lean_on_the_old_statistics[nnx-call]",
    ),
    Bug(
        "another library's name, imported, is Python's ImportError",
        "jaxbn/_elsewhere.py",
        '"_handle_fromlist"',
        '"nobody"',
        "test_first_day.py::test_names_of_other_libraries_imported[BatchNorm]",
    ),
    Bug(
        "help(jaxbn) leaves a name out",
        "jaxbn/__init__.py",
        "labels, decay_mask\n",
        "labels\n",
        "test_public.py::test_help_is_a_map",
    ),
    Bug(
        "an example of the help is no command line",
        "jaxbn/_cli/options.py",
        "recalibrate net.msgpack ready.msgpack --model",
        "recalibrate net.msgpack ready.msgpack --net",
        "cli/test_cli.py::test_the_examples_of_the_help_are_command_lines",
    ),
    Bug(
        "a link of a page leads to no page",
        "docs/index.md",
        "(why.md)",
        "(wy.md)",
        "docs/test_pages.py::test_links_and_commands_lead_somewhere[docs/index.md]",
    ),
    Bug(
        "a link of a page leads to no heading",
        "docs/cost-model.md",
        "#subgroups-of-devices",
        "#groups-of-devices",
        "docs/test_pages.py::test_links_and_commands_lead_somewhere[docs/cost-model.md]",
    ),
    Bug(
        "a block of a page does not run",
        "docs/index.md",
        "jaxbn.init(16)",
        "jaxbn.init_state(16)",
        "docs/test_readme.py::test_blocks_run[docs/index.md]",
    ),
    Bug(
        "a public name has no entry in the reference",
        "docs/reference/jaxbn.md",
        ".. autofunction:: jaxbn.merge\n",
        "",
        "docs/test_reference.py::test_every_public_name_has_an_entry[jaxbn]",
    ),
    Bug(
        "an example without a picture",
        "docs/gallery.md",
        "`python examples/swap/swap.py`",
        "`swap.py`",
        "docs/test_pages.py::test_every_example_has_a_picture",
    ),
    Bug(
        "a forgotten mutable in Flax's words",
        "jaxbn/linen.py",
        'if updates and not self.is_mutable_collection("batch_stats"):',
        "if False:",
        "test_first_day.py::test_forgotten_mutable",
    ),
    Bug(
        "linen learns what it was told to leave",
        "jaxbn/linen.py",
        "updates = update_stats and not (",
        "updates = not (",
        "flax/test_update_stats.py::test_linens_batch_stats_need_not_be_mutable",
    ),
    Bug(
        "nnx learns what it was told to leave",
        "jaxbn/nnx.py",
        "        if update_stats and not use_running_average:",
        "        if not use_running_average:",
        "flax/test_update_stats.py::test_y_and_dx_are_those_of_training_and_the_statistics_stay[nnx-plain]",
    ),
    Bug(
        "an nnx layer of another size speaks of params.scale",
        "jaxbn/nnx.py",
        "        if features != mean.shape:",
        "        if False:",
        "test_first_day.py::test_an_nnx_layer_of_another_size_speaks_of_its_own_arguments[True]",
    ),
    Bug(
        "variables pass for a model",
        "jaxbn/_inspection/hooks.py",
        "    if not callable(apply) or is_nnx(apply)",
        "    if is_nnx(apply)",
        "test_first_day.py::test_what_is_no_model[watch.linen of variables]",
    ),
    Bug(
        "few_values advises what does not change y",
        "jaxbn/health/_layer.py",
        "or jaxbn.swap: to=",
        "or jaxbn.merge_updates: to=",
        "test_first_day.py::test_few_values_are_cured_by_what_changes_y",
    ),
    Bug(
        "one value per channel let through",
        "jaxbn/_op/arguments.py",
        "    if count == 1 and x.size:",
        "    if count < 0:",
        "op/test_errors.py::test_the_message_says_all[one value per channel]",
    ),
    Bug(
        "no value taken for one",
        "jaxbn/_op/arguments.py",
        "    if count == 1 and x.size:",
        "    if count == 1:",
        "op/test_errors.py::test_one_row_is_no_error_where_it_may_be_right[options4]",
    ),
    Bug(
        "another layer's state taken for a wrong axis",
        "jaxbn/_op/arguments.py",
        "if shapes[other] and wrong.keys() == shapes[own].keys():",
        "if False:",
        "op/test_errors.py::test_the_message_says_all[state of another layer]",
    ),
    Bug(
        "a bias before a sum as large as after it",
        "jaxbn/_folding/rewrite.py",
        "chain.by_channel(chain.offset / chain.gain)",
        "chain.by_channel(chain.offset)",
        "folding/test_fold_around.py::test_a_norm_after_a_pool_goes_into_the_kernel_before_it[sum]",
    ),
    Bug(
        "zeros of padding count as values of the pool",
        "jaxbn/_folding/chains.py",
        'if any(p for pad in params["padding"] for p in pad) or',
        "if",
        "folding/test_fold_around.py::test_a_norm_after_a_pool_that_pads_stays",
    ),
    Bug(
        "one affine also where it cancels",
        "jaxbn/_folding/fold.py",
        "folded.written |= inexact",
        "return FoldReport(tuple(sites), *_worst(together), tolerance)",
        "folding/test_fold_around.py::test_a_norm_that_stays_is_one_affine_where_that_is_exact",
    ),
    Bug(
        "every part of a concatenation takes the first share",
        "jaxbn/_folding/rewrite.py",
        "for part in parts]\n",
        "for part in [parts[0][..., : p.shape[-1]] for p in parts]]\n",
        "folding/test_fold_around.py::test_a_norm_after_a_concatenation_goes_into_every_kernel[-1]",
    ),
    Bug(
        "a smaller window in a corner of the larger",
        "jaxbn/_folding/chains.py",
        "pads[axis] = (before, after)",
        "pads[axis] = (0, before + after)",
        "folding/test_fold_around.py::test_branches_become_one_convolution[3x3, 1x1, identity]",
    ),
    Bug(
        "a subtraction taken for an addition",
        "jaxbn/_folding/chains.py",
        "sign = 1 if position == 0 else -1",
        "sign = 1",
        "folding/test_fold.py::test_affines_in_any_order_between_reshapes_and_transposes[0]",
    ),
    Bug(
        "what is read twice is folded",
        "jaxbn/_folding/rewrite.py",
        "if len(self.readers.get(i, ())) > 1:",
        "if len(self.readers.get(i, ())) > 9:",
        "folding/test_fold.py::test_a_norm_stays_where_its_convolution_is_read_before_it",
    ),
    Bug(
        "an offset behind zero padding",
        "jaxbn/_folding/chains.py",
        "if padded and chain.offset.any():",
        "if False:",
        "folding/test_fold.py::test_a_norm_before_padding_stays_unless_its_offset_is_zero",
    ),
    Bug(
        "training mode is folded",
        "jaxbn/_folding/training_mode.py",
        "elif from_rows and not longer_now:",
        "elif False:",
        "folding/test_fold.py::test_what_cannot_be_folded_is_refused[training mode]",
    ),
    Bug(
        "outputs of a flattened image keep their order",
        "jaxbn/convert/_layouts.py",
        'how, v = f"{how}, outputs CHW → HWC", channels_last(v, role.outputs, 0)',
        'how = f"{how}, outputs CHW → HWC"',
        "convert/test_layers.py::test_inputs_outputs_and_norms_of_flattened_images",
    ),
    Bug(
        "a tensor on the meta device is taken",
        "jaxbn/convert/_state_dicts.py",
        'if getattr(value, "is_meta", False):',
        "if False:",
        "convert/test_files.py::test_what_holds_no_weights_is_refused[meta]",
    ),
    Bug(
        "an index names files anywhere",
        "jaxbn/_files.py",
        "    if any(Path(file).name != file or not file.endswith(",
        "    if any(not file.endswith(",
        "convert/test_files.py::test_a_damaged_folder_is_refused[outside]",
    ),
    Bug(
        "the projection of Flax's ImageNet example comes first",
        "jaxbn/convert/_matching.py",
        'int(part["number"] or 10**6)',
        'int(part["number"] or -1)',
        "convert/test_layers.py::test_names_of_flaxs_imagenet_example",
    ),
    Bug(
        "transposed kernels are not flipped",
        "jaxbn/convert/_layouts.py",
        "return np.flip(w, tuple(range(w.ndim - 2))).swapaxes(-1, -2)",
        "return w.swapaxes(-1, -2)",
        "convert/test_convert.py::test_transposed_convolutions_of_as_many_inputs_as_outputs[1-False-linen]",
    ),
    Bug(
        "PyTorch's momentum as it is written",
        "jaxbn/convert/_norm_arguments.py",
        "round(1 - momentum, 12)",
        "momentum",
        "convert/test_convert.py::test_training_goes_on_as_in_pytorch[0.1-True]",
    ),
    Bug(
        "recalibrated beside replicated statistics",
        "jaxbn/_adapt/recalibrate.py",
        "devices.spread(before.astype(new.dtype), new)",
        "before.astype(new.dtype)",
        f"{ROAD}[Explicit-features-jit-recalibrate-replicated]",
    ),
    Bug(
        "a count on a mesh has no cell",
        "jaxbn/health/_layer.py",
        "copies[i, *shard.index] = shard.data",
        "copies[i][shard.index] = shard.data",
        "health/test_health.py::test_replicas_that_agree_and_features_that_are_split_are_none",
    ),
    Bug(
        "a mask has the axes of x",
        "jaxbn/health/_rows.py",
        '    mask, weights = check_cells("drift", call.mask, call.weights, x)\n',
        "    mask, weights = call.mask, call.weights\n",
        "health/test_drift.py::test_a_mask_without_an_axis_of_rows_is_one_for_all_rows",
    ),
    Bug(
        "the last cell of a sharded batch",
        "jaxbn/health/_gap.py",
        "    last = sharded_as(x, x, [a if a in axes.features else None for a in range(x.ndim)])",
        "    last = x",
        f"{ROAD}[Explicit-several-eager-gap-as features]",
    ),
    Bug(
        "batches of a recalibration weigh alike",
        "jaxbn/_adapt/recalibrate.py",
        "        both = merge(old.moments, batch)\n",
        "        old = old._replace(moments=old.moments._replace(count=jnp.float32(1)))\n"
        "        both = merge(old.moments, batch._replace(count=jnp.float32(1)))\n",
        "adapt/test_recalibrate.py::test_statistics_are_those_of_one_batch_of_all[functional]",
    ),
    Bug(
        "recalibration in eval mode",
        "jaxbn/_inspection/observer.py",
        "batch_moments(call, lambda _: run(True, **plain))",
        "batch_moments(call, lambda _: run(call.train, **plain))",
        "adapt/test_recalibrate.py::test_statistics_are_those_of_one_batch_of_all[linen]",
    ),
    Bug(
        "recalibration takes what the layers leave",
        "jaxbn/_inspection/observer.py",
        "        if not call.update_stats:",
        "        if False:",
        "flax/test_update_stats.py::test_recalibration_takes_what_the_layer_learns_from[nnx]",
    ),
    Bug(
        "a frozen layer trains",
        "jaxbn/_adapt/freeze.py",
        "return run(call.train and call.path not in frozen), None",
        "return run(call.train), None",
        "adapt/test_freeze.py::test_what_is_frozen_is_so_to_the_bit_and_the_rest_moves[linen-flax-all-trainable]",
    ),
    Bug(
        "statistics that were counted and not learned are frozen",
        "jaxbn/_adapt/freeze.py",
        "    mean, var = np.asarray(state.mean), np.asarray(state.var)\n",
        "    mean, var = np.asarray(state.mean), state.var + (state.count is not None)\n",
        "adapt/test_freeze.py::test_a_count_and_initial_values_both_say_untrained[initial-values]",
    ),
    Bug(
        "padding inside the count of an average pool",
        "jaxbn/export/_operators.py",
        'attributes["count_include_pad"] = int(not inside)',
        'attributes["count_include_pad"] = 1',
        "export/test_onnx.py::test_layers_leave_as_one_operator[zeros not counted]",
    ),
    Bug(
        "a transposed kernel of ONNX as JAX has it",
        "jaxbn/export/_operators.py",
        "np.split(np.flip(w, tuple(range(2, w.ndim))), ",
        "np.split(w, ",
        "export/test_onnx.py::test_layers_leave_as_one_operator[transposed conv]",
    ),
    Bug(
        "a maximum stays a Max",
        "jaxbn/export/_operators.py",
        "        if least == 0 and floating(op.dtype):",
        "        if False:",
        "export/test_onnx.py::test_nothing_is_transposed_between_convolutions",
    ),
    Bug(
        "axes go back after every node",
        "jaxbn/export/_operators.py",
        "        if tuple(order) == self.order:\n            return self.array\n",
        "",
        "export/test_onnx.py::test_nothing_is_transposed_between_convolutions",
    ),
    Bug(
        "constants of half networks in float32",
        "jaxbn/export/_nodes.py",
        "tensor = ir.tensor(array)",
        "tensor = ir.tensor(np.asarray(array, np.float32) if array.dtype.kind == 'f' else array)",
        "export/test_onnx.py::test_half_networks_keep_their_dtypes[float16-0-0.004]",
    ),
    Bug(
        "bfloat16 inside the file",
        "jaxbn/export/_onnx.py",
        "    without_bfloat16(model)\n",
        "",
        "export/test_onnx.py::test_half_networks_keep_their_dtypes[bfloat16-0-0.03]",
    ),
    Bug(
        "the converter's jnp.cumsum stays",
        "jaxbn/export/_nodes.py",
        '    setattr(jnp, "cumsum", cumsum)',
        "    cumsum.__name__",
        "export/test_onnx.py::test_the_converter_leaves_jax_as_it_was",
    ),
    Bug(
        "NaN results are compared",
        "jaxbn/export/_checked_file.py",
        "if wrong := int((~np.isfinite(v)).sum()):",
        "if wrong := 0:",
        "export/test_onnx.py::test_what_cannot_be_exported_is_refused[NaN]",
    ),
    Bug(
        "histograms of batches of several sizes",
        "jaxbn/export/_int8.py",
        "    if len({*counts}) == 1:",
        "    if True:",
        "export/test_int8.py::test_eight_bits_in_every_way[options2-kinds2]",
    ),
    Bug(
        "activations always in int8",
        "jaxbn/export/_int8.py",
        "activation_type=quantization.QuantType[KINDS[activations]]",
        "activation_type=quantization.QuantType.QInt8",
        "export/test_int8.py::test_eight_bits_in_every_way[options0-kinds0]",
    ),
    Bug(
        "a stage judged beside the first",
        "examples/cifar10/ship.py",
        "    for before, row in itertools.pairwise(rows):\n        lost",
        "    for before, row in ((rows[0], row) for row in rows):\n        lost",
        "export/test_export.py::test_a_loss_of_accuracy_is_an_exit_status",
    ),
    Bug(
        "a folded function is a closure to pickle",
        "jaxbn/_folding/fold.py",
        "    def __reduce__(",
        "    def _reduce(",
        "inspection/test_model_trees.py::test_a_folded_function_pickles_where_its_own_does",
    ),
    Bug(
        "a swapped batch norm forgets its settings",
        "jaxbn/_adapt/swap.py",
        "    new = cls(**kept | _options_of(layer, options), parent=layer.scope)",
        "    new = cls(**_options_of(layer, options), parent=layer.scope)",
        "adapt/test_swap_batch.py::"
        "test_a_swapped_layer_is_the_layer_with_these_arguments[linen-none]",
    ),
    Bug(
        "groups of devices outlive their axis",
        "jaxbn/_adapt/swap.py",
        '{} if own else {"axis_index_groups": None}',
        "{}",
        "adapt/test_swap_batch.py::test_another_axis_drops_the_groups_of_the_old",
    ),
    Bug(
        "one count for all scanned layers",
        "jaxbn/_adapt/swap.py",
        "nnx.BatchStat(jnp.zeros(mean.shape[:-1], jnp.int32))",
        "nnx.BatchStat(jnp.zeros((), jnp.int32))",
        "adapt/test_swap_batch.py::test_nnx_layers_of_a_transform_are_swapped[scan]",
    ),
    Bug(
        "a subclass' own call is lost",
        "jaxbn/_adapt/swap.py",
        "    known = type(layer).__call__ in (Flax.__call__, Ours.__call__)",
        "    known = True",
        "adapt/test_swap_batch.py::test_bad_calls_are_told_what_to_write[a frozen layer]",
    ),
    Bug(
        "hooks see the layer that another stands in for",
        "jaxbn/_inspection/hooks.py",
        " or is_replaced(layer):",
        ":",
        "adapt/test_swap_batch.py::test_hooks_around_and_inside_see_the_layer_that_stands_in",
    ),
    Bug(
        "the outer of two swaps comes first",
        "jaxbn/_inspection/stand_ins.py",
        "_changes.set((change, *_changes.get()))",
        "_changes.set((*_changes.get(), change))",
        "adapt/test_swap_batch.py::test_to_flax_is_the_way_back[linen]",
    ),
    Bug(
        "one name for the records of all hooks",
        "jaxbn/_inspection/hooks.py",
        '        yield f"{OBSERVED}_{around}" if around else OBSERVED',
        "        yield OBSERVED",
        "inspection/test_calls.py::test_each_of_two_hooks_has_its_own_records[linen]",
    ),
    Bug(
        "all convolutions are standardized",
        "jaxbn/_adapt/swap.py",
        'or layers.join("", *layer.path) not in paths:',
        "or not paths:",
        "adapt/test_swap.py::test_kernels_of_selected_convolutions_are_standardized[linen]",
    ),
    Bug(
        "standardized over the outputs",
        "jaxbn/_op/standardize.py",
        "axis=axes.features, epsilon",
        "axis=axes.reduced, epsilon",
        "op/test_standardize.py::test_each_output_has_mean_0_and_var_1[dense-0]",
    ),
    Bug(
        "a position's embedding passes for a bias",
        "jaxbn/_folding/norms.py",
        "        alone = varies and not Counter(varies.values()) - Counter(features.values())",
        "        alone = varies",
        "health/test_lint.py::test_a_sound_network_has_none[flax-an embedding of positions]",
    ),
    Bug(
        "one factor that starts at 0 is for good",
        "jaxbn/_folding/norms.py",
        "        return other == FOR_GOOD or min(own, other) > NO",
        "        return other > NO",
        "health/test_lint.py::test_a_sound_network_has_none[flax-a scale that starts at 0]",
    ),
    Bug(
        "dropout of whole rows counts",
        "jaxbn/_folding/norms.py",
        "any(axis > 0 for axis in self._varying(op, mask))",
        "True",
        "health/test_lint.py::test_a_sound_network_has_none[flax-whole rows dropped]",
    ),
    Bug(
        "dropout is seen behind a norm",
        "jaxbn/_folding/norms.py",
        "                self.keep.pop(i, None)  # the batch's variance is 1 again",
        "                pass",
        "health/test_lint.py::"
        "test_a_broken_network_has_its_finding_and_no_other[dropout, then two norms-flax]",
    ),
    Bug(
        "two norms in a row are one",
        "jaxbn/_folding/norms.py",
        "                norm = None  # a statistic of what this norm gave: another norm begins",
        "                pass",
        "health/test_lint.py::test_norms_in_a_row_are_two[True]",
    ),
    Bug(
        "lint updates the model",
        "jaxbn/health/_lint.py",
        "copy=True)",
        "copy=False)",
        "health/test_lint.py::test_flax_resnets_have_none[True-flax]",
    ),
    Bug(
        "the noise of an unbiased variance",
        "jaxbn/health/_advise.py",
        "    return math.sqrt(max((n - 1) / n - mean**2, 0.0))",
        "    return math.sqrt(1 / (2 * (n - 1)))",
        "health/test_advise.py::test_the_noise_of_a_batch_is_that_of_normal_batches[2]",
    ),
    Bug(
        "all axes are pooled where one is enough",
        "jaxbn/health/_advise.py",
        "            break",
        "            pass",
        "health/test_advise.py::test_the_axis_that_is_enough_is_named",
    ),
    Bug(
        "a frozen class that pickle cannot find",
        "jaxbn/_inspection/nnx_classes.py",
        "return _picklable(meta)(name, (cls,), body)",
        "return meta(name, (cls,), body)",
        "inspection/test_model_trees.py::test_frozen_and_swapped_nnx_models_pickle[freeze-BatchNorm1]",
    ),
    Bug(
        "a hooked layer keeps its hook",
        "jaxbn/_inspection/nnx_classes.py",
        "    exchange(layer, type(layer).__base__)",
        "    exchange(layer, type(layer))",
        "inspection/test_calls.py::test_an_error_within_leaves_the_nnx_model_as_it_was",
    ),
    Bug(
        "paths that begin with a slash",
        "jaxbn/_inspection/layers.py",
        "(path, *keys) if path else keys",
        "(path, *keys)",
        "inspection/test_calls.py::test_what_is_replaced_is_found[linen]",
    ),
    Bug(
        "boxes taken for arrays",
        "jaxbn/_inspection/layers.py",
        "return State(*map(unboxed, node if isinstance(node, State) else ",
        "return State(*(node if isinstance(node, State) else ",
        "inspection/test_model_trees.py::test_boxes_are_looked_through[flax-partitioned-check]",
    ),
    Bug(
        "heads called mean and var taken for statistics",
        "jaxbn/_inspection/layers.py",
        'return jax.tree_util.all_leaves([unboxed(node["mean"]), unboxed(node["var"])])',
        "return True",
        "inspection/test_model_trees.py::test_modules_may_be_called_mean_and_var[functional]",
    ),
    Bug(
        "one value per channel refused in a Flax module",
        "jaxbn/_op/one_value.py",
        "except OneValueError as error:",
        "except ZeroDivisionError as error:",
        "flax/test_one_value.py::test_y_and_statistics_are_flaxs_and_a_warning_comes[nnx-a row]",
    ),
    Bug(
        "a warning that points into the library",
        "jaxbn/_op/one_value.py",
        "stacklevel=_to_the_user(),",
        "stacklevel=2,",
        "flax/test_one_value.py::test_nnx_knows_its_path_while_a_hook_runs",
    ),
    Bug(
        "an argument of Flax's with another default",
        "jaxbn/nnx.py",
        "use_fast_variance: bool = True,",
        "use_fast_variance: bool = False,",
        "flax/test_nnx.py::test_the_signature_is_flaxs_and_four_arguments_more",
    ),
    Bug(
        "any name passes type checkers",
        "jaxbn/__init__.py",
        "else:\n\n    def __getattr__",
        "if True:\n\n    def __getattr__",
        "test_types.py::test_typos_are_found[jaxbn.nope]",
    ),
    Bug(
        "one batch taken for its layers' names",
        "jaxbn/health/_drift.py",
        "[batches] if isinstance(batches, Mapping) else batches",
        "batches",
        "health/test_drift.py::test_drift_is_the_stream_merged",
    ),
    Bug(
        "the order of rows is not tried",
        "jaxbn/health/_serving.py",
        "rolled = np.roll(rows, 1)",
        "rolled = rows",
        "health/test_serving.py::test_each_kind_is_found[the place]",
    ),
    Bug(
        "only the first half of the rows is tried beside others",
        "jaxbn/health/_serving.py",
        "(slice(half, n), np.where(rows < half, n - 1, rows)),",
        "(slice(half, n), rows),",
        "health/test_serving.py::test_each_kind_is_found[the first row]",
    ),
    Bug(
        "a few values are called stale",
        "jaxbn/health/_distances.py",
        "rows > 1 and values_of(batch) >= limits.values",
        "rows > 1",
        "health/test_health.py::test_few_values_are_no_staleness[2]",
    ),
    Bug(
        "narrow statistics are no finding",
        "jaxbn/health/_layer.py",
        "if eps <= widest:",
        "if eps < 1:",
        "health/test_health.py::test_statistics_in_a_narrow_dtype_are_a_finding[mean-float16-warning]",
    ),
    Bug(
        "what momentum 1 has counted is called sound",
        "jaxbn/health/_layer.py",
        "if count == 0 or initial:",
        "if count == 0 or (count is None and initial):",
        "health/test_health.py::test_momentum_1_counts_and_learns_nothing[init]",
    ),
    Bug(
        "half of a divergence",
        "jaxbn/health/_distances.py",
        "+ d**2 / v + d**2 / w) / 2",
        "+ d**2 / v) / 2",
        "health/test_health.py::test_distance_is_the_divergence_of_the_gaussians",
    ),
    Bug(
        "a flipped bit is gone on from",
        "examples/cifar10/checkpoint.py",
        "return json.loads((place / SUMS).read_text()) == sums(place)",
        "return (place / SUMS).exists()",
        "examples/test_cifar10_resume.py::test_a_damaged_file_of_the_newest_checkpoint_is_never_gone_on_from[flip]",
    ),
    Bug(
        "an empty checkpoint is gone on from",
        "examples/cifar10/checkpoint.py",
        "        except (OSError, ValueError, RecursionError):\n            return False",
        "        except (OSError, ValueError, RecursionError):\n            return True",
        "examples/test_cifar10_resume.py::test_a_checkpoint_that_is_no_longer_one[empty]",
    ),
    Bug(
        "a damaged checkpoint stays in the way",
        "examples/cifar10/train.py",
        "        checkpoints.remove(damaged)\n",
        "",
        "examples/test_cifar10_resume.py::test_resumed_beside_a_damaged_checkpoint_it_ends_with_the_same_bits_and_figures",
    ),
    Bug(
        "figures are not rewound before the first checkpoint",
        "examples/cifar10/train.py",
        "        watch.rewind(done)",
        "        watch.rewind(done) if done else None",
        "examples/test_cifar10_resume.py::test_stopped_before_the_first_checkpoint_it_writes_no_figure_twice",
    ),
    Bug(
        "a SIGTERM forgets the epoch's losses so far",
        "examples/cifar10/train.py",
        "                    checkpoints.save(done, state, totals)\n                raise",
        "                    checkpoints.save(done, state, np.zeros(2))\n                raise",
        "examples/test_cifar10_resume.py::test_after_a_sigterm_the_step_is_saved_and_the_command_that_is_told_goes_on[1-saved0]",
    ),
    Bug(
        "Ctrl-C in the middle of a save",
        "examples/cifar10/stop.py",
        "signal.signal(signal.SIGINT, lambda *_: came.append(True))",
        "signal.getsignal(signal.SIGINT)",
        "examples/test_cifar10_resume.py::test_ctrl_c_in_a_save_waits_until_it_is_whole",
    ),
    Bug(
        "a full disk keeps what is half-written",
        "examples/cifar10/checkpoint.py",
        "                self.clear()  # what",
        "                # what",
        "examples/test_cifar10_resume.py::test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before",
    ),
    Bug(
        "an id that two processes have is obeyed for ever",
        "examples/cifar10/hosts.py",
        "    if twice := TWICE.search(dump):",
        "    if twice := None:",
        "examples/test_cifar10_hosts.py::test_a_parent_says_in_a_line_how_its_child_has_ended[twice]",
    ),
    Bug(
        "a frozen process 0 is a crash of ours",
        "examples/cifar10/hosts.py",
        "    leader = LEADER in dump or FROZEN.search(dump)",
        "    leader = LEADER in dump",
        "examples/test_cifar10_hosts.py::test_a_parent_says_in_a_line_how_its_child_has_ended[frozen]",
    ),
    Bug(
        "a slow answer is waited for",
        "examples/cifar10/download.py",
        "answer.read1(min(",
        "answer.read(min(",
        "examples/test_cifar10_data.py::test_a_slow_answer_is_left_in_time_and_an_endless_one_at_the_length_of_the_archive[5.0-6]",
    ),
    Bug(
        "a page of no length is written over the partial file",
        "examples/cifar10/download.py",
        "    if announced != str(length):",
        "    if announced and announced != str(length):",
        "examples/test_cifar10_data.py::test_a_page_of_no_known_length_is_refused_and_what_is_there_is_kept[True-None]",
    ),
    Bug(
        "a link is written through",
        "examples/cifar10/download.py",
        "    if part.is_symlink() or (",
        "    if (",
        "examples/test_cifar10_data.py::test_a_part_that_is_no_file_of_ours_is_not_followed[link]",
    ),
    Bug(
        "a data file that was cut is read as noise",
        "examples/cifar10/data.py",
        "if file.readinto(planes[at]) < RECORD - 1:",
        "if file.readinto(planes[at]) < 0:",
        "examples/test_cifar10_data.py::test_a_file_that_is_cut_while_its_images_are_read_is_named",
    ),
    Bug(
        "all processes write",
        "jaxbn/writers/_log.py",
        "self.writers = list(writers) if jax.process_index() == 0 else []",
        "self.writers = list(writers)",
        "writers/test_writers.py::test_only_the_first_process_writes_and_all_agree_when",
    ),
    Bug(
        "a cut record stays",
        "jaxbn/writers/_writer.py",
        "            os.truncate(path, size)",
        "            pass",
        "writers/test_writers.py::test_what_a_full_disk_cuts_off_is_taken_back[jsonl]",
    ),
    Bug(
        "a scrape may last for ever",
        "jaxbn/writers/_prometheus.py",
        "if time.monotonic() - start > PATIENCE:",
        "if time.monotonic() < start:",
        "writers/test_writers.py::test_a_scrape_that_never_ends_is_ended",
    ),
    Bug(
        "names as they are in labels",
        "jaxbn/writers/_writer.py",
        'names = distinct(printable(layer) or "." for layer in of_layers)',
        'names = [layer or "." for layer in of_layers]',
        "writers/test_writers.py::test_names_that_no_encoding_has_are_shown_as_escapes",
    ),
    Bug(
        "a URL of IPv6 without brackets",
        "jaxbn/writers/_prometheus.py",
        'host = f"[{address}]" if ":" in address else address',
        "host = address",
        "writers/test_writers.py::test_prometheus_serves_at_an_address_of_ipv6",
    ),
    Bug(
        "a verdict is no record",
        "jaxbn/writers/_log.py",
        "if isinstance(records, Drift):",
        "if records is None:",
        "writers/test_writers.py::test_a_verdict_on_served_data_is_written",
    ),
    Bug(
        "characters that a terminal obeys",
        "jaxbn/_text.py",
        "c if c.isprintable() else ascii(c)[1:-1]",
        "c",
        "cli/test_cli.py::test_nothing_that_a_terminal_obeys_is_printed_raw[a report]",
    ),
    Bug(
        "layers of one name are one",
        "jaxbn/_text.py",
        "        while name in seen:",
        "        while name in ():",
        "cli/test_cli.py::test_the_doctor_sees_every_layer[equal names-msgpack]",
    ),
    Bug(
        "lists are not looked into",
        "jaxbn/_checkpoints/nesting.py",
        "    if isinstance(tree, (list, tuple)):",
        "    if isinstance(tree, str):",
        "cli/test_cli.py::test_lists_as_msgpack_has_them_and_layers_in_a_tree_that_was_never_in_a_file",
    ),
    Bug(
        "an optimizer's scales are norms without statistics",
        "jaxbn/_checkpoints/norm_layers.py",
        "            and not any(map(COPIES.fullmatch, path))\n",
        "",
        "cli/test_cli.py::test_scale_and_bias_without_statistics_are_a_finding",
    ),
    Bug(
        "a linen parameter called weight makes a checkpoint PyTorch's",
        "jaxbn/_checkpoints/contents.py",
        "    if set(COLLECTIONS) & set(tree):",
        "    if set(COLLECTIONS) <= set(tree):",
        "checkpoints/test_checkpoints.py::test_the_kind_is_that_of_the_collections_and_then_of_the_names[tree0-linen]",
    ),
    Bug(
        "a name that continues another",
        "jaxbn/_checkpoints/nesting.py",
        "if keys[:n] in arrays), len(keys))",
        "if keys[:n] in ()), len(keys))",
        "cli/test_cli.py::test_names_that_continue_others_are_converted_whole",
    ),
    Bug(
        "sizes are taken as they are declared",
        "jaxbn/_checkpoints/read.py",
        "    if declared > size * COMPRESSION:",
        "    if declared < 0:",
        "checkpoints/test_checkpoints.py::test_what_metadata_declare_is_compared_with_the_bytes_that_are_there[zarr-shape]",
    ),
    Bug(
        "links lead out of the folder",
        "jaxbn/_checkpoints/read.py",
        "if not child.resolve().is_relative_to(root):",
        "if False:",
        "checkpoints/test_checkpoints.py::test_no_link_in_a_folder_leads_out_of_it[zarr]",
    ),
    Bug(
        "two arrays of one name in a file",
        "jaxbn/_checkpoints/write.py",
        '        if (name := ".".join(keys)) in names:',
        '        if (name := ".".join(keys)) in ():',
        "cli/test_cli.py::test_no_array_takes_another_ones_name",
    ),
    Bug(
        "orbax writes in its place at once",
        "jaxbn/_checkpoints/write.py",
        "    with replacing(path) as place:\n",
        "    with replacing(path) as place:\n        place = place if path.suffix else path\n",
        "cli/test_cli.py::test_a_destination_that_fails_leaves_nothing[b]",
    ),
    Bug(
        "a missing package without the line for pip",
        "jaxbn/_extras.py",
        "    except ImportError as error:",
        "    except ZeroDivisionError as error:",
        "cli/test_cli.py::test_a_missing_package_ends_in_the_line_that_installs_it[rich]",
    ),
    Bug(
        "two arrays become one of PyTorch's",
        "jaxbn/convert/_into_torch.py",
        "    refuse(call, twice)\n",
        "",
        "cli/test_cli.py::test_no_array_takes_another_ones_name",
    ),
    Bug(
        "an array may declare more than the file holds",
        "jaxbn/_checkpoints/inputs.py",
        "if math.prod(shape) * dtype.itemsize > size:",
        "if dtype.itemsize > size:",
        "cli/test_gates.py::test_bad_inputs_are_refused_and_nothing_in_them_runs"
        "[more than there is]",
    ),
    Bug(
        "the checksum of a manifest is not compared",
        "jaxbn/export/_manifest.py",
        "        if found != declared:",
        "        if not found:",
        "cli/test_gates.py::test_a_manifest_that_is_not_of_its_file_is_refused",
    ),
    Bug(
        "statistics compared by the mean over channels",
        "jaxbn/_cli/comparison.py",
        "worst = [np.abs(v).max(initial=0) for v in",
        "worst = [np.abs(v).mean() for v in",
        "cli/test_gates.py::test_compare_says_which_layer_differs_and_by_how_much"
        "[batch_stats/bn/mean]",
    ),
    Bug(
        "a model that ends the program ends it well",
        "jaxbn/_cli/commands.py",
        "    except (Exception, SystemExit) as error:",
        "    except Exception as error:",
        "cli/test_cli.py::test_a_model_that_ends_the_program_has_failed[in a batch]",
    ),
    Bug(
        "a count that is no number",
        "jaxbn/_cli/commands.py",
        "(np.isfinite(wide) & (wide >= 0)).all()",
        "wide.size",
        "cli/test_cli.py::test_what_cannot_be_read[nan.msgpack]",
    ),
    Bug(
        "all is well where nothing is folded",
        "jaxbn/_cli/commands.py",
        "return 0 if report.folded else 1",
        "return 0",
        "cli/test_cli.py::test_fold_ends_with_1_where_nothing_is_folded_or_not_well_enough",
    ),
    Bug(
        "the command jaxbn does not find a module beside it",
        "jaxbn/_cli/users_model.py",
        "        sys.path.append(os.getcwd())",
        "        pass",
        "cli/test_cli.py::test_the_users_module_is_found_beside_where_the_command_was_started",
    ),
    Bug(
        "several lines of an error",
        "jaxbn/_cli/commands.py",
        "            lines = lines[:1]",
        "            pass",
        "cli/test_cli.py::test_a_model_of_many_lines_fails_in_one",
    ),
    Bug(
        "no word on what needs a batch",
        "jaxbn/_cli/terminal.py",
        "        console.print(unjudged(rows, momentum), soft_wrap=True)\n",
        "",
        "cli/test_cli.py::test_what_needs_a_batch_is_said_to_be_not_judged",
    ),
    Bug(
        "a narrow terminal drops columns",
        "jaxbn/_cli/terminal.py",
        "console.width = max(given,",
        "console.width = min(given,",
        "cli/test_cli.py::test_a_narrow_terminal_drops_no_column[20]",
    ),
    Bug(
        "warnings are no findings",
        "jaxbn/_cli/commands.py",
        "return 1 if findings else 0",
        "return int(any(f.severity == 'error' for f in findings))",
        "cli/test_cli.py::test_options_change_the_findings",
    ),
)


def place(bug, root=ROOT):
    """The bug's file."""
    return root / bug.file


def occurrences(bug):
    """How often the line to replace stands in its file: once, or the table has rotted."""
    return place(bug).read_text().count(bug.line)


def fails(bug, seed=True):
    """Whether the bug's test fails on a copy of the package, seeded or as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("jaxbn", "tests", "benchmarks", "examples", "docs"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = place(bug, copy)
        text = file.read_text()
        if seed:
            text = text.replace(bug.line, bug.seeded)
        file.write_text(text)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/{bug.test}"]
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1):  # nothing ran: no such test, or no import
        raise RuntimeError(f"{bug.name}: {bug.test} did not run\n{run.stdout}{run.stderr}")
    return run.returncode == 1


def main(names):
    chosen = [bug for bug in BUGS if not names or bug.name in names]
    sound = list(dict.fromkeys(bug.test for bug in chosen))
    first = {bug.test: bug for bug in reversed(chosen)}
    with ThreadPoolExecutor(2) as pool:
        broken = [
            t
            for t, bad in zip(sound, pool.map(lambda t: fails(first[t], False), sound), strict=True)
            if bad
        ]
        width = max(len(bug.name) for bug in chosen)
        print(f"{'seeded bug':{width}}  caught  by")
        missed = 0
        for bug, caught in zip(chosen, pool.map(fails, chosen), strict=True):
            missed += not caught
            print(f"{bug.name:{width}}  {'yes' if caught else 'NO ':6}  {bug.test}", flush=True)
    print(
        f"{len(chosen) - missed} of {len(chosen)} caught; {len(broken)} of {len(sound)} tests "
        f"fail on the package as it is {broken or ''}"
    )
    return int(bool(missed or broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
