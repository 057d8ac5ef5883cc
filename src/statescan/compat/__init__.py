"""Other packages' names and signatures, run by this package's ops, layers and models.

`statescan.compat.mamba_ssm` has those of mamba_ssm and causal_conv1d.
"""
