"""Runs one implementation of one benchmark in this process and prints its measurement as one JSON line.

``python -m statescan.bench.worker '{"bench": "scan", "implementation": "statescan cpu", ...}'``
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from statescan.bench.measure import peak_memory_bytes, seconds_per_call

__all__ = ["main"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Call = Callable[[], Any]


def _relative(got: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - truth) / np.linalg.norm(truth))


# ---- ops ------------------------------------------------------------------------------------------------------------


def _scan_problem(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    batch, length, d_inner, n = *job["shape"], job["d_state"]
    g = torch.Generator().manual_seed(0)
    dtype = _DTYPES[job["dtype"]]
    problem = {
        "u": torch.randn(batch, length, d_inner, generator=g).to(dtype),
        "dt": (torch.rand(batch, length, d_inner, generator=g) * 4 - 6).to(dtype),
        "B": torch.randn(batch, length, n, generator=g).to(dtype),
        "C": torch.randn(batch, length, n, generator=g).to(dtype),
        "z": torch.randn(batch, length, d_inner, generator=g).to(dtype),
        "A": -torch.arange(1.0, n + 1).repeat(d_inner, 1),
        "D": torch.ones(d_inner),
        "dt_bias": torch.zeros(d_inner),
    }
    return problem


def _scan_truth(p: dict[str, torch.Tensor], gated: bool) -> np.ndarray:
    from statescan.ops.selective_scan.api import selective_scan

    q = {k: v[:, :256].double() if v.dim() == 3 else v.double() for k, v in p.items()}
    if not gated:
        q["z"] = q["D"] = None  # type: ignore[assignment]
    u, dt, A, B, C = (q.pop(k) for k in ("u", "dt", "A", "B", "C"))
    return selective_scan(u, dt, A, B, C, **q, dt_softplus=True, backend="reference").y.numpy()  # pyright: ignore[reportArgumentType]


def _scan(job: dict[str, Any]) -> dict[str, Any]:
    from statescan.ops.selective_scan.api import selective_scan

    p, name = _scan_problem(job), job["implementation"]
    backward = job["mode"] == "forward+backward"
    if backward:
        for value in p.values():
            value.requires_grad_()
    extra: dict[str, Any] = {}
    gated = True
    if name.startswith("statescan "):
        backend = name.split()[1]

        def forward() -> torch.Tensor:
            u, dt, A, B, C = (p[k] for k in ("u", "dt", "A", "B", "C"))
            keyed = {k: p[k] for k in ("D", "z", "dt_bias")}
            return selective_scan(u, dt, A, B, C, **keyed, dt_softplus=True, backend=backend).y  # pyright: ignore[reportArgumentType]

    elif name == "llama.cpp ggml":
        from statescan.bench.peers import GgmlScan

        # ggml's kernel does neither D nor the gate: it is given less to do.
        ggml = GgmlScan(p["u"], p["dt"], p["A"], p["B"], p["C"], torch.get_num_threads())
        gated = False

        def forward() -> torch.Tensor:  # type: ignore[misc]
            ggml()
            return torch.empty(0)

        extra["without"] = "D, z"
    elif name.startswith("transformers"):
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan

        def theirs(u, dt, A, B, C, D, z, bias):  # type: ignore[no-untyped-def]
            t = [x.transpose(1, 2) for x in (u, dt, B, C, z)]
            out = mamba_selective_scan(
                t[0],
                t[1],
                A,
                t[2],
                t[3],
                D,
                t[4],
                bias,
                delta_softplus=True,
                use_associative_scan="associative" in name,
                use_mambapy="mambapy" in name,
            )
            out = out[0] if isinstance(out, tuple) else out
            return out if out.shape[1] == u.shape[1] else out.transpose(1, 2)

        run = torch.compile(theirs) if "compile" in name else theirs

        def forward() -> torch.Tensor:  # type: ignore[misc]
            return run(*(p[k] for k in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")))

    else:
        raise ValueError(f"no scan implementation {name!r}")
    gradient = torch.randn(job["shape"], generator=torch.Generator().manual_seed(1)).to(_DTYPES[job["dtype"]])

    def call() -> None:
        if backward:
            for value in p.values():
                value.grad = None
            forward().backward(gradient)
        else:
            with torch.no_grad():
                forward()

    with torch.no_grad():
        first = forward()
        truth = _scan_truth({k: v.detach() for k, v in p.items()}, gated)
        got = ggml.output()[None, :256] if name == "llama.cpp ggml" else first[:, :256].float().numpy()  # pyright: ignore[reportPossiblyUnboundVariable]
    extra["relative_error"] = _relative(got, truth)
    slow = "loop" in name or "associative" in name or "mambapy" in name
    samples = seconds_per_call(call, warmup=1 if slow else 5, repeats=3 if slow else 40, max_seconds=job["max_seconds"])
    return {"samples": samples, **extra}


def _conv(job: dict[str, Any]) -> dict[str, Any]:
    from statescan.ops.causal_conv1d import causal_conv1d

    batch, length, d = job["shape"]
    g = torch.Generator().manual_seed(0)
    dtype, name = _DTYPES[job["dtype"]], job["implementation"]
    backward = job["mode"] == "forward+backward"
    x = torch.randn(batch, length, d, generator=g).to(dtype).requires_grad_(backward)
    w = torch.randn(d, 4, generator=g).requires_grad_(backward)
    b = torch.randn(d, generator=g).requires_grad_(backward)
    gradient = torch.randn(batch, length, d, generator=g).to(dtype)

    def forward() -> torch.Tensor:
        if name.startswith("statescan "):
            return causal_conv1d(x, w, b, activation="silu", backend=name.split()[1]).y
        padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
        out = torch.nn.functional.conv1d(padded, w.to(dtype).unsqueeze(1), b.to(dtype), groups=d)
        return torch.nn.functional.silu(out).transpose(1, 2)

    def call() -> None:
        if backward:
            x.grad = w.grad = b.grad = None
            forward().backward(gradient)
        else:
            with torch.no_grad():
                forward()

    with torch.no_grad():
        truth = causal_conv1d(x.double(), w.double(), b.double(), activation="silu", backend="reference").y
        error = _relative(forward().float().numpy(), truth.numpy())
    return {
        "samples": seconds_per_call(call, warmup=3, repeats=40, max_seconds=job["max_seconds"]),
        "relative_error": error,
    }


def _norm(job: dict[str, Any]) -> dict[str, Any]:
    from statescan.ops.add_norm import add_rms_norm

    batch, length, d = job["shape"]
    g = torch.Generator().manual_seed(0)
    dtype, name = _DTYPES[job["dtype"]], job["implementation"]
    backward = job["mode"] == "forward+backward"
    x = torch.randn(batch, length, d, generator=g).to(dtype).requires_grad_(backward)
    residual = torch.randn(batch, length, d, generator=g).requires_grad_(backward)
    w = torch.randn(d, generator=g).requires_grad_(backward)
    gradient = torch.randn(batch, length, d, generator=g)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        if name.startswith("statescan "):
            out = add_rms_norm(x, w, residual=residual, backend=name.split()[1])
            return out.output, out.residual
        total = x + residual
        return torch.nn.functional.rms_norm(total, (d,), w, 1e-5).to(dtype), total

    def call() -> None:
        if backward:
            x.grad = w.grad = residual.grad = None
            out, total = forward()
            torch.autograd.backward([out, total], [gradient.to(out.dtype), gradient])
        else:
            with torch.no_grad():
                forward()

    with torch.no_grad():
        truth = add_rms_norm(x.double(), w.double(), residual=residual.double(), backend="reference").output
        error = _relative(forward()[0].float().numpy(), truth.numpy())
    return {
        "samples": seconds_per_call(call, warmup=3, repeats=40, max_seconds=job["max_seconds"]),
        "relative_error": error,
    }


# ---- the model ------------------------------------------------------------------------------------------------------


def _model(job: dict[str, Any]) -> Any:
    from statescan.models import CausalLM, preset

    torch.manual_seed(0)
    return CausalLM(preset(job["preset"], recompute=job.get("recompute", "none")))


def _ids(model: Any, rows: int, length: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=g)


def _truth_last(model: Any, ids: torch.Tensor) -> np.ndarray:
    """Last logits by our float32 model on the first positions; the figure that the others are held to."""
    with torch.no_grad():
        return model(ids, logits_to_keep=1).logits[:, -1].float().numpy().astype(np.float64)


def _prefill(job: dict[str, Any]) -> dict[str, Any]:
    name, length = job["implementation"], job["length"]
    model = _model(job)
    ids = _ids(model, 1, length)
    truth = _truth_last(model, ids)
    repeats, warmup = (8, 2)
    result: Callable[[], np.ndarray]
    if name.startswith("statescan"):
        from statescan.generate.packed import PackedModel

        packed = PackedModel(model, dtype=job["dtype"])
        del model

        def call() -> Any:
            return packed.prefill(ids, packed.init_state(1))

        result = lambda: call().float().numpy()
    elif name == "llama.cpp":
        from statescan.bench.peers import LlamaCpp

        llama = LlamaCpp(model, job["kind"], threads=torch.get_num_threads())
        del model
        call = llama.prefill_call(ids[0].numpy())
        warmup = 1
        result = lambda: llama.logits(length - 1)[None]
    elif name.startswith("transformers"):
        from statescan.bench.peers import transformers_model

        theirs = transformers_model(model, mambapy="mambapy" in name).to(_DTYPES[job["dtype"]]).eval()
        del model
        run = torch.compile(theirs) if "compile" in name else theirs
        held: dict[str, np.ndarray] = {}

        def call() -> Any:
            with torch.no_grad():
                held["y"] = run(ids, logits_to_keep=1, use_cache=False).logits[:, -1].float().numpy()

        result, repeats, warmup = (lambda: held["y"]), 2, 1
    elif name.startswith("mambapy"):
        from statescan.bench.peers import mambapy_model

        theirs = mambapy_model(model, pscan="pscan" in name).eval()
        del model

        def call() -> Any:
            with torch.no_grad():
                held["y"] = theirs.last_logits(ids)[:, -1].numpy()

        held = {}
        result, repeats, warmup = (lambda: held["y"]), 2, 1
    else:
        raise ValueError(f"no prefill implementation {name!r}")
    samples = seconds_per_call(call, warmup=warmup, repeats=repeats, max_seconds=job["max_seconds"])
    return {"samples": samples, "relative_error": _relative(result(), truth), "tokens": length}


def _decode(job: dict[str, Any]) -> dict[str, Any]:
    name, rows, count = job["implementation"], job["batch"], job["count"]
    model = _model(job)
    ids = _ids(model, rows, 33)
    prompt, token = ids[:, :32], ids[:, 32]
    truth = _truth_last(model, ids)
    if name.startswith("statescan"):
        from statescan.generate.packed import PackedModel

        packed = PackedModel(model, dtype=job["dtype"])
        del model
        state = packed.init_state(rows)
        packed.prefill(prompt, state)
        got = packed.step(token, state).float().numpy()

        def call() -> Any:
            for _ in range(count):
                packed.step(token, state)

    elif name == "llama.cpp":
        from statescan.bench.peers import LlamaCpp

        llama = LlamaCpp(model, job["kind"], threads=torch.get_num_threads(), sequences=rows)
        del model
        for row in range(rows):
            llama.decode(llama.batch(prompt[row].numpy(), np.arange(32), np.full(32, row), np.zeros(32)))
        every = np.arange(rows)
        llama.decode(llama.batch(token.numpy(), np.full(rows, 32), every, np.ones(rows)))
        got = np.stack([llama.logits(row) for row in range(rows)])
        position = [33]

        def call() -> Any:
            for _ in range(count):
                batch = llama.batch(token.numpy(), np.full(rows, position[0]), every, np.ones(rows))
                llama.decode(batch)
                position[0] += 1
            llama.logits(rows - 1)

    elif name.startswith("transformers"):
        from statescan.bench.peers import transformers_model

        theirs = transformers_model(model).to(_DTYPES[job["dtype"]]).eval()
        del model
        with torch.no_grad():
            cache = theirs(prompt, use_cache=True).cache_params
            got = theirs(token[:, None], cache_params=cache, use_cache=True).logits[:, -1].float().numpy()

        def call() -> Any:
            with torch.no_grad():
                for _ in range(count):
                    theirs(token[:, None], cache_params=cache, use_cache=True)

    else:
        raise ValueError(f"no decode implementation {name!r}")
    samples = seconds_per_call(call, warmup=1, repeats=5, max_seconds=job["max_seconds"])
    return {"samples": samples, "relative_error": _relative(got, truth), "tokens": rows * count}


def _train(job: dict[str, Any]) -> dict[str, Any]:
    name, length = job["implementation"], job["length"]
    model = _model(job)
    ids = _ids(model, 1, length + 1)
    autocast = job["dtype"] == "bfloat16"
    loss_of: Callable[[], torch.Tensor]
    if name.startswith("statescan"):
        trained: torch.nn.Module = model
        loss_of = lambda: model(ids[:, :-1], labels=ids).loss
    elif name.startswith("transformers"):
        from statescan.bench.peers import transformers_model

        trained = transformers_model(model)
        del model
        trained.train()
        run = torch.compile(trained) if "compile" in name else trained

        def loss_of() -> torch.Tensor:
            logits = run(ids[:, :-1], use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:])

    elif name.startswith("mambapy"):
        from statescan.bench.peers import mambapy_model

        trained = mambapy_model(model, pscan="pscan" in name)
        del model

        def loss_of() -> torch.Tensor:
            return torch.nn.functional.cross_entropy(trained(ids[:, :-1])[0].float(), ids[0, 1:])

    else:
        raise ValueError(f"no training implementation {name!r}")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)
    losses = []

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    ours = name.startswith("statescan")
    samples = seconds_per_call(call, warmup=2 if ours else 1, repeats=5 if ours else 2, max_seconds=job["max_seconds"])
    return {"samples": samples, "first_losses": losses[:2], "tokens": length}


_BENCHES = {"scan": _scan, "conv": _conv, "norm": _norm, "prefill": _prefill, "decode": _decode, "train": _train}


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    measured = _BENCHES[job["bench"]](job)
    measured["peak_memory_bytes"] = peak_memory_bytes()
    print("statescan-bench " + json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
