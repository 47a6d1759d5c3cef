"""Python side of the compiled kernels: per op a torch reference, an autograd function, and the choice of kernel."""

from megalite.ops.kernel import available, compiled
from megalite.ops.rope import apply_rope, apply_rope_reference, rope_cos_sin
from megalite.ops.rope_scaling import RopeScaling
from megalite.ops.softmax import causal_softmax, causal_softmax_reference

__all__ = [
    "RopeScaling",
    "apply_rope",
    "apply_rope_reference",
    "available",
    "causal_softmax",
    "causal_softmax_reference",
    "compiled",
    "rope_cos_sin",
]
