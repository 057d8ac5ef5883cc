"""Causal depthwise convolution over time, whole sequences and one token at a time."""

from statescan.ops.causal_conv1d.api import ConvOutput, ConvUpdateOutput, causal_conv1d, causal_conv1d_update

__all__ = ["ConvOutput", "ConvUpdateOutput", "causal_conv1d", "causal_conv1d_update"]
