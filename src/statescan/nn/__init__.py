"""Layers: each has forward (a whole sequence), step (one token) and init_state, all giving the same numbers."""

from statescan.nn.mamba import CausalConv1d, LayerOutput, Mamba, MambaState, StepProjection
from statescan.nn.norm import RMSNorm
from statescan.nn.packing import Packing, pack

__all__ = ["CausalConv1d", "LayerOutput", "Mamba", "MambaState", "Packing", "RMSNorm", "StepProjection", "pack"]
