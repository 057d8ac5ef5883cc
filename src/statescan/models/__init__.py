"""Models: frozen configurations, presets, the causal language model, a classifier of sequences."""

from statescan.models.backbone_classifier import BackboneClassifier, BackboneClassifierConfig
from statescan.models.baseline_config import (
    ConvConfig,
    ModelConfig,
    RecurrentConfig,
    S4Config,
    TransformerConfig,
    config_from_dict,
)
from statescan.models.causal_lm import Backbone, BackboneOutput, Block, CausalLM, CausalLMOutput
from statescan.models.classifier import ClassifierConfig, ClassifierOutput, SequenceClassifier
from statescan.models.config import MambaConfig
from statescan.models.convert import convert
from statescan.models.counters import Flops, flops_per_token, parameter_count, state_bytes
from statescan.models.export import ExportedModel, export, flat_state, load_program
from statescan.models.presets import PRESETS, preset
from statescan.models.waveform import WaveformConfig, WaveformModel, WaveformOutput

__all__ = [
    "PRESETS",
    "Backbone",
    "BackboneClassifier",
    "BackboneClassifierConfig",
    "BackboneOutput",
    "Block",
    "CausalLM",
    "CausalLMOutput",
    "ClassifierConfig",
    "ClassifierOutput",
    "ConvConfig",
    "ExportedModel",
    "Flops",
    "MambaConfig",
    "ModelConfig",
    "RecurrentConfig",
    "S4Config",
    "SequenceClassifier",
    "TransformerConfig",
    "WaveformConfig",
    "WaveformModel",
    "WaveformOutput",
    "config_from_dict",
    "convert",
    "export",
    "flat_state",
    "flops_per_token",
    "load_program",
    "parameter_count",
    "preset",
    "state_bytes",
]
