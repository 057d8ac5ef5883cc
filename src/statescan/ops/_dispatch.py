"""Which backend runs a call, and why each other one does not.

Every op has a literal table here, read top down: the first backend that doesn't refuse the call runs it. A backend is a
module ``statescan.ops.<op>.<module>`` with a function ``refuses(facts) -> str | None`` that names what it lacks and the
cure, or returns None. A backend named by the caller runs or raises; only ``"auto"`` moves on to the next one.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from statescan.errors import BackendUnavailableError, ConfigError

__all__ = ["BACKENDS", "Explanation", "Facts", "attempt", "choose", "explain"]

_Result = TypeVar("_Result")

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
    "decode_attention": {"cuda": "cuda", "torch": "torch_attention", "reference": "reference"},
    "fft_conv": {"torch": "torch_fft", "reference": "reference"},
    "s4d_kernel": {"cpu": "cpu", "triton": "triton_vandermonde", "torch": "vandermonde", "reference": "reference"},
    "s4_kernel": {
        "cpu": "cpu_powers",
        "torch": "doubling",
        "cauchy_cpu": "cauchy_cpu",
        "cauchy_triton": "cauchy_triton",
        "cauchy": "cauchy",
        "reference": "reference",
    },
}

# Made of PyTorch's own operators alone, so that forward-mode AD and torch.func's transforms go through them. The others
# are kernels, or an autograd.Function, with a backward pass of their own and nothing else.
_PLAIN = ("torch", "cauchy", "reference")
_NOT_PLAIN = {("selective_scan", "torch"), ("linear_cross_entropy", "torch")}

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
        batch_invariant: a row's result must have the same bits whatever the batch it is in.
        transformed: forward-mode AD or a transform of torch.func (jvp, grad, jacrev, ...) wants a derivative.
    """

    device: str
    dtype: torch.dtype
    complex_A: bool = False
    d_state: int = 0
    width: int = 0
    batch_invariant: bool = False
    transformed: bool = False


# Backends whose kernel for such a call could not be made when it was asked for, and why: "auto" passes them over from
# then on.
_broken: dict[tuple[str, str, Facts], str] = {}


@dataclass(frozen=True, slots=True)
class Explanation:
    """The backend that runs, for every backend of the op the reason it is passed over (None: it can run), and where
    sizes were given, how each backend that decides by them would cut the call."""

    op: str
    backend: str
    facts: Facts
    refusals: dict[str, str | None]
    plans: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.facts.device}, {self.facts.dtype}: runs on '{self.backend}'"]
        for name, refusal in self.refusals.items():
            if name != self.backend:
                if refusal is None and _only_if_named(name, self.facts):
                    refusal = "could run, interpreted and slow; only where it is named"
                lines.append(f"  {name}: {refusal or 'could run; comes later in the order of preference'}")
        for name, text in self.plans.items():
            lines.append(f"  how '{name}' runs it: {text}")
        return "\n".join(lines)


def _module(op: str, backend: str) -> str:
    return f"statescan.ops.{_FOLDER.get(op, op)}.{BACKENDS[op][backend]}"


def _refusal(op: str, backend: str, facts: Facts) -> str | None:
    if (op, backend, facts) in _broken:
        return _broken[op, backend, facts]
    name = _module(op, backend)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name:
            raise
        return f"this installation has no module {name}; reinstall statescan"
    refusal = module.refuses(facts)
    if refusal is None and facts.transformed and not _is_plain(op, backend):
        plain = next(name for name in BACKENDS[op] if _is_plain(op, name))
        return (
            "it has reverse-mode derivatives alone, and forward-mode AD or a transform of torch.func is at work; "
            f"use backend='{plain}'"
        )
    return refusal


def _is_plain(op: str, backend: str) -> bool:
    return backend in _PLAIN and (op, backend) not in _NOT_PLAIN


def _only_if_named(backend: str, facts: Facts) -> bool:
    """On the CPU Triton's kernels are interpreted, for tests: "auto" never takes them there."""
    return backend in ("triton", "cauchy_triton") and facts.device == "cpu"


def _meant_for(backend: str, facts: Facts) -> bool:
    """Whether a backend is one for this kind of device, there or not."""
    return backend not in ("cpu", "cuda") or backend == facts.device


def choose(
    op: str,
    backend: str,
    device: str,
    dtype: torch.dtype,
    complex_A: bool = False,
    d_state: int = 0,
    width: int = 0,
    batch_invariant: bool = False,
    transformed: bool = False,
) -> str:
    """Name of the backend that runs this call; see `Facts` for the arguments.

    Raises:
        ConfigError: `backend` is not a backend of this op.
        BackendUnavailableError: the named backend can't run this call; the text says why and what helps.
    """
    facts = Facts(device, dtype, complex_A, d_state, width, batch_invariant, transformed)
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


def attempt(op: str, backend: str, facts: Facts, run: Callable[[str], _Result]) -> _Result:
    """`run(name)` with the backend that `choose` names. Where "auto" took one whose kernel then can't be made, it warns
    once, with the cause, and goes on to the next.

    Raises:
        ConfigError: `backend` is not a backend of this op.
        BackendUnavailableError: the named backend can't run this call; in a graph that torch.compile made, also "auto".
    """
    asked = (
        facts.device, facts.dtype, facts.complex_A, facts.d_state, facts.width, facts.batch_invariant, facts.transformed
    )  # fmt: skip
    name = choose(op, backend, *asked)
    if backend != "auto" or torch.compiler.is_compiling():
        return run(name)
    while True:
        try:
            return run(name)
        except BackendUnavailableError as problem:
            _broken[op, name, facts] = str(problem)
            passed_over, name = name, choose(op, backend, *asked)
            warnings.warn(
                f"{op}: backend '{passed_over}' is passed over, '{name}' runs instead: {problem}", stacklevel=3
            )


def explain(op: str, facts: Facts | None = None, **given: Any) -> Explanation:
    """Says which backend ``backend="auto"`` takes for a call, and why each other one is passed over.

    Args:
        op: name of an op, e.g. ``"selective_scan"``.
        facts: what the call looks like; or give its fields as keywords (default: float32 on the CPU, d_state 16).
        given: fields of `Facts`; and for ops whose backends cut a call by its sizes, these sizes, for the plan they
            would follow: selective_scan takes batch, length, d_inner, and optionally groups, packed (with cu_seqlens),
            and multiprocessors (default: those of this machine's GPU).

    Example:
        >>> import statescan
        >>> print(statescan.explain("selective_scan", device="cpu", complex_A=True).backend)
        torch
    """
    if op not in BACKENDS:
        raise ConfigError(f"explain: op must be one of {sorted(BACKENDS)}, got {op!r}")
    fields = {k: given.pop(k) for k in list(given) if k in Facts.__dataclass_fields__}
    if facts is None:
        facts = Facts(**{"device": "cpu", "dtype": torch.float32, "d_state": 16, "width": 4, **fields})
    plans = {}
    if given:
        for name in BACKENDS[op]:
            describe = getattr(importlib.import_module(_module(op, name)), "describe", None)
            if describe is not None and _meant_for(name, facts):
                plans[name] = describe(facts, **given)
        if not plans:
            raise ConfigError(f"explain: no backend of {op} on {facts.device} decides by {sorted(given)}; leave it out")
    refusals = {name: _refusal(op, name, facts) for name in BACKENDS[op]}
    runs = next((n for n, refusal in refusals.items() if refusal is None and not _only_if_named(n, facts)), "none")
    return Explanation(op, runs, facts, refusals, plans)
