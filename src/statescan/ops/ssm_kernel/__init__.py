"""Convolution kernels of structured state space models: S4D (diagonal A) and S4 (diagonal plus low rank)."""
