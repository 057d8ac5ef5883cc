"""Judging a model: bits per byte of held-out text, over the position in the context, beside honest yardsticks."""

from __future__ import annotations

from statescan.evaluate.likelihood import Evaluation, PositionBucket, draw_by_position, evaluate_tokens
from statescan.evaluate.yardsticks import NGramModel, ngram_bits_per_byte, xz_bits_per_byte

__all__ = [
    "Evaluation",
    "NGramModel",
    "PositionBucket",
    "draw_by_position",
    "evaluate_tokens",
    "ngram_bits_per_byte",
    "xz_bits_per_byte",
]
