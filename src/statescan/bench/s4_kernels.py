"""Making S4's convolution kernel: ours beside the plain PyTorch way of the published repository, time and memory.

And S4D's kernel and the convolution by FFT, each beside the floor that the machine's memory sets.

``statescan bench s4-kernels``; on a CPU each measurement is made in a process of its own:
``python -m statescan.bench.s4_kernels '{"implementation": "statescan", ...}'``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statescan.bench.costs import Cost
from statescan.bench.gpu import gpu_ceilings, gpu_facts, gpu_samples
from statescan.bench.measure import ceilings, machine_facts, peak_memory_bytes, seconds_per_call
from statescan.errors import ConfigError
from statescan.files import write_json
from statescan.ops import fft_conv, s4_kernel, s4d_kernel
from statescan.ops.hippo import hippo_nplr

__all__ = ["IMPLEMENTATIONS", "least_cost", "naive_s4_kernel", "published_c", "run_s4_kernels", "s4_problem"]

S4D, CONVOLUTION = "statescan s4d_kernel", "statescan fft_conv"
# Ours, with the backend they name; then the plain ways.
_BACKENDS = {
    "statescan": "auto",
    "statescan torch": "torch",
    "statescan cauchy": "cauchy",
    "statescan cauchy_cpu": "cauchy_cpu",
    "statescan cauchy_triton": "cauchy_triton",
    S4D: "auto",
    f"{S4D} triton": "triton",
    f"{S4D} torch": "torch",
    CONVOLUTION: "auto",
}
_ONLY_ON = {"statescan cauchy_cpu": "cpu", "statescan cauchy_triton": "cuda", f"{S4D} triton": "cuda"}
IMPLEMENTATIONS = (*_BACKENDS, "naive Cauchy", "state-spaces/s4")
_BATCH = {"cuda": 8, "cpu": 2}  # sequences of the convolution
_NAMES = ("Lambda", "P", "B", "C", "dt")
_CHANNELS_CHECKED = 4
_D_MODEL = 512
# With a backward pass the plain way holds 42 GiB at that width: beside it, on a CPU, all are measured at a quarter.
_D_MODEL_BESIDE_PEERS = 128
# In the 2-norm, of a kernel in float32 against float64: what a frequency near -1 costs the generating function too.
_MAY_DIFFER = 2e-3


def s4_problem(d_model: int, d_state: int, *, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """An S4 layer's parameters at the start of training: HiPPO-LegS, C random, steps from 0.001 to 0.1.

    Returns:
        Lambda, B, C ``(d_model, d_state / 2)`` and P ``(d_model, d_state / 2, 1)`` in complex64, dt ``(d_model,)``.
    """
    draw = torch.Generator().manual_seed(seed)
    Lambda, P, B, _ = hippo_nplr("legs", d_state)
    half = slice(d_state // 2, None)
    C = torch.view_as_complex(torch.randn(d_model, d_state // 2, 2, generator=draw) * 0.5**0.5)
    dt = torch.exp(torch.empty(d_model).uniform_(-6.907755, -2.302585, generator=draw))
    shared = {"Lambda": Lambda[half], "P": P[half], "B": B[half]}
    problem = {k: v.to(torch.complex64).expand(d_model, *v.shape).contiguous() for k, v in shared.items()}
    return {name: value.to(device) for name, value in {**problem, "C": C, "dt": dt}.items()}


def published_c(problem: dict[str, Tensor], length: int) -> Tensor:
    """``C (I - A_bar^L)``, the parameter that the published code trains in place of C; made once, not timed."""
    from statescan.ops.ssm_kernel.real_form import discrete_real_form

    with torch.no_grad():
        (A_bar, _), rows = discrete_real_form(*(problem[name] for name in _NAMES), discretization="bilinear")
        rows = rows - (rows.unsqueeze(1) @ torch.linalg.matrix_power(A_bar, length)).squeeze(1)
        real, imag = rows.chunk(2, 1)
        return (torch.complex(real, -imag) / 2).to(problem["C"].dtype)


def naive_s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C_end: Tensor, dt: Tensor, length: int) -> Tensor:
    """The kernel by a Cauchy matrix that is written out: a quotient for each state, its conjugate, frequency and sum.

    Written for this benchmark after the equations, with the steps that the published repository takes where neither
    its CUDA extension nor pykeops is installed: four sums (B and P against C and P) over all 2 x states, all at once.

    Args:
        Lambda, P, B, dt: as in `s4_kernel`, P of rank 1.
        C_end: what `published_c` gives.
        length: number of lags.

    Returns:
        ``(d_model, length)``.

    Source: S4, arXiv:2111.00396, algorithm 1.
    """
    k = torch.arange(length // 2 + 1, device=Lambda.device, dtype=torch.float64)
    omega = torch.polar(torch.ones_like(k), -2 * torch.pi / length * k).to(Lambda.dtype)
    z = 2 * (1 - omega) / (1 + omega)
    A = Lambda * dt.unsqueeze(-1)
    right = torch.stack([B, P[..., 0]])
    left = torch.stack([C_end, P[..., 0].conj()])
    v = right.unsqueeze(1) * left.unsqueeze(0) * dt.unsqueeze(-1)  # (2, 2, d_model, states)
    v, A = torch.cat([v, v.conj()], -1), torch.cat([A, A.conj()], -1)
    matrix = v.unsqueeze(-1) / (z - A.unsqueeze(-1))  # (2, 2, d_model, 2 states, frequencies)
    r = matrix.sum(-2)
    spectrum = (r[0, 0] - r[0, 1] * r[1, 0] / (1 + r[1, 1])) * 2 / (1 + omega)
    return torch.fft.irfft(spectrum, n=length)


def _published(file: str, problem: dict[str, Tensor], length: int) -> Callable[[], Tensor]:
    """The repository's own module, from its file models/s4/s4.py, with the problem's numbers in its parameters."""
    spec = importlib.util.spec_from_file_location("published_s4", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"bench s4-kernels: --peer must be the repository's models/s4/s4.py, got {file!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    d_model, states = problem["B"].shape
    made = module.SSMKernelDPLR(
        d_model=d_model, channels=1, l_max=length, d_state=2 * states, n_ssm=d_model, verbose=False, backend="naive"
    ).to(problem["dt"].device)
    with torch.no_grad():
        made(L=length)
        pairs = torch.view_as_real
        made.A_real.copy_(torch.log(-problem["Lambda"].real))
        # It keeps the imaginary part with the other sign: one of each pair is as good as the other.
        made.A_imag.copy_(-problem["Lambda"].imag)
        made.P.copy_(pairs(problem["P"][..., 0]).unsqueeze(0))
        made.B.copy_(pairs(problem["B"]).unsqueeze(0))
        made.inv_dt.copy_(torch.log(problem["dt"]).reshape(made.inv_dt.shape))
        made.C.copy_(pairs(published_c(problem, length)).unsqueeze(0))
    for parameter in made.parameters():
        parameter.requires_grad_()

    def call() -> Tensor:
        return made(L=length)[0][0]

    return call


def least_cost(implementation: str, mode: str, d_model: int, d_state: int, length: int, batch: int) -> Cost:
    """What any way has to move: every input and output once, float32; of S4D's kernel also the product's arithmetic.

    A kernel: its parameters in, ``(d_model, length)`` out; backward that much again (what comes back in, the gradients
    out). The convolution: u and the kernel in, y out; backward dy, u and the kernel in, du and dk out.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        mode: "forward" or "forward+backward".
        d_model, d_state, length: of the kernel.
        batch: sequences of the convolution.
    """
    kernel, sequences = 4.0 * d_model * length, 4.0 * batch * length * d_model
    passes = 2 if mode == "forward+backward" else 1
    if implementation == CONVOLUTION:
        return Cost(bytes=2 * sequences + kernel + (passes - 1) * (3 * sequences + 2 * kernel))
    if implementation.startswith(S4D):  # 2 x states real numbers for each lag; backward once for each factor
        product = 2.0 * d_model * length * d_state
        return Cost(bytes=passes * (kernel + d_model * (3 * 4 * d_state + 4)), flops=product * (1 + 2 * (passes - 1)))
    return Cost(bytes=passes * (kernel + d_model * (4 * 4 * d_state + 4)))


def _subject(job: dict[str, Any], problem: dict[str, Tensor]) -> Callable[[], Tensor]:
    name, length = job["implementation"], job["length"]
    if name == "state-spaces/s4":
        return _published(job["peer"], problem, length)
    leaves = {key: value.clone().requires_grad_() for key, value in problem.items()}
    if name.startswith(S4D):
        return lambda: _s4d(leaves, length, _BACKENDS[name])
    if name == CONVOLUTION:
        u = _sequences(job).to(problem["dt"].device).requires_grad_()
        kernel = _s4d(problem, length).requires_grad_()
        return lambda: fft_conv(u, kernel)
    if name == "naive Cauchy":
        C_end = published_c(problem, length).requires_grad_()
        return lambda: naive_s4_kernel(leaves["Lambda"], leaves["P"], leaves["B"], C_end, leaves["dt"], length)
    return lambda: _ours(leaves, length, _BACKENDS[name])


def _ours(problem: dict[str, Tensor], length: int, backend: str) -> Tensor:
    Lambda, P, B, C, dt = (problem[name] for name in _NAMES)
    return s4_kernel(Lambda, P, B, C, dt, length, backend=backend)


def _s4d(problem: dict[str, Tensor], length: int, backend: str = "auto") -> Tensor:
    """The same system without its low rank."""
    return s4d_kernel(problem["Lambda"], problem["B"], problem["C"], problem["dt"], length, backend=backend)


def _sequences(job: dict[str, Any]) -> Tensor:
    return torch.randn(job["batch"], job["length"], job["d_model"], generator=torch.Generator().manual_seed(2))


def _error(found: Tensor, problem: dict[str, Tensor], job: dict[str, Any]) -> float:
    """Of some channels against float64: powers of the matrix one after the other, the convolution lag by lag."""
    name, length = job["implementation"], job["length"]
    some = torch.linspace(0, len(problem["dt"]) - 1, _CHANNELS_CHECKED).long()
    wide = {k: v.cpu()[some].to(torch.complex128 if v.is_complex() else torch.float64) for k, v in problem.items()}
    if name == CONVOLUTION:
        kernel = _s4d(problem, length).cpu()[some].double()
        truth = fft_conv(_sequences(job)[:1, :, some].double(), kernel, backend="reference")[0].T
        found = found[0].T
    else:
        truth = _s4d(wide, length, "reference") if name.startswith(S4D) else _ours(wide, length, "reference")
    return float(torch.linalg.norm(found.cpu()[some].double() - truth) / torch.linalg.norm(truth))


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """One implementation in one mode, in this process."""
    torch.set_num_threads(job["threads"])
    if job["implementation"] == "ceilings":
        return gpu_ceilings() if job["device"] == "cuda" else ceilings(*([16] if job["quick"] else []))
    device, length = job["device"], job["length"]
    problem = s4_problem(job["d_model"], job["d_state"], device=device)
    subject = _subject(job, problem)
    backward = job["mode"] == "forward+backward"
    shape = (job["batch"], length, job["d_model"]) if job["implementation"] == CONVOLUTION else (job["d_model"], length)
    upward = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)

    def call() -> None:
        if backward:
            subject().backward(upward)
        else:
            with torch.no_grad():
                subject()

    if device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        samples, _, peak = gpu_samples(lambda: call, graph=False, cold=False, repeats=20, max_seconds=job["seconds"])
    else:
        held = _resident_bytes()
        samples = seconds_per_call(call, warmup=1, repeats=7, max_seconds=job["seconds"])
        peak = peak_memory_bytes()
    with torch.no_grad():
        error = _error(subject(), problem, job)
    return {
        "milliseconds": 1e3 * statistics.median(samples),
        "best": 1e3 * min(samples),
        "samples_ms": [1e3 * sample for sample in samples],
        # The gradients themselves, which both ways leave behind, are part of it.
        "peak_memory_bytes": max(0, peak - held),
        "relative_error": error,
        "failure": None if error < _MAY_DIFFER else f"differs from float64 by {error:.1e}",
    }


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return peak_memory_bytes()


def run_s4_kernels(
    *,
    device: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    peers: bool = True,
    peer: Path | None = None,
    only: str | None = None,
    out: Path | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measures the kernel's forward pass, and forward with backward, for each implementation.

    Beside each stands the least time that its bytes take at the machine's own memory rate, measured in the same run.

    Args:
        device: "cuda" or "cpu"; default: the GPU where there is one.
        threads: of the CPU, for all alike.
        quick: a tiny kernel, to see that it runs.
        peers: measure the naive way, and `peer`, too; on a CPU the backward passes then are of a quarter of the width.
        peer: the file models/s4/s4.py of the state-spaces/s4 repository, which is then measured as it is.
        only: names of implementations, or parts of names, separated by commas. A whole name means that one alone.
            Default: all.
        out: a JSON file for the report.
        progress: called with a line for each measurement.

    Returns:
        machine, ceilings, shape, rows, and for each mode under "bars" how many times faster than the plain way ours is,
        and its part of the memory. A row's floors are milliseconds, "bytes" by the memory and "flops" by matrix
        products alone; its ratio is its time over that of the bytes.

    Raises:
        ConfigError: a device or file that is not there, or `only` names no implementation.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"bench s4-kernels: device must be cpu, or cuda where there is a GPU, got {device!r}")
    if peer is not None and not peer.is_file():
        raise ConfigError(f"bench s4-kernels: --peer must be the repository's models/s4/s4.py, got no file '{peer}'")
    threads = threads or torch.get_num_threads()
    shape = {"d_state": 16, "length": 500} if quick else {"d_state": 64, "length": 16384}
    names = [name for name in IMPLEMENTATIONS if _ONLY_ON.get(name, device) == device]
    names = [name for name in names if name in _BACKENDS or (peers and (peer or name != "state-spaces/s4"))]
    if only is not None:
        names = [name for name in names if any(_picks(part, name) for part in only.split(","))]
    if not names:
        raise ConfigError(f"bench s4-kernels: --only must be part of one of {', '.join(IMPLEMENTATIONS)}, got {only!r}")
    shared = {"device": device, "threads": threads, "batch": 2 if quick else _BATCH[device], **shape}
    measure = _ask if device == "cpu" else _try
    limits = measure(shared | {"implementation": "ceilings", "quick": quick})
    rows = []
    for name in names:
        for mode in ("forward", "forward+backward"):
            width = 16 if quick else _D_MODEL
            if not quick and device == "cpu" and mode == "forward+backward" and peers:
                width = _D_MODEL_BESIDE_PEERS
            job = shared | {"implementation": name, "mode": mode, "d_model": width}
            job |= {"peer": str(peer), "seconds": 0.1 if quick else 15.0 if device == "cpu" else 1.0}
            found = measure(job)
            cost = least_cost(name, mode, width, shape["d_state"], shape["length"], shared["batch"])
            found["floors"] = cost.floors(limits, "float32")
            if found["failure"] is None and "bytes" in found["floors"]:
                found["ratio"] = found["milliseconds"] / found["floors"]["bytes"]
            rows.append({"implementation": name, "mode": mode, "d_model": width, **found})
            took = f"{found['milliseconds']:.1f} ms" if found.get("milliseconds") else ""
            progress(f"s4-kernels {name}, {mode}: {found.get('failure') or took}")
    machine = {"device": device, "threads": threads, **machine_facts(), **(gpu_facts() if device == "cuda" else {})}
    shape = shape | {"batch of fft_conv": shared["batch"]}
    report = {"machine": machine, "ceilings": limits, "shape": shape, "rows": rows, "bars": _bars(rows)}
    if out is not None:
        write_json(out, report)
    return report


def _picks(part: str, name: str) -> bool:
    return part == name if part in IMPLEMENTATIONS else part in name


def _try(job: dict[str, Any]) -> dict[str, Any]:
    """A measurement in this process: a GPU's memory is counted from mark to mark."""
    try:
        return _measure(job)
    except (ImportError, RuntimeError) as problem:
        return {"failure": " ".join(f"{type(problem).__name__}: {problem}".split())[:300]}
    finally:
        torch.cuda.empty_cache()


def _ask(job: dict[str, Any]) -> dict[str, Any]:
    """A measurement from a process of its own, so that nobody's memory or thread pool is another's."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    command = [sys.executable, "-m", "statescan.bench.s4_kernels", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("statescan-bench "):
            return json.loads(line.removeprefix("statescan-bench "))
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"failure": reason[:300]}


def _bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over each plain way, where both have figures."""
    good = {(row["implementation"], row["mode"]): row for row in rows if row["failure"] is None}
    bars = []
    for (name, mode), row in good.items():
        ours = good.get(("statescan", mode))
        if name.startswith("statescan") or ours is None:
            continue
        bars.append(
            {
                "mode": mode,
                "beside": name,
                "times_faster": row["milliseconds"] / ours["milliseconds"],
                "part_of_memory": ours["peak_memory_bytes"] / max(1, row["peak_memory_bytes"]),
            }
        )
    return bars


def main() -> None:
    """Measures the job in the arguments and prints one line."""
    print("statescan-bench " + json.dumps(_measure(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
