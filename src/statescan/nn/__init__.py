"""Layers: each has forward (a whole sequence), step (one token) and init_state, all giving the same numbers."""

from statescan.nn.attention import CausalSelfAttention
from statescan.nn.dilated_conv import DilatedConv
from statescan.nn.embedding import Embedding
from statescan.nn.mamba import CausalConv1d, LayerOutput, Mamba, MambaState, StepProjection, over_its_rms
from statescan.nn.mlp import MLP, GatedMLP
from statescan.nn.norm import LayerNorm, RMSNorm
from statescan.nn.packing import Packing, pack
from statescan.nn.recurrent import GRU, LSTM
from statescan.nn.reverse_complement import ReverseComplement
from statescan.nn.s4 import S4, S4D, LinearLayerOutput

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "S4",
    "S4D",
    "CausalConv1d",
    "CausalSelfAttention",
    "DilatedConv",
    "Embedding",
    "GatedMLP",
    "LayerNorm",
    "LayerOutput",
    "LinearLayerOutput",
    "Mamba",
    "MambaState",
    "Packing",
    "RMSNorm",
    "ReverseComplement",
    "StepProjection",
    "over_its_rms",
    "pack",
]
