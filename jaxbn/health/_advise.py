"""Which norm suits a batch, and why: `advise`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxbn._op.axes import is_integer
from jaxbn.health._findings import Limits, check_limits

# With so many values the sd is off by 9 %: pooling more changes little (docs/cost-model.md).
PLENTY = 64
SERVING = ("batch", "single")


class Advice(NamedTuple):
    """One norm that suits, and why.

    >>> from jaxbn import health
    >>> best = health.advise(batch_per_device=2, devices=8)[0]
    >>> best.norm, round(best.figure, 3)
    ('synchronized', 0.175)
    """

    norm: str  # "batch", "synchronized", "ghost", "renorm", "group", "layer" or "frozen"
    reason: str
    figure: float  # noise: sd of the batch's sd, over the true sd; 0 where no batch is used
    source: str
    write: str  # the line to write; an nnx model goes in alone: jaxbn.swap(model, to="group")


def advise(
    batch_per_device: int | Sequence[int],
    *,
    devices: int | Mapping[str, int] = 1,
    positions: int = 1,
    recurrent: bool = False,
    pretrained: bool = False,
    serving: str = "batch",
    limits: Limits = Limits(),  # noqa: B008
) -> list[Advice]:
    """The norms that suit a network and its batches, best first.

    Use it before a network is trained, or when `few_values` was found. The choice follows from the
    number n of values behind a channel's statistics: the batch's sd is off by `figure`, which is
    sqrt((n - 1) / n - 2 / n (Γ(n / 2) / Γ((n - 1) / 2))²), near 1 / sqrt(2 n), for n independent
    normal values. docs/advise.md derives it and has the decisions as a table.

    Args:
      batch_per_device: rows on a device; or on each device, where they differ.
      devices: the number of devices that share a batch, or mesh axes → sizes (`dict(mesh.shape)`),
        slowest first.
      positions: independent values that a row gives to a channel: 1 for a dense layer; for a
        convolution more than 1 and fewer than height times width, since neighbours are alike.
      recurrent: whether the norm is called at each step of a sequence.
      pretrained: whether the network has running statistics of a large data set.
      serving: "batch", or "single" where rows are served alone and a norm that folds into a kernel
        is worth more noise in training.
      limits: the thresholds; `values` is read, the n below which statistics are noise.

    Returns:
      A list of `Advice`, at least one.

    Raises:
      ValueError: a number is not a positive integer, serving is unknown, or the sizes are not as
        many as the devices.

    >>> from jaxbn import health
    >>> for advice in health.advise(batch_per_device=2, devices=1):
    ...     print(advice.norm, round(advice.figure, 2), advice.source)
    group 0.0 Wu & He 2018; Qiao et al. 2019
    layer 0.0 Ba et al. 2016
    """
    check_limits("advise", limits)
    axes = dict(devices) if isinstance(devices, Mapping) else {"data": devices}
    each = list(batch_per_device) if isinstance(batch_per_device, Sequence) else [batch_per_device]
    _check(each, axes, positions, serving)
    count = math.prod(axes.values())
    if len(each) == 1:
        each *= count
    if len(each) != count:
        raise ValueError(
            f"advise: batch_per_device has {len(each)} sizes, but there are {count} devices; write "
            f"one size for all, or one for each device."
        )
    fewest, total = min(each) * positions, sum(each) * positions
    # A norm that costs nothing to serve is worth half as many values, or noise of 0.25.
    enough = limits.values // 2 if serving == "single" else limits.values
    folds = " It folds into the kernel before it (jaxbn.fold)." if serving == "single" else ""
    stays = " It stays in what is served." if serving == "single" else ""
    found: list[Advice] = []
    if recurrent:
        found.append(
            Advice(
                "layer",
                "each step of a sequence has statistics of its own, and lengths differ." + stays,
                0.0,
                "Ba et al. 2016",
                'jaxbn.swap(model.apply, variables, "layer")',
            )
        )
    if pretrained and fewest < PLENTY:
        found.append(
            Advice(
                "frozen",
                "the running statistics are of more data than these batches." + folds,
                0.0,
                "He et al. 2016, appendix A",
                "jaxbn.freeze(model.apply, variables)",
            )
        )
    if total >= enough:
        found += _of_batches(each, fewest, total, enough, axes, positions, folds)
    if total < limits.values or fewest < limits.values:
        found.append(
            Advice(
                "group",
                "statistics of one row, whatever the batch; with standardized kernels as good as "
                "batch norm on many rows." + stays,
                0.0,
                "Wu & He 2018; Qiao et al. 2019",
                'jaxbn.swap(model.apply, variables, "group", standardize="*")',
            )
        )
        if 4 <= total < limits.values:
            found.append(
                Advice(
                    "renorm",
                    f"{total} values are few; the running statistics correct those of the batch."
                    + folds,
                    sd_of_sd(total),
                    "Ioffe 2017",
                    "norm(x, renorm=(r_max, d_max))",
                )
            )
        if positions == 1 and not recurrent:
            found.append(
                Advice(
                    "layer",
                    "the features of one row, where there are no positions." + stays,
                    0.0,
                    "Ba et al. 2016",
                    'jaxbn.swap(model.apply, variables, "layer")',
                )
            )
    return found


def _of_batches(
    each: Sequence[int],
    fewest: int,
    total: int,
    enough: int,
    axes: Mapping[str, int],
    positions: int,
    folds: str,
) -> Iterator[Advice]:
    """Batch norm on one device; on several, by each device's rows, by those of some, or of all."""
    if len(each) == 1:
        reason = f"{total} values say enough of the sd.{folds}"
        yield Advice("batch", reason, sd_of_sd(total), IOFFE, "jaxbn.linen.BatchNorm()")
        return
    uneven = len(set(each)) > 1
    ghost = Advice(
        "ghost",
        f"{fewest} values on a device say enough of the sd, and no layer waits for another "
        f"device.{folds}",
        sd_of_sd(fewest),
        "Hoffer et al. 2017",
        f'jaxbn.swap(model.apply, variables, "batch", virtual_batch_size={min(each)})',
    )
    may_be_ghost = not uneven and fewest >= enough
    if may_be_ghost and fewest >= PLENTY:
        yield ghost
    names, devices = _pool(axes, fewest, enough)
    pooled = total if devices == len(each) else fewest * devices
    name = repr(names[0]) if len(names) == 1 else repr(names)
    weights = ", each device weighted by its rows" if uneven else ""
    yield Advice(
        "synchronized",
        f"{fewest} values on a device, {pooled} on {devices} devices{weights}.{folds}",
        sd_of_sd(pooled),
        "Peng et al. 2018",
        f'jaxbn.swap(model.apply, variables, "batch", axis_name={name}); nothing under jit',
    )
    if may_be_ghost and fewest < PLENTY:
        yield ghost


