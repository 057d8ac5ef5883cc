"""``statescan doctor``: what this machine offers, which backend every op runs on, and the cure for what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from typing import Annotated, Any

import typer

from statescan import __version__
from statescan.cli.terminal import command, emit_json, result_console

__all__ = ["doctor", "examine"]

# extra -> what it is for, and the imports that it brings
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("training", ("lightning_fabric", "tensorboard")),
    "hub": ("tokenizer files, the model hub", ("tokenizers", "huggingface_hub")),
    "plot": ("PNG pictures", ("matplotlib",)),
    "zstd": (".zst texts", ("zstandard",)),
    "audio": ("sound files", ("soundfile", "soxr")),
}


@command
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Says what this machine offers: which backend runs each op and why the others don't, and what cures a lack."""
    facts = examine()
    if as_json:
        emit_json(facts)
    else:
        _print(facts)


def examine() -> dict[str, Any]:
    """The facts that `doctor` prints, as plain data."""
    import torch

    from statescan.ops import _native

    reason = _native.unavailable_reason()
    library = None if reason else _native.library()
    return {
        "statescan": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cpu_library": {
            "path": str(library.path) if library else None,
            "isa": library.isa if library else None,
            "problem": reason,
        },
        "gpus": _gpus(),
        "extras": {name: _extra(name) for name in EXTRAS},
        "backends": {device: _backends(device) for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]},
    }


def _gpus() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        return {
            "names": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "problem": None,
        }
    if torch.backends.mps.is_available():
        return {"names": ["Apple GPU (mps)"], "problem": None}
    if torch.version.cuda is None and torch.version.hip is None:
        problem = "this torch is a CPU build (a CUDA build: https://pytorch.org/get-started)"
    else:
        problem = "torch finds no GPU (no device, or no driver: try nvidia-smi)"
    return {"names": [], "problem": problem}


def _extra(name: str) -> dict[str, Any]:
    _, modules = EXTRAS[name]
    packages: dict[str, str | None] = {}
    for module in modules:
        present = importlib.util.find_spec(module) is not None
        try:
            packages[module] = importlib.metadata.version(module.replace("_", "-")) if present else None
        except importlib.metadata.PackageNotFoundError:
            packages[module] = "present"
    missing = [module for module, found in packages.items() if found is None]
    return {
        "packages": packages,
        "missing": missing,
        "install": f"pip install 'statescan[{name}]'" if missing else None,
    }


def _backends(device: str) -> dict[str, Any]:
    from statescan.ops import explain
    from statescan.ops._dispatch import BACKENDS

    table = {}
    for op in BACKENDS:
        explanation = explain(op, device=device)
        table[op] = {
            "runs": explanation.backend,
            "others": {name: why for name, why in explanation.refusals.items() if name != explanation.backend},
        }
    return table


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table

    def lines(title: str) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        console.print(f"\n{title}", style="bold")
        return table

    console = result_console()
    console.print(f"statescan {facts['statescan']}", style="bold")
    torch, library, gpus = facts["torch"], facts["cpu_library"], facts["gpus"]
    machine = lines("Machine")
    machine.add_row("python", f"{facts['python']}  {facts['executable']}")
    machine.add_row("platform", facts["platform"])
    machine.add_row("torch", f"{torch['version']}, {torch['threads']} threads, {torch['cpu_capability']}")
    machine.add_row(
        "C++ kernels", f"{library['isa']}  {library['path']}" if library["path"] else f"absent: {library['problem']}"
    )
    machine.add_row("GPU", ", ".join(gpus["names"]) or f"none: {gpus['problem']}")
    console.print(machine)

    extras = lines("Extras")
    for name, extra in facts["extras"].items():
        found = ", ".join(f"{module} {version}" for module, version in extra["packages"].items() if version)
        lack = f"missing {', '.join(extra['missing'])} ({EXTRAS[name][0]}): {extra['install']}"
        extras.add_row(name, "; ".join(text for text in (found, lack if extra["missing"] else "") if text))
    console.print(extras)

    for device, ops in facts["backends"].items():
        table = lines(f"Backends on {device} (float32, d_state 16, width 4)")
        for op, backends in ops.items():
            others = "; ".join(
                f"{name}: {why or 'could run, comes later in the order'}" for name, why in backends["others"].items()
            )
            table.add_row(op, f"{backends['runs']}   ({others})")
        console.print(table)
