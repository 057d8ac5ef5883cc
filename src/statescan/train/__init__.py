"""Training on Lightning Fabric: one device or many, replicated or sharded, resumable to the bit."""

from statescan.train.capture import CapturedStep
from statescan.train.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints
from statescan.train.config import DataConfig, RunConfig, TrainConfig, apply_overrides
from statescan.train.loop import Callback, TrainResult, load_run, train
from statescan.train.optim import GuardedAdamW, learning_rate, parameter_groups

__all__ = [
    "Callback",
    "CapturedStep",
    "Checkpoint",
    "DataConfig",
    "GuardedAdamW",
    "RunConfig",
    "TrainConfig",
    "TrainResult",
    "apply_overrides",
    "latest_checkpoint",
    "learning_rate",
    "list_checkpoints",
    "load_run",
    "parameter_groups",
    "train",
]
