"""Checkpoints of a run: written whole or not at all, opened on any number of processes.

``out/checkpoints/step-00000200/`` holds the tensors in torch.distributed.checkpoint's format (each process writes the
shards it owns), ``rank-00000.pt`` ... (random states, one a process), ``trainer.json`` (position and counters) and
``manifest.json`` (every file's size). The folder is written under another name and renamed when all of it is on the
disk; a folder whose files are not as its manifest says is no checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from statescan.errors import CheckpointError
from statescan.files import flush_to_disk

__all__ = ["Checkpoint", "latest_checkpoint", "list_checkpoints", "load_checkpoint", "save_checkpoint"]

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_TRAINER = "trainer.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Checkpoint:
    """A whole checkpoint on the disk: `path` and `step`."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    def trainer_state(self) -> dict[str, Any]:
        """What `save_checkpoint` was given as `trainer`."""
        return json.loads((self.path / _TRAINER).read_text(encoding="utf-8"))


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """The whole checkpoints of a run's folder, oldest first; what was cut short is left out.

    Args:
        folder: the run's folder (the one that holds ``checkpoints/``).
    """
    found = []
    parent = Path(folder) / "checkpoints"
    for path in parent.iterdir() if parent.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and _is_whole(path):
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest whole checkpoint of a run's folder, None where there is none."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def _is_whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        return manifest["format"] == _FORMAT and all(
            (path / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    trainer: dict[str, Any],
    rank_state: dict[str, Any],
    keep: int,
) -> Path:
    """Write one checkpoint; every process of the run calls this together.

    Args:
        folder: the run's folder, on a file system that all processes share.
        step: updates done.
        model: the model, its parameters sharded or not, without a wrapper that changes their names.
        optimizer: its AdamW.
        trainer: what the run needs besides, as JSON takes it; the first process's is written.
        rank_state: what belongs to this process alone, as torch.save takes it.
        keep: how many of the newest checkpoints stay, this one among them.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the system refused to write; older checkpoints are unharmed.
    """
    rank, distributed = _rank()
    parent = Path(folder) / "checkpoints"
    path = parent / f"step-{step:08d}"
    temporary = parent / f".writing-step-{step:08d}"
    with _naming_the_cause(path, temporary, rank):
        if rank == 0:
            _clear(parent)
            temporary.mkdir(parents=True)
        _barrier()
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        with warnings.catch_warnings():
            # It warns that no process group is there, which is what no_dist asks for.
            warnings.simplefilter("ignore")
            save(
                _tensors(model, optimizer),
                storage_writer=FileSystemWriter(temporary, sync_files=True),
                no_dist=not distributed,
            )
        _write(temporary / f"rank-{rank:05d}.pt", lambda stream: torch.save(rank_state, stream))
        _barrier()
        if rank == 0:
            _write(temporary / _TRAINER, lambda stream: stream.write(json.dumps(trainer).encode()))
            files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            manifest = {"format": _FORMAT, "step": step, "files": files}
            _write(temporary / _MANIFEST, lambda stream: stream.write(json.dumps(manifest).encode()))
            flush_to_disk(temporary)
            _remove(path)
            _commit(temporary, path)
            for old in list_checkpoints(folder)[:-keep]:
                _remove(old.path)
        _barrier()
    return path


def _commit(temporary: Path, path: Path) -> None:
    """The moment at which a checkpoint begins to exist."""
    os.rename(temporary, path)
    flush_to_disk(path.parent)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
    """Read a checkpoint into a model and its optimiser, whatever number of processes wrote it.

    Args:
        checkpoint: from `latest_checkpoint`.
        model: of the same shapes, sharded or not.
        optimizer: its AdamW, fresh.

    Returns:
        This process's `rank_state`, None where the checkpoint was written by fewer processes than this one's number.

    Raises:
        CheckpointError: a file is damaged, or the tensors are of other names or shapes.
    """
    rank, distributed = _rank()
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    for parameter in _trained(model).values():
        optimizer.state[parameter] = {
            # Where torch keeps the count: on the device for the fused kernel.
            "step": torch.zeros((), device=parameter.device if optimizer.defaults.get("fused") else "cpu"),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = FileSystemReader(checkpoint.path)
            tensors = _tensors(model, optimizer)
            _check_shapes(checkpoint, tensors, reader.read_metadata().state_dict_metadata)
            load(tensors, storage_reader=reader, no_dist=not distributed)
        mine = checkpoint.path / f"rank-{rank:05d}.pt"
        return torch.load(mine, weights_only=True) if mine.exists() else None
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as problem:  # DCP's is a BaseException
        raise CheckpointError(
            f"resume: {checkpoint.path} can't be read ({_first_line(problem)}); delete it to go on from an older one"
        ) from problem


def random_states() -> dict[str, Any]:
    """The states of every generator of random numbers that training may draw from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        # As a tensor, so that torch.load takes it without running anything from the file.
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the state by a name that does not depend on how it is sharded; tied weights once."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in _trained(model).items():
        for moment in _MOMENTS:
            # A parameter that never had a gradient has no state yet.
            if moment in optimizer.state.get(parameter, {}):
                tensors[f"optimizer.{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


def _check_shapes(checkpoint: Checkpoint, wanted: dict[str, Tensor], saved: dict[str, Any]) -> None:
    if wanted.keys() != saved.keys():
        name = sorted(wanted.keys() ^ saved.keys())[0]
        side = (
            "this run has it, the checkpoint does not" if name in wanted else "the checkpoint has it, this run does not"
        )
        raise CheckpointError(f"resume: {checkpoint.path} is of another model: '{name}': {side}")
    for name, tensor in wanted.items():
        if tuple(saved[name].size) != tuple(tensor.shape):
            raise CheckpointError(
                f"resume: {checkpoint.path}: wanted '{name}' of shape {tuple(tensor.shape)}, "
                f"got {tuple(saved[name].size)}"
            )


def _rank() -> tuple[int, bool]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), True
    return 0, False


def _barrier() -> None:
    if _rank()[1]:
        torch.distributed.barrier()


def _clear(parent: Path) -> None:
    """Remove what an interrupted write or removal left behind."""
    for path in parent.glob(".*-step-*") if parent.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint; it stops being one before its first file goes."""
    if path.exists():
        doomed = path.with_name(f".removing-{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _write(path: Path, write: Any) -> None:
    with open(path, "wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _naming_the_cause(path: Path, temporary: Path, rank: int) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as problem:  # DCP's is a BaseException
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint: could not write {path}: {_first_line(problem)}; older checkpoints are unharmed; "
            "make room or free the folder, then go on with resume"
        ) from problem


def _first_line(problem: BaseException) -> str:
    """The system's own words, from inside the exceptions that wrap them."""
    inner: BaseException | None = problem
    seen = 0
    while inner is not None and seen < 8:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        failures = getattr(inner, "failures", None)
        wrapped = next(iter(failures.values())) if failures else None
        if isinstance(wrapped, tuple):  # DCP keeps (exception, traceback) for each process
            wrapped = wrapped[0]
        inner = wrapped or inner.__cause__ or inner.__context__
        seen += 1
    lines = str(problem).strip().splitlines()
    return lines[-1] if lines else type(problem).__name__
