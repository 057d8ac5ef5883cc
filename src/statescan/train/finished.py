"""Whether the run that lies finished in a folder is the one that is asked for: the same settings, and the same data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from statescan.errors import CheckpointError, ConfigError
from statescan.train.config import build_config
from statescan.train.loop import RUN_FILE

__all__ = ["check_same", "run_status", "weights_digest"]


def run_status(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> str | None:
    """The status of the run in a folder; None where there is none.

    Args:
        folder: of the run.
        config: the dataclasses, by their names in run.json ("model", "train", ...), that those of a finished run must
            be equal to. A field that the run did not know counts as its default. Default: any.
        data: what run.json of a finished run must say of its data, as far as it is named here. Default: anything.

    Raises:
        CheckpointError: a run.json that can't be read, or a finished run with other settings or of other data.
    """
    path = Path(folder) / RUN_FILE
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        status, held = facts["status"], facts["config"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(
            f"reproduce: '{path}' can't be read as a run's facts ({problem}); name another folder, or delete this one"
        ) from None
    if status == "finished":
        wanted = {name: dataclasses.asdict(part) for name, part in (config or {}).items()}
        check_same(path, {name: _as(part, held.get(name)) for name, part in (config or {}).items()}, wanted)
        check_same(path, facts.get("data", {}), data or {}, "data")
    return status


def check_same(path: str | os.PathLike[str], held: Any, wanted: Any, what: str = "settings") -> None:
    """Refuses what an earlier run left behind where it was not the run that is asked for.

    Args:
        path: the file that says so.
        held: what it says, plain values.
        wanted: what it shall say, as far as it is named here; plain values, tuples as JSON's lists.
        what: "settings" or "data", for the message.

    Raises:
        CheckpointError: a value differs: the text names it, and both.
    """
    before = dict(_leaves(json.loads(json.dumps(held))))
    for name, value in _leaves(json.loads(json.dumps(wanted))):
        if name not in before or before[name] != value:
            got = before.get(name, "nothing")
            raise CheckpointError(
                f"reproduce: '{path}' is of a run with other {what} ({name} = {got}, wanted {value}); name another "
                "folder, or delete this one"
            )


def weights_digest(folder: str | os.PathLike[str]) -> str:
    """The SHA-256 of the weights in a model's folder, by which another model would be known as such."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest()


def _as(part: Any, held: Any) -> dict[str, Any]:
    """What a file holds of a dataclass, with the defaults of fields that it does not name."""
    try:
        kind = type(part)
        return dataclasses.asdict(kind.from_dict(held) if hasattr(kind, "from_dict") else build_config(kind, held))
    except (ConfigError, TypeError, AttributeError, KeyError):
        # Of another kind of model, say: then it is other settings, whose names tell.
        return held if isinstance(held, dict) else {}


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, f"{name}.{key}" if name else key)
    else:
        yield name, values
