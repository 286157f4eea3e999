"""Rules by which operations become ONNX operators; jax2onnx lowers what has no rule."""

from jaxbn.export._operators import Rule
from jaxbn.export._patterns import IDENTITIES
from jaxbn.export._rules import axes, contractions, pools, values

RULES: dict[str, Rule] = {
    **dict.fromkeys(IDENTITIES, values.identity),
    **dict.fromkeys(values.BROADCASTING, values.broadcasting),
    **dict.fromkeys(values.VALUE_BY_VALUE, values.value_by_value),
    **dict.fromkeys(("reduce_max", "reduce_min", "reduce_prod"), pools.reduction),
    "broadcast_in_dim": axes.ones,
    "clamp": values.clamp,
    "concatenate": axes.concatenate,
    "conv_general_dilated": contractions.convolution,
    "convert_element_type": values.conversion,
    "dot_general": contractions.dot,
    "max": values.maximum,
    "pad": contractions.pad,
    "reduce_sum": pools.total,
    "reduce_window_max": pools.max_pool,
    "reduce_window_sum": pools.average_pool,
    "reshape": axes.reshape,
    "slice": axes.part,
    "squeeze": axes.ones,
    "transpose": axes.transpose,
}
