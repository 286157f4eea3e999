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
    file: str  # in jaxbn/
    line: str  # as it stands there, once
    seeded: str
    test: str  # in tests/


BUGS = (
    Bug(
        "mean of means, not weighted by count",
        "moments.py",
        "    kind = m.mean.dtype\n    weight",
        "    kind, m = m.mean.dtype, m._replace(count=jnp.ones_like(m.count))\n    weight",
        "test_devices.py::test_devices_equal_one_device_on_the_pooled_batch[shard_map-uneven]",
    ),
    Bug(
        "E[x²] - E[x]²",
        "moments.py",
        "_about(lax.stop_gradient(_pivot(x, axes, mask, n)), ",
        "_about(jnp.zeros_like(_pivot(x, axes, mask, n)), ",
        "test_moments.py::test_variance_does_not_cancel_at_large_means[shape0--1-jit]",
    ),
    Bug(
        "pivot of one row",
        "moments.py",
        "        x = lax.slice_in_dim(x, 0, None, stride, axis=axis)",
        "        x = x[tuple(slice(1 if a in axes.reduced else None) for a in range(x.ndim))]",
        "test_moments.py::test_no_outlier_spoils_the_variance[a saturated pixel first]",
    ),
    Bug(
        "statistics in bfloat16",
        "moments.py",
        "    d = x.astype(pivot.dtype) - axes.expand(pivot)",
        "    d = x - axes.expand(pivot).astype(x.dtype)",
        "test_batch_norm.py::test_training_equals_the_oracle[bfloat16]",
    ),
    Bug(
        "no pivot on TPUs, wherever the means are",
        "moments.py",
        "near = jnp.all(real_product(mean, mean) <= NEAR * var)",
        "near = jnp.bool_(True)",
        "test_at_once.py::test_the_variance_is_right_at_any_mean[False-1000.0]",
    ),
    Bug(
        "on TPUs one channel near 0 speaks for all",
        "moments.py",
        "near = jnp.all(",
        "near = jnp.any(",
        "test_at_once.py::test_one_channel_far_from_0_is_enough_for_the_pivot",
    ),
    Bug(
        "a pivot on TPUs, wherever the means are",
        "moments.py",
        "near = jnp.all(real_product(mean, mean) <= NEAR * var)",
        "near = jnp.bool_(False)",
        "test_at_once.py::test_one_channel_far_from_0_is_enough_for_the_pivot",
    ),
    Bug(
        "a conditional's operands typed unlike",
        "collectives.py",
        'return lax.pcast(v, more, to="varying") if more else v',
        "return v",
        "test_at_once.py::test_devices_decide_for_themselves[True-False-options0-True]",
    ),
    Bug(
        "division by a constant count, rounded twice",
        "moments.py",
        "return lax.optimization_barrier(jnp.where(count > 0, count, 1))",
        "return jnp.where(count > 0, count, 1)",
        "test_moments.py::test_a_constant_channel_is_exact[shape4]",
    ),
    Bug(
        "var clamped with its derivative",
        "moments.py",
        "return var - lax.stop_gradient(jnp.minimum(var, 0))",
        "return jnp.maximum(var, 0)",
        "test_moments.py::test_moments_are_differentiable_to_second_order[of-True]",
    ),
    Bug(
        "one part of a sum left out",
        "sums.py",
        "return sum(rest, first)",
        "return sum(rest[1:], first)",
        "test_sums.py::test_training_equals_the_oracle[conv2d]",
    ),
    Bug(
        "a sum makes its own terms on CPU",
        "sums.py",
        "return jnp.where(lax.optimization_barrier(jnp.bool_(True)), v, 0)",
        "return v",
        "test_sums.py::test_on_cpu_a_sum_is_of_one_array[shape0]",
    ),
    Bug(
        "the two sums on CPU change places",
        "sums.py",
        "return jnp.where(first, 1, jnp.expand_dims(d, ABREAST))",
        "return jnp.where(first, jnp.expand_dims(d, ABREAST), 1)",
        "test_sums.py::test_totals_are_sums_and_affine_their_transpose[shape0--1]",
    ),
    Bug(
        "a float32 copy of dy on CPU",
        "sums.py",
        "y = [(_ones_beside(d) * both).sum(ABREAST) for d in parts]",
        "y = [both[..., 0, :] + d * both[..., 1, :] for d in parts]",
        "test_sums.py::test_on_cpu_nothing_of_the_size_of_x_is_written_but_y_and_dx"
        "[shape1-bfloat16]",
    ),
    Bug(
        "merge forgets the distance of the means",
        "moments.py",
        " + real_product(delta, delta) * (share * (1 - share))",
        "",
        "test_moments.py::test_merge_equals_the_moments_of_both_sets[0]",
    ),
    Bug(
        "epsilon outside the root",
        "normalize.py",
        "return lax.rsqrt(var + epsilon)",
        "return 1 / (lax.sqrt(var) + epsilon)",
        "test_batch_norm.py::test_eval_equals_the_oracle_and_keeps_the_state[dense]",
    ),
    Bug(
        "eval in x's dtype",
        "normalize.py",
        "kind = promote(x.dtype, dtype, rstd.dtype)",
        "kind = promote(x.dtype, dtype)",
        "test_batch_norm.py::test_eval_of_bfloat16_is_rounded_once",
    ),
    Bug(
        "eval keeps x - mean for backward",
        "normalize.py",
        "normalize_lean = jax.checkpoint(normalize, static_argnums=(4, 5))",
        "normalize_lean = normalize",
        "test_derivative.py::test_eval_keeps_x_in_its_own_dtype_and_nothing_where_nothing_trains"
        "[eval_functional-bfloat16]",
    ),
    Bug(
        "a NaN behind the mask is normalized as NaN",
        "normalize.py",
        "d = jnp.where(mask | jnp.isfinite(x), d, 0)",
        "pass",
        "test_batch_norm.py::test_masked_out_cells_never_reach_the_layers_after[nan-True]",
    ),
    Bug(
        "0 times infinity where nothing varies",
        "normalize.py",
        "jnp.where(sum_ == 0, jnp.inf, sum_)",
        "sum_",
        "test_batch_norm.py::test_epsilon_0_gives_bias_where_nothing_varies[True-False]",
    ),
    Bug(
        "sample weights taken for a mask",
        "axes.py",
        "if seen := _other_than_0_and_1(given):",
        "if seen := []:",
        "test_errors.py::test_the_message_says_all[mask of 0.5 in batch_norm]",
    ),
    Bug(
        "x * a + (bias - mean * a)",
        "normalize.py",
        "    y = d * axes.expand(a)",
        "    y = x.astype(kind) * axes.expand(a)\n"
        "    bias = (0 if bias is None else bias.astype(kind)) - mean.astype(kind) * a",
        "test_moments.py::test_a_constant_channel_is_exact[shape4]",
    ),
    Bug(
        "running var biased where unbiased was asked, and the reverse",
        "state.py",
        " if unbiased else moments.var",
        " if not unbiased else moments.var",
        "test_batch_norm.py::test_running_state_follows_its_equation[0.99-False]",
    ),
    Bug(
        "momentum as in PyTorch",
        "state.py",
        "keep = momentum if",
        "keep = 1 - momentum if",
        "test_batch_norm.py::test_running_state_follows_its_equation[0.99-False]",
    ),
    Bug(
        "cumulative average off by one update",
        "state.py",
        "(state.count.astype(old.dtype) + 1)",
        "(state.count.astype(old.dtype) + 2)",
        "test_batch_norm.py::test_running_state_follows_its_equation[None-False]",
    ),
    Bug(
        "cumulative average by a weight near 1",
        "state.py",
        "new = start + (batch - start) / (state.count.astype(old.dtype) + 1)",
        "keep = 1 - 1 / (state.count.astype(old.dtype) + 1)\n"
        "            new = keep * start + (1 - keep) * batch",
        "test_batch_norm.py::test_the_cumulative_average_weighs_each_update_alike[1000000-float32]",
    ),
    Bug(
        "statistics as narrow as they came",
        "state.py",
        "mean, var = (v.astype(wide(v.dtype)) for v in leaves.values())",
        "mean, var = leaves.values()",
        "test_batch_norm.py::test_a_state_stored_narrow_arrives_at_the_truth[0.999-bfloat16]",
    ),
    Bug(
        "a count that wraps",
        "state.py",
        "(learns & (count < jnp.iinfo(count.dtype).max))",
        "learns",
        "test_batch_norm.py::test_a_count_does_not_wrap[0.9-2147483647]",
    ),
    Bug(
        "state updated by NaN",
        "state.py",
        "return jnp.where(learned, new.astype(old.dtype), old)",
        "return new.astype(old.dtype)",
        "test_batch_norm.py::test_a_channel_that_is_not_finite_keeps_its_statistics[float32-nan-0.9]",
    ),
    Bug(
        "state updated by a variance that is not finite",
        "state.py",
        "finite = jnp.isfinite(var)",
        "finite = jnp.isfinite(mean)",
        "test_at_once.py::test_what_is_not_finite_leaves_its_channel[1e+30]",
    ),
    Bug(
        "state updated by what it cannot hold",
        "state.py",
        "finite &= jnp.isfinite(mean)",
        "pass",
        "test_batch_norm.py::test_what_the_state_cannot_hold_is_not_finite",
    ),
    Bug(
        "one channel stops all",
        "state.py",
        "finite = jnp.isfinite(var)",
        "finite = jnp.all(jnp.isfinite(var), keepdims=True)",
        "test_batch_norm.py::test_a_channel_that_is_not_finite_keeps_its_statistics[float32-nan-0.9]",
    ),
    Bug(
        "parts of the features count apart",
        "state.py",
        "if split := varying_axes(state.mean) - varying_axes(count):",
        "if split := ():",
        "test_devices.py::test_parts_of_the_features_agree_on_one_count",
    ),
    Bug(
        "an nnx layer's statistics as narrow as they were",
        "nnx.py",
        "self.var.set_value(state.var)",
        "self.var[...] = state.var",
        "test_nnx.py::test_statistics_stored_narrow_become_float32_in_training_alone[eager]",
    ),
    Bug(
        "recalibrated statistics as narrow as the old ones",
        "layers.py",
        "value.astype(wide(leaf.dtype) if inexact else leaf.dtype)",
        "value.astype(leaf.dtype)",
        "test_recalibrate.py::test_replaced_statistics_are_float32_or_wider",
    ),
    Bug(
        "gradient through the running state",
        "state.py",
        "return jax.tree.map(lax.stop_gradient, new)",
        "return new",
        "test_batch_norm.py::test_no_gradient_flows_through_the_state",
    ),
    Bug(
        "y normalized by the unbiased variance",
        "derivative.py",
        "jnp.where(m.count > 0, rstd(m.var, added), 0)",
        "jnp.where(m.count > 0, rstd(m.var * m.count / (m.count - 1), added), 0)",
        "test_batch_norm.py::test_training_equals_the_oracle[dense]",
    ),
    Bug(
        "dscale times the number of devices",
        "derivative.py",
        "by_d = by_d + r * tparams.scale.astype(kind)",
        "by_d = by_d + r * tparams.scale.astype(kind) * (spec.pool.devices if spec.pool else 1)",
        "test_devices.py::test_devices_equal_one_device_on_the_pooled_batch[pmap-even]",
    ),
    Bug(
        "second sum of backward not pooled",
        "derivative.py",
        "s1, s2 = collectives.total(jnp.stack([s1, s2]), spec.pool)",
        "s1 = collectives.total(s1, spec.pool)",
        "test_devices.py::test_devices_equal_one_device_on_the_pooled_batch[pmap-even]",
    ),
    Bug(
        "mask ignored in backward",
        "derivative.py",
        "d, t = jnp.where(mask, d, 0), jnp.where(mask, t, 0)",
        "d, t = jnp.where(mask, d, d), t",
        "test_derivative.py::test_gradients_equal_the_oracle[padded batch]",
    ),
    Bug(
        "a NaN outside the mask reaches dscale",
        "derivative.py",
        "d = jnp.where(mask | jnp.isfinite(x), d, 0)",
        "pass",
        "test_batch_norm.py::test_masked_out_cells_never_reach_the_statistics_or_a_gradient[nan]",
    ),
    Bug(
        "statistics no longer functions of x in second order",
        "derivative.py",
        "y, m, r = _forward(spec, x, params, mask, epsilon)",
        "y, m, r = _forward(spec, x, params, mask, epsilon); m, r = lax.stop_gradient((m, r))",
        "test_derivative.py::test_derivatives_of_first_and_second_order[masked]",
    ),
    Bug(
        "a traced epsilon has no derivative",
        "derivative.py",
        "s2 + tepsilon.astype(kind) / 2",
        "s2",
        "test_derivative.py::test_derivatives_of_first_and_second_order[traced epsilon]",
    ),
    Bug(
        "x kept for backward in float32",
        "derivative.py",
        "ty, tm = tangent(x, mask,",
        "ty, tm = tangent(x.astype(wide(x.dtype)), mask,",
        "test_derivative.py::test_kept_for_backward_is_x_in_its_own_dtype[plain-bfloat16]",
    ),
    Bug(
        "no rematerialization",
        "derivative.py",
        "jax.checkpoint(functools.partial(_tangent, spec), prevent_cse=False)",
        "functools.partial(_tangent, spec)",
        "test_derivative.py::test_kept_for_backward_is_x_in_its_own_dtype[plain-bfloat16]",
    ),
    Bug(
        "x - mean shared by forward and backward",
        "derivative.py",
        "    mean, a = lax.optimization_barrier((mean, a))\n",
        "",
        "test_derivative.py::test_a_resnet_step_needs_less_memory_than_with_flax[float32-0.7-plain]",
    ),
    Bug(
        "a collective for dscale and one for dbias",
        "derivative.py",
        "by_d, by_1 = collectives.varying(jnp.stack([by_d, by_1]), spec.pool)",
        "pass",
        "test_devices.py::test_collectives_are_one_and_one_as_written",
    ),
    Bug(
        "groups contiguous whatever was asked",
        "collectives.py",
        "    groups = tuple(tuple(int(i) for i in group) for group in axis_index_groups)\n",
        "    groups = tuple(tuple(int(i) for i in group) for group in axis_index_groups)\n"
        "    k = len(groups[0]) if groups else 1\n"
        "    groups = tuple(tuple(range(i, i + k)) for i in range(0, size, k))\n",
        "test_devices.py::test_groups_equal_one_device_on_each_group[scattered-pmap]",
    ),
    Bug(
        "ghost batches interleaved",
        "functional.py",
        "        return v.reshape(*before, ghosts, v.shape[batch_axis] // ghosts, *after)",
        "        v = v.reshape(*before, v.shape[batch_axis] // ghosts, ghosts, *after)\n"
        "        return v.swapaxes(batch_axis, batch_axis + 1)",
        "test_batch_norm.py::test_ghost_batches_equal_a_loop_over_groups[rows]",
    ),
    Bug(
        "one value per channel let through",
        "axes.py",
        "    if count == 1 and x.size:",
        "    if count < 0:",
        "test_errors.py::test_the_message_says_all[one value per channel]",
    ),
    Bug(
        "no value taken for one",
        "axes.py",
        "    if count == 1 and x.size:",
        "    if count == 1:",
        "test_errors.py::test_one_row_is_no_error_where_it_may_be_right[options4]",
    ),
    Bug(
        "another layer's state taken for a wrong axis",
        "axes.py",
        "if shapes[other] and wrong.keys() == shapes[own].keys():",
        "if False:",
        "test_errors.py::test_the_message_says_all[state of another layer]",
    ),
    Bug(
        "a subtraction taken for an addition",
        "affine.py",
        "sign = 1 if position == 0 else -1",
        "sign = 1",
        "test_fold.py::test_affines_in_any_order_between_reshapes_and_transposes[0]",
    ),
    Bug(
        "what is read twice is folded",
        "rewrite.py",
        "if len(self.readers.get(i, ())) > 1:",
        "if len(self.readers.get(i, ())) > 9:",
        "test_fold.py::test_a_norm_stays_where_its_convolution_is_read_before_it",
    ),
    Bug(
        "an offset behind zero padding",
        "affine.py",
        "if padded and chain.offset.any():",
        "if False:",
        "test_fold.py::test_a_norm_before_padding_stays_unless_its_offset_is_zero",
    ),
    Bug(
        "training mode is folded",
        "jaxprs.py",
        "elif from_rows and not longer_now:",
        "elif False:",
        "test_fold.py::test_what_cannot_be_folded_is_refused[training mode]",
    ),
    Bug(
        "transposed kernels are not flipped",
        "layouts.py",
        "return np.flip(w, tuple(range(w.ndim - 2))).swapaxes(-1, -2)",
        "return w.swapaxes(-1, -2)",
        "test_convert.py::test_transposed_convolutions_of_as_many_inputs_as_outputs[1-False-linen]",
    ),
    Bug(
        "PyTorch's momentum as it is written",
        "convert.py",
        "round(1 - momentum, 12)",
        "momentum",
        "test_convert.py::test_training_goes_on_as_in_pytorch[0.1-True]",
    ),
    Bug(
        "batches of a recalibration weigh alike",
        "recalibrate.py",
        "        both = merge(old.moments, batch)\n",
        "        old = old._replace(moments=old.moments._replace(count=jnp.float32(1)))\n"
        "        both = merge(old.moments, batch._replace(count=jnp.float32(1)))\n",
        "test_recalibrate.py::test_statistics_are_those_of_one_batch_of_all[functional]",
    ),
    Bug(
        "recalibration in eval mode",
        "observe.py",
        "batch_moments(call, lambda _: run(True))",
        "batch_moments(call, lambda _: run(call.train))",
        "test_recalibrate.py::test_statistics_are_those_of_one_batch_of_all[linen]",
    ),
    Bug(
        "a frozen layer trains",
        "freeze.py",
        "return run(call.train and call.path not in chosen), None",
        "return run(call.train), None",
        "test_freeze.py::test_what_is_frozen_is_so_to_the_bit_and_the_rest_moves[linen-flax-all-trainable]",
    ),
    Bug(
        "a few values are called stale",
        "findings.py",
        "rows > 1 and values_of(batch) >= limits.values",
        "rows > 1",
        "test_health.py::test_few_values_are_no_staleness[2]",
    ),
    Bug(
        "narrow statistics are no finding",
        "diagnose.py",
        "if eps <= widest:",
        "if eps < 1:",
        "test_health.py::test_statistics_in_a_narrow_dtype[mean-float16-warning]",
    ),
    Bug(
        "what momentum 1 has counted is called sound",
        "diagnose.py",
        "if count == 0 or initial:",
        "if count == 0 or (count is None and initial):",
        "test_health.py::test_momentum_1_counts_and_learns_nothing[init]",
    ),
    Bug(
        "half of a divergence",
        "findings.py",
        "+ d**2 / v + d**2 / w) / 2",
        "+ d**2 / v) / 2",
        "test_health.py::test_distance_is_the_divergence_of_the_gaussians",
    ),
    Bug(
        "all processes write",
        "writers.py",
        "self.writers = list(writers) if jax.process_index() == 0 else []",
        "self.writers = list(writers)",
        "test_watch.py::test_only_the_first_process_writes_and_all_agree_when",
    ),
    Bug(
        "a cut record stays",
        "formats.py",
        "            os.truncate(path, size)",
        "            pass",
        "test_watch.py::test_what_a_full_disk_cuts_off_is_taken_back[jsonl]",
    ),
    Bug(
        "warnings are no findings",
        "cli.py",
        "return 1 if findings else 0",
        "return int(any(f.severity == 'error' for f in findings))",
        "test_cli.py::test_options_change_the_findings",
    ),
)


def occurrences(bug):
    """How often the line to replace stands in its file: once, or the table has rotted."""
    return (ROOT / "jaxbn" / bug.file).read_text().count(bug.line)


def fails(bug, seed=True):
    """Whether the bug's test fails on a copy of the package, seeded or as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("jaxbn", "tests", "examples", "docs"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / "jaxbn" / bug.file
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
