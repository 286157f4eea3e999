"""The failures' table, as docs/troubleshooting.md has it: python examples/failures/all.py"""

from importlib import import_module

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
)
HEAD = "| failure | finding | by | test accuracy | cure | after |\n|---|---|---|---|---|---|"


def row(result):
    kinds = ", ".join(f"`{kind}`" for kind in dict.fromkeys(f.kind for f in result.findings))
    link = f"[{result.failure}](#{result.failure.lower().replace(' ', '-')})"
    cells = link, kinds, f"`{result.call}`", f"{result.before:.2f}", result.cure
    return f"| {' | '.join(cells)} | {result.after:.2f} |"


if __name__ == "__main__":
    print(HEAD)
    for name in FAILURES:
        print(row(import_module(name).main()), flush=True)
