"""Which backend runs a call, and why each other one does not.

Every op has a literal table here, read top down: the first backend that doesn't refuse the call runs it. A backend is a
module ``statescan.ops.<op>.<module>`` with a function ``refuses(facts) -> str | None`` that names what it lacks and the
cure, or returns None. A backend named by the caller runs or raises; only ``"auto"`` moves on to the next one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from statescan.errors import BackendUnavailableError, ConfigError

__all__ = ["BACKENDS", "Explanation", "Facts", "choose", "explain"]

# op -> backend -> module inside the op's folder, in the order that "auto" reads.
BACKENDS: dict[str, dict[str, str]] = {
    "selective_scan": {
        "cpu": "cpu",
        "cuda": "cuda",
        "triton": "triton_scan",
        "torch": "torch_scan",
        "reference": "reference",
    },
    "selective_state_update": {
        "cpu": "cpu",
        "cuda": "cuda",
        "triton": "triton_update",
        "torch": "torch_update",
        "reference": "reference",
    },
    "causal_conv1d": {
        "cpu": "cpu",
        "cuda": "cuda",
        "triton": "triton_conv",
        "torch": "torch_conv",
        "reference": "reference",
    },
    "causal_conv1d_update": {
        "cpu": "cpu",
        "cuda": "cuda",
        "triton": "triton_conv",
        "torch": "torch_conv",
        "reference": "reference",
    },
    "add_rms_norm": {
        "cpu": "cpu",
        "cuda": "cuda",
        "triton": "triton_norm",
        "torch": "torch_norm",
        "reference": "reference",
    },
    "packed_linear": {"cpu": "cpu", "torch": "torch_linear", "reference": "reference"},
    "linear_cross_entropy": {"cuda": "cuda", "torch": "torch_chunked", "reference": "reference"},
    "mamba_step": {"cpu": "cpu", "cuda": "cuda", "torch": "torch_step", "reference": "reference"},
    "fft_conv": {"torch": "torch_fft", "reference": "reference"},
    "s4d_kernel": {"torch": "vandermonde", "reference": "reference"},
    "s4_kernel": {"torch": "doubling", "cauchy": "cauchy", "reference": "reference"},
}

# op -> folder, where it isn't the op's own name.
_FOLDER = {
    "causal_conv1d_update": "causal_conv1d",
    "add_rms_norm": "add_norm",
    "linear_cross_entropy": "cross_entropy",
    "s4d_kernel": "ssm_kernel",
    "s4_kernel": "ssm_kernel",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a backend decides by: only Python constants, so that torch.compile can evaluate the choice while tracing.

    Args:
        device: device type of the inputs, ``"cpu"``, ``"cuda"``, ``"mps"``.
        dtype: dtype of the activations.
        complex_A: A is complex.
        d_state: state size, 0 for ops without one.
        width: convolution width, 0 for ops without one.
    """

    device: str
    dtype: torch.dtype
    complex_A: bool = False
    d_state: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True)
class Explanation:
    """The backend that runs, and for every backend of the op the reason it is passed over (None: it can run)."""

    op: str
    backend: str
    facts: Facts
    refusals: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.facts.device}, {self.facts.dtype}: runs on '{self.backend}'"]
        for name, refusal in self.refusals.items():
            if name != self.backend:
                if refusal is None and _only_if_named(name, self.facts):
                    refusal = "could run, interpreted and slow; only where it is named"
                lines.append(f"  {name}: {refusal or 'could run; comes later in the order of preference'}")
        return "\n".join(lines)


def _refusal(op: str, backend: str, facts: Facts) -> str | None:
    name = f"statescan.ops.{_FOLDER.get(op, op)}.{BACKENDS[op][backend]}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name:
            raise
        return f"this installation has no module {name}; reinstall statescan"
    return module.refuses(facts)


def _only_if_named(backend: str, facts: Facts) -> bool:
    """On the CPU Triton's kernels are interpreted, for tests: "auto" never takes them there."""
    return backend == "triton" and facts.device == "cpu"


def choose(
    op: str, backend: str, device: str, dtype: torch.dtype, complex_A: bool = False, d_state: int = 0, width: int = 0
) -> str:
    """Name of the backend that runs this call; see `Facts` for the arguments.

    Raises:
        ConfigError: `backend` is not a backend of this op.
        BackendUnavailableError: the named backend can't run this call; the text says why and what helps.
    """
    facts = Facts(device, dtype, complex_A, d_state, width)
    names = BACKENDS[op]
    if backend == "auto":
        for name in names:
            if _refusal(op, name, facts) is None and not _only_if_named(name, facts):
                return name
        raise BackendUnavailableError(f"{op}: no backend can run this call:\n{explain(op, facts)}")
    if backend not in names:
        raise ConfigError(f"{op}: backend must be one of {['auto', *names]}, got {backend!r}")
    refusal = _refusal(op, backend, facts)
    if refusal is not None:
        raise BackendUnavailableError(f"{op}: backend '{backend}' can't run this call: {refusal}")
    return backend


# What torch.compiler.assume_constant_result sets; the decorator itself imports all of torch._dynamo and so doubles the
# time that `import statescan.ops` takes.
choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def explain(op: str, facts: Facts | None = None, **given: Any) -> Explanation:
    """Says which backend ``backend="auto"`` takes for a call, and why each other one is passed over.

    Args:
        op: name of an op, e.g. ``"selective_scan"``.
        facts: what the call looks like; or give its fields as keywords (default: float32 on the CPU, d_state 16).

    Example:
        >>> import statescan
        >>> print(statescan.explain("selective_scan", device="cpu", complex_A=True).backend)
        torch
    """
    if op not in BACKENDS:
        raise ConfigError(f"explain: op must be one of {sorted(BACKENDS)}, got {op!r}")
    if facts is None:
        facts = Facts(**{"device": "cpu", "dtype": torch.float32, "d_state": 16, "width": 4, **given})
    refusals = {name: _refusal(op, name, facts) for name in BACKENDS[op]}
    runs = next((n for n, refusal in refusals.items() if refusal is None and not _only_if_named(n, facts)), "none")
    return Explanation(op, runs, facts, refusals)
