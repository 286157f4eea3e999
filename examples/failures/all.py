"""The table of docs/troubleshooting.md: python examples/failures/all.py --seeds 10"""

from importlib import import_module

import jax
from failure import one_line, several, spread, with_seeds

FAILURES = (
    "batch_of_one",
    "never_updated",
    "tiny_local_batches",
    "high_learning_rate",
    "domain_shift",
    "frozen_at_start",
    "torch_momentum",
    "large_means",
    "padding",
    "tiny_batches",
    "ranks_differ",
    "skewed_shards",
    "converted",
    "drift_alarm",
)
HEAD = "| failure | finding | by | test accuracy | cure | after |\n|---|---|---|---|---|---|"


def row(results):
    """One failure's line: the findings that every seed has, and the spread of accuracy."""
    first = results[0]
    every = set.intersection(*({f.kind for f in result.findings} for result in results))
    kinds = sorted(every, key=[f.kind for f in first.findings].index)
    link = f"[{first.failure}](#{first.failure.lower().replace(' ', '-')})"
    shown = ", ".join(f"`{kind}`" for kind in kinds)
    before, after = (spread([getattr(r, when) for r in results]) for when in ("before", "after"))
    return f"| {link} | {shown} | `{first.call}` | {before} | {first.cure} | {after} |"


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # for the ranks of ranks_differ
    parser = with_seeds(__doc__)
    seeds = parser.parse_args().seeds
    with one_line(parser):
        print(HEAD)
        for name in FAILURES:
            print(row(several(import_module(name).main, seeds)), flush=True)
