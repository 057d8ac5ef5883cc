"""Importing statescan needs torch alone and takes no GPU library in; the rooms keep to their floors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Refuses every import but the standard library's, torch's (with what torch itself requires), numpy's and statescan's,
# and says what was imported and which shared libraries came into the process after torch.
COLD_IMPORT = """
import importlib.metadata, json, re, sys

allowed = set(sys.stdlib_module_names) | {"torch", "torchgen", "functorch", "numpy", "statescan"}
queue = ["torch"]
while queue:
    for line in importlib.metadata.requires(queue.pop()) or []:
        name = re.match(r"[A-Za-z0-9_.-]+", line).group().replace("-", "_").lower()
        if "extra ==" not in line and name not in allowed:
            allowed.add(name)
            try:
                importlib.metadata.requires(name)
                queue.append(name)
            except importlib.metadata.PackageNotFoundError:
                pass
allowed -= {"triton", "cuda"}
refused = []

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and not top.startswith("_"):
            refused.append(name)
            raise ModuleNotFoundError(f"No module named {name!r} (refused by the test)", name=name)

def libraries():
    try:
        with open("/proc/self/maps") as maps:
            return {line.split()[-1] for line in maps if ".so" in line}
    except FileNotFoundError:
        return set()

sys.meta_path.insert(0, Refuse())
import torch
of_torch, refused[:] = libraries(), []
before = set(sys.modules)
for module in MODULES:
    importlib.import_module(module)
print(json.dumps({
    "refused": refused,
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "libraries": sorted(libraries() - of_torch),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def _cold_import(modules: list[str]) -> dict[str, object]:
    import json

    done = subprocess.run(
        [sys.executable, "-c", "import importlib\n" + COLD_IMPORT.replace("MODULES", repr(modules))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("room", ["statescan", "statescan.ops", "statescan.nn", "statescan.models", "statescan.errors"])
def test_a_cold_import_needs_torch_alone(room: str) -> None:
    found = _cold_import([room])
    assert found["refused"] == []
    assert found["cuda"] is False
    gpu = re.compile(r"libcuda|libcudart|libnv|libcublas|libcudnn|libhip|librocm|libtriton")
    assert [library for library in found["libraries"] if gpu.search(library)] == []  # type: ignore[attr-defined]


def test_the_refusal_works() -> None:
    # The test above can fail: the command line needs typer, which is refused here.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import importlib\n" + COLD_IMPORT.replace("MODULES", "['statescan.cli.app']"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "refused by the test" in done.stderr


def test_help_and_version_come_without_torch() -> None:
    code = (
        "import sys\nfrom statescan.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    for arguments in (["--help"], ["--version"], ["train", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, env=_plain_terminal()
        )
        assert done.returncode == 0, done.stderr


def test_the_floors_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    command = str(lint) if lint.exists() else shutil.which("lint-imports")
    if command is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def _plain_terminal() -> dict[str, str]:
    return {**os.environ, "TERM": "dumb", "COLUMNS": "100"}
