"""Writing text: sampling, stopping, the engine, the packed form of a model, and a naive generate kept as the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from statescan.generate.engine import Decoder, Engine, Generation, Piece, Session, generate
from statescan.generate.naive import generate_naive
from statescan.generate.sampling import (
    SamplingParams,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    filtered_logits,
    penalise_repetition,
    sample,
    uniform,
)
from statescan.generate.stopping import Stop, StopMatcher, TextStream

if TYPE_CHECKING:
    from statescan.generate.packed import DecodeState, PackedModel

__all__ = [
    "DecodeState",
    "Decoder",
    "Engine",
    "Generation",
    "PackedModel",
    "Piece",
    "SamplingParams",
    "Session",
    "Stop",
    "StopMatcher",
    "TextStream",
    "filter_min_p",
    "filter_top_k",
    "filter_top_p",
    "filtered_logits",
    "generate",
    "generate_naive",
    "penalise_repetition",
    "sample",
    "uniform",
]


def __getattr__(name: str) -> Any:
    if name in {"DecodeState", "PackedModel"}:
        from statescan.generate import packed

        return getattr(packed, name)
    raise AttributeError(f"module 'statescan.generate' has no attribute '{name}'")
