"""The last projection and the cross-entropy in one, chunk by chunk, so that all logits never exist at once."""

from statescan.ops.cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
