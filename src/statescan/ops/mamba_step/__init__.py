"""One decoding step of a whole Mamba block from packed weights."""

from statescan.ops.mamba_step.api import MambaStepOutput, mamba_step
from statescan.ops.mamba_step.validation import BlockWeights

__all__ = ["BlockWeights", "MambaStepOutput", "mamba_step"]
