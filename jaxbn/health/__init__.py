"""What is wrong with a checkpoint, a model or the data that a model is served.

`check` and `summary` look at the arrays of the layers, `lint` at how a network is put together.
`gap` runs a model on a batch. `drift` looks at a stream of served data, `serving` at the function
that serves, `shards` at the parts of a batch that devices load. All give `Finding`s, each with a
remedy, by the thresholds in `Limits`. `advise` tells which norm suits a batch.
"""

from jaxbn.health._advise import Advice, advise
from jaxbn.health._check import Row, check, summary
from jaxbn.health._distances import Distance, distance, divergence, initial_share
from jaxbn.health._drift import Drift, LayerDrift, decide, drift
from jaxbn.health._findings import KINDS, Finding, Limits, Setting, worst_first
from jaxbn.health._gap import Gap, LayerGap, gap
from jaxbn.health._layer import of_layer
from jaxbn.health._lint import lint
from jaxbn.health._rows import Seen, incoming, merge, seen
from jaxbn.health._serving import serving
from jaxbn.health._shards import Shards, shards

__all__ = [
    "KINDS",
    "Advice",
    "Distance",
    "Drift",
    "Finding",
    "Gap",
    "LayerDrift",
    "LayerGap",
    "Limits",
    "Row",
    "Seen",
    "Setting",
    "Shards",
    "advise",
    "check",
    "decide",
    "distance",
    "divergence",
    "drift",
    "gap",
    "incoming",
    "initial_share",
    "lint",
    "merge",
    "of_layer",
    "seen",
    "serving",
    "shards",
    "summary",
    "worst_first",
]
