"""Models: frozen configurations, presets, and the causal language model."""

from statescan.models.causal_lm import Backbone, BackboneOutput, Block, CausalLM, CausalLMOutput
from statescan.models.config import MambaConfig
from statescan.models.convert import convert
from statescan.models.counters import Flops, flops_per_token, parameter_count, state_bytes
from statescan.models.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Backbone",
    "BackboneOutput",
    "Block",
    "CausalLM",
    "CausalLMOutput",
    "Flops",
    "MambaConfig",
    "convert",
    "flops_per_token",
    "parameter_count",
    "preset",
    "state_bytes",
]
