"""Other packages' models on statescan's kernels; each module here imports its package only when it is used."""
