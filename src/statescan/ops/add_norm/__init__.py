"""Residual addition and RMS normalisation in one pass."""

from statescan.ops.add_norm.api import AddNormOutput, add_rms_norm

__all__ = ["AddNormOutput", "add_rms_norm"]
