"""What is measured on either device: the problems, the implementations, and the check before a time is believed.

An output or gradient may be twice as far from float64 as plain PyTorch in the same precision is, plus one rounding: the
budget of the test suites. Peers get four times that; past it they compute something else.
"""

# The peers are no dependency of ours: where they are not installed nothing here is called.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.testing import unit_roundoff

__all__ = [
    "DTYPES",
    "Subject",
    "Verdict",
    "attention",
    "autocast",
    "block",
    "conv",
    "judge",
    "norm",
    "scan",
    "slack",
    "worst",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PEERS_MAY = 4.0
# Where a problem is too large to be done in float64, this many channels of it are.
_CHANNELS_CHECKED = 64
_ELEMENTS_CHECKED = 80e6


class Verdict(NamedTuple):
    """Relative error in the 2-norm, and what the budget allows."""

    error: float
    limit: float


@dataclass
class Subject:
    """One implementation on one problem.

    Args:
        run: computes the outputs from the leaves, with autograd where they require gradients.
        leaves: what gradients are taken for, by name.
        cotangents: gradients of the outputs.
        check: (outputs, gradients by name or None) -> verdicts by name.
        graph: whether a CUDA graph of it can be taken.
        context: what runs around every call (autocast).
    """

    run: Callable[[], tuple[Tensor, ...]]
    leaves: dict[str, Tensor]
    cotangents: tuple[Tensor, ...]
    check: Callable[[tuple[Tensor, ...], Mapping[str, Tensor] | None], dict[str, Verdict]]
    graph: bool = True
    context: Callable[[], Any] = contextlib.nullcontext
    notes: dict[str, Any] = field(default_factory=dict)

    def call(self, mode: str) -> Callable[[], Any]:
        """What is timed: ``"inference"``, ``"forward"``, ``"backward"`` (of a forward pass done once here) or
        ``"forward+backward"``."""
        if mode == "inference":

            def inference() -> None:
                with torch.no_grad(), self.context():
                    self.run()

            return inference
        if mode == "forward":

            def forward() -> None:
                with self.context():
                    self.run()

            return forward
        leaves = list(self.leaves.values())
        if mode == "backward":
            with self.context():
                outputs = self.run()
            return lambda: torch.autograd.grad(outputs, leaves, self.cotangents, retain_graph=True)

        def both() -> None:
            with self.context():
                outputs = self.run()
            torch.autograd.grad(outputs, leaves, self.cotangents)

        return both

    def verdicts(self, mode: str) -> dict[str, Verdict]:
        """Runs it once and judges what came."""
        if mode == "inference":
            with torch.no_grad(), self.context():
                return self.check(self.run(), None)
        with self.context():
            outputs = self.run()
        gradients = None
        if mode != "forward":
            names = list(self.leaves)
            found = torch.autograd.grad(outputs, [self.leaves[n] for n in names], self.cotangents)
            gradients = dict(zip(names, found, strict=True))
        return self.check(tuple(o.detach() for o in outputs), gradients)


def judge(got: Tensor, truth: Tensor, reference: Tensor, slack: float = 1.0) -> Verdict:
    """Holds a result to the budget; all three of one shape, `reference` in the precision of `got`."""
    exact, norm = truth.double(), float(truth.double().norm()) or 1.0
    own = float((reference.double() - exact).norm()) / norm
    return Verdict(float((got.double() - exact).norm()) / norm, slack * 2 * (own + unit_roundoff(got.dtype)))


def worst(verdicts: Mapping[str, Verdict]) -> tuple[str, Verdict]:
    """The verdict nearest to its limit, or past it; a NaN is worse than everything."""
    return max(verdicts.items(), key=lambda kv: kv[1].error / kv[1].limit if kv[1].error == kv[1].error else 1e99)


def _generator(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def slack(implementation: str) -> float:
    """How many times the budget an implementation may use."""
    return 1.0 if implementation.startswith("statescan") else _PEERS_MAY


# ---- selective scan -------------------------------------------------------------------------------------------------

_PER_POSITION = ("u", "dt", "B", "C", "z")


def scan(job: Mapping[str, Any]) -> Subject:
    """``statescan BACKEND``, also ``..., batch invariant``, ``PyTorch loop`` or ``mamba_ssm``.

    Args:
        job: shape (batch, length, d_inner), d_state, gated.
    """
    from statescan.ops import selective_scan

    batch, length, d_inner = job["shape"]
    n, device, dtype, name = job["d_state"], job["device"], DTYPES[job["dtype"]], job["implementation"]
    gated, g = job.get("gated", True), _generator(job["device"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    p: dict[str, Tensor] = {
        "u": normal(batch, length, d_inner),
        # after softplus, steps from 0.0025 to 0.13
        "dt": (torch.rand(batch, length, d_inner, generator=g, device=device) * 4 - 6).to(dtype),
        "A": -torch.arange(1.0, n + 1, device=device).repeat(d_inner, 1),
        "B": normal(batch, length, n),
        "C": normal(batch, length, n),
        "D": torch.randn(d_inner, generator=g, device=device),
        "dt_bias": torch.rand(d_inner, generator=g, device=device) * 0.1,
    }
    if gated:
        p["z"] = normal(batch, length, d_inner)
    cotangent = normal(batch, length, d_inner)
    loose = slack(name)

    def ours(q: Mapping[str, Tensor], backend: str, invariant: bool = False) -> Tensor:
        extra: dict[str, Any] = {k: q.get(k) for k in ("D", "z", "dt_bias")}
        if invariant:
            extra["batch_invariant"] = True
        return selective_scan(q["u"], q["dt"], q["A"], q["B"], q["C"], **extra, dt_softplus=True, backend=backend).y  # pyright: ignore[reportArgumentType]

    theirs = name == "mamba_ssm"
    turn = lambda k, x: x.transpose(1, 2) if theirs and k in _PER_POSITION else x
    leaves = {k: turn(k, v).contiguous().requires_grad_() for k, v in p.items()}
    if theirs:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def run() -> tuple[Tensor, ...]:
            bias = leaves["dt_bias"]
            u, dt, A, B, C = (leaves[k] for k in ("u", "dt", "A", "B", "C"))
            return (selective_scan_fn(u, dt, A, B, C, leaves["D"], leaves.get("z"), bias, delta_softplus=True),)

        graph, cotangents = True, (cotangent.transpose(1, 2).contiguous(),)
    else:
        backend = "reference" if name == "PyTorch loop" else name.split()[1].rstrip(",")
        invariant = name.endswith("batch invariant")
        run, graph, cotangents = (lambda: (ours(leaves, backend, invariant),)), backend != "reference", (cotangent,)

    def check(outputs: tuple[Tensor, ...], gradients: Mapping[str, Tensor] | None) -> dict[str, Verdict]:
        channels = torch.arange(min(d_inner, _CHANNELS_CHECKED), device=device)
        if d_inner > _CHANNELS_CHECKED:
            channels[_CHANNELS_CHECKED // 2 :] += d_inner - _CHANNELS_CHECKED
        fits = batch * length * len(channels) * n <= _ELEMENTS_CHECKED
        rows = slice(None) if fits else slice(0, 1)
        y = outputs[0].transpose(1, 2) if theirs else outputs[0]
        found = {"y": y[rows][..., channels]}
        # dA is a sum over the batch, so it is comparable only where the whole batch is done in float64.
        wanted = tuple(k for k in ("u", "dt", "z", "A") if k in p and (k != "A" or fits))
        problem = (tuple(job["shape"]), n, job["dtype"], gated, device)
        if gradients is not None:
            mine = {k: turn(k, v) for k, v in gradients.items()}
            found |= {f"d {k}": mine[k][channels] if k == "A" else mine[k][rows][..., channels] for k in wanted}
        compare = functools.partial(_compare_scan, ours, p, cotangent, problem, loose=loose)
        verdicts = compare(rows, channels, wanted, found)
        if gradients is not None and float(length) * d_inner * n <= _ELEMENTS_CHECKED:
            # dB and dC are sums over all channels: one row of the batch with every channel.
            every, one = torch.arange(d_inner, device=device), slice(0, 1)
            verdicts |= compare(one, every, ("B", "C"), {f"d {k}": turn(k, gradients[k])[one] for k in ("B", "C")})
        return verdicts

    return Subject(run, leaves, cotangents, check, graph)


# (float64, same precision) of the last problem: every implementation and mode of it is held to the same ones.
_expected: dict[tuple[Any, ...], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}


def _compare_scan(
    ours: Callable[[Mapping[str, Tensor], str], Tensor],
    p: Mapping[str, Tensor],
    cotangent: Tensor,
    problem: tuple[Any, ...],
    rows: slice,
    channels: Tensor,
    wanted: Sequence[str],
    found: Mapping[str, Tensor],
    *,
    loose: float,
) -> dict[str, Verdict]:
    def part(k: str, v: Tensor) -> Tensor:
        if k in ("B", "C"):
            return v[rows]
        return v[rows][..., channels] if k in _PER_POSITION else v[channels]

    @torch.enable_grad()
    def differentiated(dtype: torch.dtype | None) -> dict[str, Tensor]:
        q = {k: part(k, v).detach().to(dtype or v.dtype).contiguous().requires_grad_() for k, v in p.items()}
        y = ours(q, "torch")
        chosen = cotangent[rows][..., channels].to(y.dtype)
        gradients = torch.autograd.grad(y, [q[k] for k in wanted], chosen)
        return {"y": y.detach(), **{f"d {k}": v for k, v in zip(wanted, gradients, strict=True)}}

    key = (*problem, tuple(wanted))
    if key not in _expected:
        for other in [other for other in _expected if other[: len(problem)] != problem]:
            del _expected[other]
        _expected[key] = (differentiated(torch.float64), differentiated(None))
    truth, reference = _expected[key]
    return {k: judge(v, truth[k], reference[k], loose) for k, v in found.items()}


# ---- convolution and norm -------------------------------------------------------------------------------------------


def _whole_check(
    function: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    plain: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    p: Mapping[str, Tensor],
    cotangents: tuple[Tensor, ...],
    loose: float,
    passes: torch.dtype = torch.float64,
) -> Callable[[tuple[Tensor, ...], Mapping[str, Tensor] | None], dict[str, Verdict]]:
    """Judges every output and gradient whole, against `function` in float64 beside `plain` in the same precision.

    `passes`: a dtype that every gradient passes through, and is rounded to (a peer's that takes weights in the
    activations' dtype only).
    """
    extra = 2 * loose * unit_roundoff(passes)

    def check(outputs: tuple[Tensor, ...], gradients: Mapping[str, Tensor] | None) -> dict[str, Verdict]:
        def differentiated(
            of: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]], dtype: torch.dtype | None
        ) -> dict[str, Tensor]:
            q = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in p.items()}
            out = of(q)
            got = {f"output {i}": o.detach() for i, o in enumerate(out)}
            if gradients is not None:
                names = list(gradients)
                given = [c.to(o.dtype) for c, o in zip(cotangents, out, strict=True)]
                found = torch.autograd.grad(out, [q[k] for k in names], given)
                got |= {f"d {k}": v for k, v in zip(names, found, strict=True)}
            return got

        truth, reference = differentiated(function, torch.float64), differentiated(plain, None)
        found = {f"output {i}": o for i, o in enumerate(outputs)}
        found |= {f"d {k}": v for k, v in (gradients or {}).items()}
        judged = {k: judge(v, truth[k], reference[k], loose) for k, v in found.items()}
        return {k: Verdict(error, limit + extra) for k, (error, limit) in judged.items()}

    return check


def conv(job: Mapping[str, Any]) -> Subject:
    """``statescan BACKEND``, ``torch`` (F.conv1d, F.silu) or ``causal_conv1d``; width 4 with bias and SiLU."""
    from statescan.ops import causal_conv1d

    batch, length, d = job["shape"]
    device, dtype, name, g = job["device"], DTYPES[job["dtype"]], job["implementation"], _generator(job["device"])
    p = {
        "x": torch.randn(batch, length, d, generator=g, device=device).to(dtype),
        "weight": torch.randn(d, 4, generator=g, device=device) * 0.5,
        "bias": torch.randn(d, generator=g, device=device) * 0.5,
    }
    cotangent = torch.randn(batch, length, d, generator=g, device=device).to(dtype)

    def ours(q: Mapping[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return (causal_conv1d(q["x"], q["weight"], q["bias"], activation="silu", backend=backend).y,)

    def plain(q: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        x = q["x"]
        padded = F.pad(x.transpose(1, 2), (3, 0))
        out = F.conv1d(padded, q["weight"].to(x.dtype).unsqueeze(1), q["bias"].to(x.dtype), groups=d)
        return (F.silu(out).transpose(1, 2),)

    leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
    if name == "torch":
        run = lambda: plain(leaves)
    elif name == "causal_conv1d":
        from causal_conv1d import causal_conv1d_fn

        def run() -> tuple[Tensor, ...]:
            # It takes (batch, d, length) with d contiguous too, which is our layout seen from the side.
            weight, bias = leaves["weight"].to(dtype), leaves["bias"].to(dtype)
            return (causal_conv1d_fn(leaves["x"].transpose(1, 2), weight, bias, activation="silu").transpose(1, 2),)
    else:
        run = lambda: ours(leaves, name.split()[1])
    theirs = not name.startswith("statescan")
    same = lambda q: ours(q, "torch")
    check = _whole_check(same, same, p, (cotangent,), slack(name), dtype if theirs else torch.float64)
    return Subject(run, leaves, (cotangent,), check)


def norm(job: Mapping[str, Any]) -> Subject:
    """``statescan BACKEND``, ``torch`` or ``torch compiled``: add a float32 residual stream, then RMSNorm."""
    from statescan.ops import add_rms_norm

    batch, length, d = job["shape"]
    device, dtype, name, g = job["device"], DTYPES[job["dtype"]], job["implementation"], _generator(job["device"])
    p = {
        "x": torch.randn(batch, length, d, generator=g, device=device).to(dtype),
        "residual": torch.randn(batch, length, d, generator=g, device=device),
        "weight": 1 + 0.1 * torch.randn(d, generator=g, device=device),
    }
    cotangents = (
        torch.randn(batch, length, d, generator=g, device=device).to(dtype),
        torch.randn(batch, length, d, generator=g, device=device),
    )

    def ours(q: Mapping[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return tuple(add_rms_norm(q["x"], q["weight"], residual=q["residual"], backend=backend))

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = x + residual
        return F.rms_norm(total, (d,), weight, 1e-5).to(x.dtype), total

    leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
    if name.startswith("torch"):
        call: Any = plain
        if "compiled" in name:
            # Its backward may be run again on the same forward pass: it must not reuse the buffers it was given.
            import torch._functorch.config as functorch

            functorch.donated_buffer = False
            call = torch.compile(plain)
        run = lambda: call(leaves["x"], leaves["residual"], leaves["weight"])
    else:
        run = lambda: ours(leaves, name.split()[1])
    check = _whole_check(lambda q: ours(q, "torch"), lambda q: ours(q, "torch"), p, cotangents, slack(name))
    return Subject(run, leaves, cotangents, check)


# ---- attention ------------------------------------------------------------------------------------------------------

_PREFIX = 256


def attention(job: Mapping[str, Any]) -> Subject:
    """torch's causal scaled_dot_product_attention with the backend that the implementation's last word names."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, length, heads, head_dim = job["shape"]
    device, dtype = job["device"], DTYPES[job["dtype"]]
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    chosen = backends[job["implementation"].split()[-1]]
    g = _generator(device)
    shape = (batch, heads, length, head_dim)
    leaves = {k: torch.randn(shape, generator=g, device=device).to(dtype).requires_grad_() for k in ("q", "k", "v")}
    cotangent = torch.randn(shape, generator=g, device=device).to(dtype)

    def run() -> tuple[Tensor, ...]:
        return (F.scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"], is_causal=True),)

    def check(outputs: tuple[Tensor, ...], gradients: Mapping[str, Tensor] | None) -> dict[str, Verdict]:
        # The first positions look at nothing behind them: their outputs and the gradients of their queries are those
        # of the prefix alone.
        def differentiated(precise: bool) -> list[Tensor]:
            cut = [x.detach()[:1, :, :_PREFIX] for x in leaves.values()]
            q, k, v = (x.double() if precise else x for x in cut)
            q.requires_grad_()
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return [out.detach(), *torch.autograd.grad(out, q, cotangent[:1, :, :_PREFIX].to(q.dtype))]

        truth, reference = differentiated(True), differentiated(False)
        found = {"output": (outputs[0][:1, :, :_PREFIX], truth[0], reference[0])}
        if gradients is not None:
            found["d q"] = (gradients["q"][:1, :, :_PREFIX], truth[1], reference[1])
        return {name: judge(*three, _PEERS_MAY) for name, three in found.items()}

    return Subject(run, leaves, (cotangent,), check, context=lambda: sdpa_kernel(chosen))


# ---- one block ------------------------------------------------------------------------------------------------------


def autocast(device: str, dtype: str) -> Callable[[], Any]:
    """bfloat16 autocast where `dtype` says so, else nothing."""
    if dtype == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device, DTYPES[dtype])


def block(job: Mapping[str, Any]) -> Subject:
    """One layer of a language model in training: float32 weights, autocast where dtype is bfloat16.

    Implementations: ``statescan, recompute POLICY``, ``statescan, plain PyTorch`` (the torch backend) and ``mamba_ssm``
    (its Mamba layer, between a norm and an addition of torch's).
    """
    from statescan.models import Block, MambaConfig

    batch, length, d_model = job["shape"]
    device, name = job["device"], job["implementation"]
    policy = name.split()[-1] if "recompute" in name else "none"
    config = MambaConfig(d_model=d_model, n_layer=1, vocab_size=8, recompute=policy)
    torch.manual_seed(0)
    layer: Any = Block(config, backend="torch" if "plain" in name else "auto", device=device)
    context = autocast(device, job["dtype"])
    g = _generator(device)
    x = torch.randn(batch, length, d_model, generator=g, device=device).to(DTYPES[job["dtype"]])
    stream = torch.randn(batch, length, d_model, generator=g, device=device)
    cotangents = (torch.randn(batch, length, d_model, generator=g, device=device).to(x.dtype), torch.randn_like(stream))
    weights = dict(layer.named_parameters())
    leaves = {"x": x.requires_grad_(), "residual": stream.requires_grad_(), **weights}
    if name == "mamba_ssm":
        from mamba_ssm.modules.mamba_simple import Mamba

        theirs = Mamba(d_model, device=device)
        theirs.load_state_dict(layer.mixer.state_dict())
        own = {f"mixer.{k}": v for k, v in theirs.named_parameters()}
        scale = weights["norm.weight"]
        leaves = {"x": x, "residual": stream, "norm.weight": scale, **own}

        def at(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
            total = x + residual
            return theirs(F.rms_norm(total, (d_model,), scale, config.norm_epsilon).to(x.dtype)), total
    else:

        def at(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
            return layer(x, residual)[:2]

    def check(outputs: tuple[Tensor, ...], gradients: Mapping[str, Tensor] | None) -> dict[str, Verdict]:
        """The same layer over the first positions of the first row: the whole would not fit in float64."""
        cut = [t.detach()[:1, :_PREFIX] for t in (x, stream)]
        some = [t[:1, :_PREFIX] for t in cotangents]

        def differentiated(of: Any, parameters: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
            inputs = [t.to(dtype or t.dtype).requires_grad_() for t in cut]
            with contextlib.nullcontext() if dtype else context():
                out = of(inputs[0], inputs[1])[:2]
            got = {"output": out[0].detach()}
            if gradients is not None:
                given = [c.to(o.dtype) for c, o in zip(some, out, strict=True)]
                found = torch.autograd.grad(out, [*inputs, *parameters.values()], given)
                got["d x"] = found[0]
                got["d weights"] = torch.cat([v.double().flatten() for v in found[2:]])
            return got

        results = []
        for dtype in (torch.float64, None):
            twin: Any = Block(config.replace(recompute="none"), backend="torch", device=device, dtype=dtype)
            twin.load_state_dict(layer.state_dict())
            results.append(differentiated(twin, dict(twin.named_parameters()), dtype))
        truth, reference = results
        mine = {k: v for k, v in leaves.items() if k not in ("x", "residual")}
        ordered = {k: mine[k] for k in weights}
        got = differentiated(at, ordered, None)
        judged = {k: judge(v, truth[k], reference[k], slack(name)) for k, v in got.items() if k != "d weights"}
        if "d weights" in got:
            # Gradients of float32 weights carry the activations' roundings, not their own.
            exact = [t["d weights"].to(torch.float32) for t in (got, truth, reference)]
            judged["d weights"] = judge(exact[0], exact[1], exact[2], slack(name))
        # The large run computes the same function; what it gave in those positions is held to the same limit.
        limit = judged["output"].limit
        judged["output, whole"] = Verdict(
            judge(outputs[0][:1, :_PREFIX], truth["output"], truth["output"]).error, limit
        )
        return judged

    def run() -> tuple[Tensor, ...]:
        return at(x, stream)

    # Timed as it runs in training, launch by launch: recomputation saves the random state, which no graph captures.
    return Subject(run, leaves, cotangents, check, graph=False, context=context)