IOFFE = "Ioffe & Szegedy 2015"


def _pool(axes: Mapping[str, int], fewest: int, enough: int) -> tuple[tuple[str, ...], int]:
    """The last of the axes that hold plenty of values together, or all; and their devices."""
    names: tuple[str, ...] = ()
    devices = 1
    for name in reversed(list(axes)):
        names, devices = (name, *names), devices * axes[name]
        if fewest * devices >= max(PLENTY, enough):
            break
    return names, devices


def sd_of_sd(n: int) -> float:
    """The sd of `sqrt(var)` over the true sd, var being the biased one of n normal values.

    n var / sd² is chi² with n - 1 degrees of freedom, and the mean of its root is known.

    >>> from jaxbn.health._advise import sd_of_sd
    >>> [round(sd_of_sd(n), 3) for n in (2, 16, 512)]
    [0.426, 0.175, 0.031]
    """
    if n < 2:
        return 0.0  # sqrt(var) is 0, always
    mean = math.sqrt(2 / n) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))
    return math.sqrt(max((n - 1) / n - mean**2, 0.0))


def _check(each: Sequence[Any], axes: Mapping[str, Any], positions: Any, serving: Any) -> None:
    given = {
        "batch_per_device": each or [0],
        "devices": list(axes.values()) or [0],
        "positions": [positions],
    }
    for name, numbers in given.items():
        for number in numbers:
            if not is_integer(number) or number < 1:
                raise ValueError(
                    f"advise: {name} is {number!r}, expected an integer of at least 1; write "
                    f"health.advise(batch_per_device=32, devices=8)."
                )
    if serving not in SERVING:
        raise ValueError(
            f"advise: serving={serving!r}, expected one of {list(SERVING)}: rows are served "
            f"together, or each alone."
        )
