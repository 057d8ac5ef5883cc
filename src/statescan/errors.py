"""The errors a user can meet. Each text names the op, the argument, what was wanted, what came, and the cure."""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "ConfigError",
    "DTypeError",
    "DataError",
    "MissingExtraError",
    "ShapeError",
    "StatescanError",
    "TrainingError",
]


class StatescanError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one line and exits with 1."""


class ShapeError(StatescanError, ValueError):
    """A tensor has the wrong shape, length or device."""


class DTypeError(StatescanError, TypeError):
    """A tensor has a dtype that the op does not take."""


class ConfigError(StatescanError, ValueError):
    """A configuration field, preset or option is unknown or out of range."""


class CheckpointError(StatescanError, RuntimeError):
    """A file of weights or training state is missing, cut short, or of another shape."""


class DataError(StatescanError, ValueError):
    """A corpus, tokenizer or token file can't be read or is empty."""


class TrainingError(StatescanError, RuntimeError):
    """A run can't go on: its gradients stay infinite or are no numbers."""


class BackendUnavailableError(StatescanError, RuntimeError):
    """A backend was asked for by name and can't run this call."""


class MissingExtraError(StatescanError, ImportError):
    """An optional dependency is not installed.

    Args:
        feature: what was asked for, e.g. ``"training"``.
        package: the import that failed, e.g. ``"lightning_fabric"``.
        extra: the extra that brings it, e.g. ``"train"``.
    """

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package '{package}', which is not installed; install it with: "
            f"pip install 'statescan[{extra}]'"
        )
