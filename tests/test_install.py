"""It installs from its sources: with the C++ kernels where there is a compiler, without them where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"win32": "statescan_cpu.dll", "darwin": "libstatescan_cpu.dylib"}.get(sys.platform, "libstatescan_cpu.so")


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return named if named else next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)


def _wheel(folder: Path, **environment: str) -> Path:
    """Builds the wheel as pip does, except that the build tools come from this environment (no network)."""
    pytest.importorskip("scikit_build_core")
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation"),
            *("--wheel-dir", str(folder), "--config-settings", f"build-dir={folder / 'build'}"),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PATH": search, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path, folder: Path) -> dict[str, str]:
    """Unpacks a wheel and returns an environment in which it is the statescan that Python imports."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # -P and an environment without the sources: an editable install's finder must not win.
    return {**os.environ, "PYTHONPATH": str(folder)}


def _run(environment: dict[str, str], code: str) -> str:
    prelude = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__.lower()]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_one_binary_serves_every_python(tmp_path: Path) -> None:
    if _compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    wheel = _wheel(tmp_path)
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        f"statescan/_lib/{LIBRARY}",
        "statescan/py.typed",
        "statescan/data/corpus/moby_dick.txt.xz",
        "statescan/cli/app.py",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]

    installed = tmp_path / "installed"
    environment = _unpack(wheel, installed)
    where = _run(environment, "import statescan.ops._native as n; print(n.library().path); print(n.library().isa)")
    assert Path(where.splitlines()[0]) == installed / "statescan" / "_lib" / LIBRARY

    # The library has no Python and no torch in it: any other Python on this machine loads it too.
    load = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).ss_abi_version())"
    for minor in (11, 12, 13, 14):
        other = shutil.which(f"python3.{minor}")
        if other and subprocess.run([other, "-c", ""], capture_output=True, timeout=30).returncode == 0:
            done = subprocess.run(
                [other, "-c", load, where.splitlines()[0]], capture_output=True, text=True, timeout=30
            )
            assert done.returncode == 0, done.stderr
            assert int(done.stdout) >= 1


def test_without_a_compiler_it_installs_and_names_the_cure(tmp_path: Path) -> None:
    broken = shutil.which("false")
    if broken is None:
        pytest.skip("no command 'false' to stand in for a broken compiler")
    wheel = _wheel(tmp_path, CXX=broken, CC=broken)
    assert wheel.stem.endswith("py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_lib/" in name]

    environment = _unpack(wheel, tmp_path / "installed")
    facts = json.loads(_run(environment, "from statescan.cli import main; main(['doctor', '--json'])"))
    assert facts["cpu_library"]["path"] is None
    assert "C++17 compiler" in facts["cpu_library"]["problem"]
    assert "pip install" in facts["cpu_library"]["problem"]
    assert facts["backends"]["cpu"]["selective_scan"]["runs"] == "torch"
    assert "compiler" in facts["backends"]["cpu"]["selective_scan"]["others"]["cpu"]
    scanned = _run(
        environment,
        "import torch, statescan.ops as ops; t = lambda *s: torch.full(s, 0.5)\n"
        "print(ops.selective_scan(t(1, 5, 3), t(1, 5, 3), -t(3, 2), t(1, 5, 2), t(1, 5, 2)).y.shape)",
    )
    assert "[1, 5, 3]" in scanned
