"""Pure functions of tensors, each with a readable reference and faster backends behind one contract.

Importing this room needs torch and numpy alone. `explain` says which backend a call would run on, and why.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from statescan.ops._dispatch import BACKENDS, Explanation, Facts, explain

if TYPE_CHECKING:
    from statescan.ops.add_norm.api import AddNormOutput, add_rms_norm
    from statescan.ops.causal_conv1d.api import ConvOutput, ConvUpdateOutput, causal_conv1d, causal_conv1d_update
    from statescan.ops.cross_entropy.api import linear_cross_entropy
    from statescan.ops.decode_attention.api import decode_attention
    from statescan.ops.fft_conv.api import fft_conv
    from statescan.ops.mamba_step.api import mamba_step
    from statescan.ops.packed_linear.api import PackedWeight, pack_weight, packed_linear
    from statescan.ops.selective_scan.api import ScanOutput, selective_scan
    from statescan.ops.selective_state_update.api import StateUpdateOutput, selective_state_update
    from statescan.ops.ssm_kernel.api import StateResponse, s4_kernel, s4_response, s4d_kernel, s4d_response

__all__ = [
    "BACKENDS",
    "AddNormOutput",
    "ConvOutput",
    "ConvUpdateOutput",
    "Explanation",
    "Facts",
    "PackedWeight",
    "ScanOutput",
    "StateResponse",
    "StateUpdateOutput",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "decode_attention",
    "explain",
    "fft_conv",
    "linear_cross_entropy",
    "mamba_step",
    "pack_weight",
    "packed_linear",
    "s4_kernel",
    "s4_response",
    "s4d_kernel",
    "s4d_response",
    "selective_scan",
    "selective_state_update",
]

# public name -> folder of the op whose api.py has it
_HOME = {
    "AddNormOutput": "add_norm",
    "ConvOutput": "causal_conv1d",
    "ConvUpdateOutput": "causal_conv1d",
    "PackedWeight": "packed_linear",
    "ScanOutput": "selective_scan",
    "StateUpdateOutput": "selective_state_update",
    "add_rms_norm": "add_norm",
    "causal_conv1d": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
    "decode_attention": "decode_attention",
    "fft_conv": "fft_conv",
    "linear_cross_entropy": "cross_entropy",
    "mamba_step": "mamba_step",
    "pack_weight": "packed_linear",
    "packed_linear": "packed_linear",
    "StateResponse": "ssm_kernel",
    "s4_kernel": "ssm_kernel",
    "s4_response": "ssm_kernel",
    "s4d_kernel": "ssm_kernel",
    "s4d_response": "ssm_kernel",
    "selective_scan": "selective_scan",
    "selective_state_update": "selective_state_update",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"statescan.ops.{_HOME[name]}.api"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'statescan.ops' has no attribute '{name}'")


# An op that is named as its folder must be bound now: importing a folder sets the package's attribute to the module,
# and the function has to come last, whichever is asked for first.
for _name, _folder in _HOME.items():
    if _name == _folder:
        __getattr__(_name)
