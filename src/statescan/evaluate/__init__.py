"""Judging a model: bits per byte of held-out text beside honest yardsticks, and zero-shot tasks."""

from __future__ import annotations

from statescan.evaluate.contexts import ByContext, ContextPoint, Region, read_by_context
from statescan.evaluate.continuations import (
    Likelihood,
    LogitsReader,
    Reader,
    Request,
    StateReader,
    encode_pairs,
)
from statescan.evaluate.likelihood import (
    Evaluation,
    PositionBucket,
    draw_by_position,
    evaluate_tokens,
    row_bits,
    window_bits,
)
from statescan.evaluate.tasks import TASKS, Metric, Question, Task, TaskResult, evaluate_tasks, read_questions
from statescan.evaluate.yardsticks import NGramModel, ngram_bits_per_byte, xz_bits_per_byte

__all__ = [
    "TASKS",
    "ByContext",
    "ContextPoint",
    "Evaluation",
    "Likelihood",
    "LogitsReader",
    "Metric",
    "NGramModel",
    "PositionBucket",
    "Question",
    "Reader",
    "Region",
    "Request",
    "StateReader",
    "Task",
    "TaskResult",
    "draw_by_position",
    "encode_pairs",
    "evaluate_tasks",
    "evaluate_tokens",
    "ngram_bits_per_byte",
    "read_by_context",
    "read_questions",
    "row_bits",
    "window_bits",
    "xz_bits_per_byte",
]
