"""The selective state space layer (S6), as published: names, shapes and initial values of every parameter. And the
layers that the paper compares it with: another block around the inner map, another map, a map that selects less."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.nn.inner_maps import (
    BLOCKS,
    SELECTIVE,
    check_choice,
    initial_A,
    linear_map,
    run_linear,
    selected,
    state_size,
    step_linear,
)
from statescan.nn.packing import pack
from statescan.ops import (
    ConvOutput,
    ConvUpdateOutput,
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_state_update,
)
from statescan.ops._checks import transforms_active
from statescan.ops.mamba_inner import LayerWeights, Normed, mamba_inner, mamba_inner_or_none, unavailable_reason

__all__ = ["CausalConv1d", "LayerOutput", "Mamba", "MambaState", "StepProjection", "is_plain", "over_its_rms"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MambaState(NamedTuple):
    """All that a `Mamba` layer keeps of the tokens it has seen; its size does not grow with their number.

    conv: (batch, d_conv - 1, d_inner), the convolution's last inputs, oldest first.
    ssm: (batch, d_inner, d_state), float32 (float64 for a float64 layer); where states are complex, d_state / 2 of
        them; of inner "none", 0.
    """

    conv: Tensor
    ssm: Tensor


class LayerOutput(NamedTuple):
    """What a layer gives: output, shaped as its input; state after the last token, None unless a state went in."""

    output: Tensor
    state: MambaState | None


class StepProjection(nn.Linear):
    """A linear map from the low-rank step to one step size a channel that leaves its own bias out.

    The bias is a parameter here, named and shaped as published, but the scan adds it, in float32 and right before the
    softplus: that is where the smallest steps (0.001 and less) would be lost to bfloat16. A module that wraps this one
    (a low-rank adapter) is called like any other.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class CausalConv1d(nn.Conv1d):
    """A depthwise causal convolution over (batch, length, channels), with the parameters of a grouped `nn.Conv1d`.

    Args:
        channels: number of channels, each with its own filter.
        width: filter length, >= 1.
        bias: add one number a channel. Default True.
        backend: as in `statescan.ops.causal_conv1d`. Default "auto".
        device: where parameters are made. Default: torch's.
        dtype: of the parameters. Default: torch's.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        bias: bool = True,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            channels, channels, width, groups=channels, padding=width - 1, bias=bias, device=device, dtype=dtype
        )
        self.backend = backend

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        activation: str | None = None,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_final_state: bool = False,
    ) -> ConvOutput:
        """See `statescan.ops.causal_conv1d`; input (batch, length, channels)."""
        return causal_conv1d(
            input,
            self.weight.squeeze(1),
            self.bias,
            activation=activation,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
            backend=self.backend,
        )

    def step(self, input: Tensor, state: Tensor, activation: str | None = None) -> ConvUpdateOutput:
        """See `statescan.ops.causal_conv1d_update`; input (batch, channels)."""
        return causal_conv1d_update(
            input, state, self.weight.squeeze(1), self.bias, activation=activation, backend=self.backend
        )


class _Streams(NamedTuple):
    """in_proj's output apart: x goes into the convolution; then z gates, or v multiplies before the map, q after it."""

    x: Tensor
    z: Tensor | None = None
    q: Tensor | None = None
    v: Tensor | None = None


def _as_complex(pairs: Tensor) -> Tensor:
    """(..., 2) as complex numbers of float32 or float64 parts."""
    real, imaginary = pairs.to(torch.promote_types(pairs.dtype, torch.float32)).unbind(-1)
    return torch.complex(real, imaginary)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Nobody stands between the module's parameters and their use: no wrapper, hook, parametrization or shard."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and all(type(p) in (nn.Parameter, Tensor) for p in module.parameters(recurse=False))
    )


def over_its_rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 (float64 for float64) inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Mamba(nn.Module):
    """The Mamba layer: a gated causal convolution and a selective scan between two projections.

    For every token, with x and z of d_inner channels::

        x, z   = in_proj(input)
        x      = silu(conv1d(x))
        dt,B,C = x_proj(x);   dt = softplus(dt_proj(dt))
        h      = exp(dt A) h + dt B x,      A = -exp(A_log)
        y      = (C . h + D x) * silu(z)
        output = out_proj(y)

    Args:
        d_model: features of input and output.
        d_state: numbers of state a channel. Default 16.
        d_conv: width of the convolution. Default 4.
        expand: d_inner = expand * d_model. Default 2.
        dt_rank: rank of the step projection, or "auto" for ceil(d_model / 16), or "none": the step does not depend on
            the input, as `selective` without "dt". Default "auto".
        dt_min: smallest initial step size. Default 0.001.
        dt_max: largest initial step size. Default 0.1.
        dt_init: initial dt_proj.weight, "random" (uniform) or "constant". Default "random".
        dt_scale: factor on its size, dt_rank^-0.5. Default 1.
        dt_init_floor: initial step sizes are at least this. Default 1e-4.
        conv_bias: the convolution has a bias. Default True.
        bias: in_proj and out_proj have biases. Default False.
        mixer_rms_eps: divide dt (before dt_proj), B and C by their root mean square, with this added to the mean
            square, as FalconMamba does; it has no parameters. Default None: leave them.
        block: what stands around the inner map, see below: "mamba", "h3" or "ungated". Default "mamba".
        inner: the inner map: "s6", the recurrence above; "s4" (diagonal plus low rank, HiPPO-LegS), "s4d" (complex),
            "s4d-real", which don't select and run as convolutions (`statescan.nn.S4`, `S4D`); "none", the identity.
            Default "s6".
        selective: which of "B,C,dt" depend on the input in S6; "none" for no one. What doesn't is a parameter: B and C
            (d_inner, d_state), dt_bias (d_inner,), a step a channel. Default "B,C,dt".
        A_init: A of S6 at the start: "s4d-real", -(n + 1); "constant", -1/2; "random", -exp(N(0, 1)); "s4d-lin",
            -1/2 + n i, complex, with d_state / 2 states that stand for conjugate pairs, B and C complex too. Default
            "s4d-real".
        backend: backend of the convolution and the scan, as in `statescan.ops`; S4's kernels have "torch" and
            "reference" alone and choose themselves under another name. Default "auto".
        device: where parameters are made. Default: torch's.
        dtype: of the parameters; A_log and D stay float32 below it, and so does all of S4. Default: torch's.

    The blocks, with d_inner channels a stream::

        mamba     x, z    = in_proj(input);   y = inner(silu(conv1d(x))) * silu(z)
        ungated   x       = in_proj(input);   y = inner(silu(conv1d(x)))
        h3        q, k, v = in_proj(input);   y = q * inner(conv1d(k) * v)

    Raises:
        ConfigError: an argument is out of range, or arguments don't go together.

    Numerics: A, the step's bias and softplus, and the state are float32 (float64 in a float64 layer) whatever the
    activations are. A complex A runs on the scan's "torch" backend (or "reference"), which is many times slower than
    the kernels for a real one.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), figure 3, algorithm 2
    and section 3.6 (initialisation); parameter names and shapes as in its published code and checkpoints. Its tables 1
    and 6 to 10 for what may be chosen. H3: Fu et al., arXiv:2212.14052, with one head a channel and its shift as a
    short convolution.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        mixer_rms_eps: float | None = None,
        *,
        block: str = "mamba",
        inner: str = "s6",
        selective: str = "B,C,dt",
        A_init: str = "s4d-real",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"Mamba: {name} must be an integer >= 1, got {value!r}; the published layer has 16 and 4"
                )
        if not expand > 0 or int(expand * d_model) < 1:
            raise ConfigError(f"Mamba: expand must be > 0 with expand * d_model >= 1, got {expand!r}; 2 is published")
        if dt_rank not in ("auto", "none") and (not isinstance(dt_rank, int) or dt_rank < 1):
            raise ConfigError(f"Mamba: dt_rank must be 'auto', 'none' or an integer >= 1, got {dt_rank!r}; use 'auto'")
        if dt_init not in ("random", "constant"):
            raise ConfigError(f"Mamba: dt_init must be 'random' or 'constant', got {dt_init!r}; use 'random'")
        if not 0 < dt_min <= dt_max or not dt_init_floor > 0 or not dt_scale > 0:
            raise ConfigError(
                "Mamba: step sizes must satisfy 0 < dt_min <= dt_max, dt_init_floor > 0, dt_scale > 0, got "
                f"dt_min={dt_min!r}, dt_max={dt_max!r}, dt_init_floor={dt_init_floor!r}, dt_scale={dt_scale!r}; "
                "0.001, 0.1, 1e-4 and 1 are published"
            )
        if mixer_rms_eps is not None and not mixer_rms_eps >= 0:
            raise ConfigError(f"Mamba: mixer_rms_eps must be None or >= 0, got {mixer_rms_eps!r}; 1e-6 is published")
        check_choice(
            "Mamba",
            block=block,
            inner=inner,
            selective=selective,
            A_init=A_init,
            d_state=d_state,
            dt_rank=dt_rank,
            mixer_rms_eps=mixer_rms_eps,
        )
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.block, self.inner, self.A_init = block, inner, A_init
        chosen = selected(selective) if inner == "s6" else frozenset()
        self.selected = chosen - {"dt"} if dt_rank == "none" else chosen
        rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.dt_rank = rank if "dt" in self.selected else 0
        self._states, self._is_complex = state_size(inner, A_init, d_state)
        self._is_published = block == "mamba" and self.selected == set(SELECTIVE) and not self._is_complex
        self.dt_min, self.dt_max = dt_min, dt_max
        self.dt_init, self.dt_scale, self.dt_init_floor = dt_init, dt_scale, dt_init_floor
        self.mixer_rms_eps = mixer_rms_eps
        self.backend = backend

        where = {"device": device, "dtype": dtype}
        exact = {"device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
        self.in_proj = nn.Linear(d_model, BLOCKS[block] * self.d_inner, bias=bias, **where)
        self.conv1d = CausalConv1d(self.d_inner, d_conv, bias=conv_bias, backend=backend, **where)
        if inner == "s6":
            widths = {"dt": self.dt_rank, "B": d_state, "C": d_state}
            self._names = [name for name in widths if name in self.selected]  # of x_proj's parts, in their order
            self._widths = [widths[name] for name in self._names]
            if self.selected:
                self.x_proj = nn.Linear(self.d_inner, sum(self._widths), bias=False, **where)
            if "dt" in self.selected:
                self.dt_proj = StepProjection(self.dt_rank, self.d_inner, bias=True, **where)
            else:
                self.dt_bias = nn.Parameter(torch.empty(self.d_inner, **exact))
            shape = (self.d_inner, self._states)
            self.A_log = nn.Parameter(torch.empty(*shape, **exact))
            if self._is_complex:
                self.A_imag = nn.Parameter(torch.empty(*shape, **exact))
            parts = (*shape, 2) if self._is_complex else shape
            if "B" not in self.selected:
                self.B = nn.Parameter(torch.empty(*parts, **exact))
            if "C" not in self.selected:
                self.C = nn.Parameter(torch.empty(*parts, **exact))
            self.D = nn.Parameter(torch.empty(self.d_inner, **exact))
        elif inner != "none":
            self.ssm = linear_map(
                inner, self.d_inner, d_state, dt_min, dt_max, backend, device=device, dtype=exact["dtype"]
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draws all initial values anew; also fills a layer made on the meta device and moved by `to_empty`."""
        for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "ssm", "out_proj"):
            module = getattr(self, name, None)
            if module is not None:
                module.reset_parameters()
        self._reset_own_parameters()

    @torch.no_grad()
    def _reset_own_parameters(self) -> None:
        # On the meta device there is nothing to set, and see `Undrawn`.
        if self.inner != "s6" or self.A_log.is_meta:
            return
        exact = {"device": self.A_log.device, "dtype": self.A_log.dtype}
        dt_bias = self.dt_bias if "dt" not in self.selected else self.dt_proj.bias
        if "dt" in self.selected:
            spread = self.dt_rank**-0.5 * self.dt_scale
            if self.dt_init == "constant":
                nn.init.constant_(self.dt_proj.weight, spread)
            else:
                nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        # Step sizes spread evenly in their logarithm; the bias is what softplus turns into them.
        dt = torch.rand(self.d_inner, **exact) * (math.log(self.dt_max) - math.log(self.dt_min)) + math.log(self.dt_min)
        dt = dt.exp().clamp(min=self.dt_init_floor)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        real, imaginary = initial_A(self.A_init, self.d_inner, self.d_state, **exact)
        self.A_log.copy_(real)
        if imaginary is not None:
            self.A_imag.copy_(imaginary)
        # As in S4D: a fixed B is 1, a fixed C drawn from the (complex) normal distribution.
        if "B" not in self.selected:
            nn.init.ones_(self.B[..., 0] if self._is_complex else self.B)
            if self._is_complex:
                nn.init.zeros_(self.B[..., 1])
        if "C" not in self.selected:
            nn.init.normal_(self.C, std=math.sqrt(0.5) if self._is_complex else 1.0)
        nn.init.ones_(self.D)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """The state before the first token: zeros.

        Args:
            batch: rows (sequences, where tokens will come packed).
            device: Default: the layer's.
            dtype: of the activations, and so of the convolution's part; the scan's part is float32, or float64 with it.
                Default: the layer's.
        """
        if batch < 1:
            raise ShapeError(f"Mamba.init_state: batch must be >= 1, got {batch}; give one row a sequence")
        device = self.conv1d.weight.device if device is None else torch.device(device)
        dtype = self.conv1d.weight.dtype if dtype is None else dtype
        exact = torch.promote_types(dtype, torch.complex64 if self._is_complex else torch.float32)
        return MambaState(
            torch.zeros(batch, self.d_conv - 1, self.d_inner, device=device, dtype=dtype),
            torch.zeros(batch, self.d_inner, self._states, device=device, dtype=exact),
        )

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        recompute: bool | str = False,
        normed: Normed | None = None,
    ) -> LayerOutput:
        """Runs the layer over whole sequences, from a state if one is given.

        Args:
            x: (batch, length, d_model), length >= 1.
            state: what `init_state`, `forward` or `step` gave, one row a sequence. Default: none, start from zeros.
            mask: (batch, length) bool or integer, 1 at real tokens, 0 at padding, which may stand on either side or in
                between: the real tokens give exactly what they give alone. Default: all are real.
            cu_seqlens: (sequences + 1,) int32 or int64, from 0 to length, where packed sequences start; batch is 1.
                Default: each row is one sequence.
            recompute: True (or "cheap"): keep little more than in_proj's output for the backward pass, and compute the
                convolution and the small projections again there, where the layer runs op by op the scan too.
                "block": keep x alone. The gradients are the same to the bit. Default False (or "none").
            normed: what x is made again from, so that a layer that runs as one function (`runs_as_one`) need not keep
                it either. Default: x is kept.

        Returns:
            LayerOutput(output, state): output (batch, length, d_model), zeros at padding; state after each sequence's
            last real token if a state went in, else None. Differentiable through both, several tokens at a time as
            well as one.

        Raises:
            ShapeError: a shape or device does not fit.
            DTypeError: a dtype is not taken.
            ConfigError: mask and cu_seqlens together.
        """
        self._check("Mamba.forward", x, 3)
        batch, length, _ = x.shape
        if mask is not None:
            if cu_seqlens is not None:
                raise ConfigError(
                    "Mamba.forward: mask and cu_seqlens exclude each other, got both; packed tokens need no mask"
                )
            packing = pack("Mamba.forward", mask, batch, length, x.device)
            if packing is not None:
                if packing.tokens == 0:
                    return LayerOutput(torch.zeros_like(x), state)
                if normed is not None:
                    normed = normed._replace(stream=packing.pack(normed.stream))
                inner = self.forward(
                    packing.pack(x), state, cu_seqlens=packing.cu_seqlens, recompute=recompute, normed=normed
                )
                return LayerOutput(packing.unpack(inner.output), inner.state)
        rows = batch
        if cu_seqlens is not None:
            # Any other dtype but these two goes on to the ops, which name it.
            cu_seqlens = cu_seqlens.to(torch.int32) if cu_seqlens.dtype == torch.int64 else cu_seqlens
            rows = cu_seqlens.shape[0] - 1
        self._check_state("Mamba.forward", state, rows, x.device)
        policy = recompute if isinstance(recompute, str) else "cheap" if recompute else "none"
        if self.runs_as_one(x, state):
            # Traced or named, the kernels are there or the call fails; "auto" goes on op by op.
            strict = self.backend != "auto" or torch.compiler.is_compiling()
            run = mamba_inner if strict else mamba_inner_or_none
            whole = run(x, self._weights(), cu_seqlens=cu_seqlens, recompute=policy, normed=normed)
            if whole is not None:
                return LayerOutput(whole, None)
        if policy == "none" or not torch.is_grad_enabled():
            output, after = self._after_in_proj(self.in_proj(x), state, cu_seqlens)
        elif policy == "cheap":
            output, after = checkpoint(
                self._after_in_proj, self.in_proj(x), state, cu_seqlens, use_reentrant=False, preserve_rng_state=True
            )
        elif policy == "block":
            output, after = checkpoint(
                lambda x: self._after_in_proj(self.in_proj(x), state, cu_seqlens),
                x,
                use_reentrant=False,
                preserve_rng_state=True,
            )
        else:
            raise ConfigError(
                f"Mamba.forward: recompute must be a bool, 'none', 'cheap' or 'block', got {recompute!r}; use 'none'"
            )
        return LayerOutput(output, after)

    def runs_as_one(self, x: Tensor, state: MambaState | None = None) -> bool:
        """Whether `forward` runs as one function (`statescan.ops.mamba_inner`) instead of op by op: where gradients are
        on, convolution and scan run on their cuda backends, no state goes in, and no adapter, hook or sharding stands
        between a parameter and its use."""
        if state is not None or x.device.type != "cuda" or not torch.is_grad_enabled() or transforms_active():
            return False
        if self.mixer_rms_eps is not None or not self._is_published:
            return False
        if self.backend not in ("auto", "cuda") or not all(
            is_plain(module, kind)
            for module, kind in (
                (self.in_proj, nn.Linear),
                (self.conv1d, CausalConv1d),
                (self.x_proj, nn.Linear),
                (self.dt_proj, StepProjection),
                (self.out_proj, nn.Linear),
            )
        ):
            return False
        dtype = x.dtype
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        elif any(m.weight.dtype != dtype for m in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)):
            return False
        if x.dtype == torch.float64 or not x.is_floating_point():
            return False
        return unavailable_reason("cuda", dtype, self.d_state, self.d_conv) is None

    def _weights(self) -> LayerWeights:
        return LayerWeights(
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self._A(),
            self.D,
            self.out_proj.weight,
            self.out_proj.bias,
        )

    def step(self, x: Tensor, state: MambaState) -> LayerOutput:
        """Runs the layer over one more token a row; changes nothing in place and is differentiable.

        Args:
            x: (batch, d_model).
            state: the state after the tokens before.

        Returns:
            LayerOutput(output, state): output (batch, d_model), and the state after this token.
        """
        self._check("Mamba.step", x, 2)
        self._check_state("Mamba.step", state, x.shape[0], x.device)
        streams = self._split(self.in_proj(x))
        conv = self.conv1d.step(streams.x, state.conv.to(streams.x.dtype), activation=self._activation)
        u = conv.y if streams.v is None else conv.y * streams.v
        if self.inner == "s6":
            y, ssm = self._step_s6(u, streams.z, state.ssm)
        else:
            y, ssm = (u, state.ssm) if self.inner == "none" else step_linear(self.ssm, u, state.ssm)
            y = y if streams.z is None else y * F.silu(streams.z)
        y = y if streams.q is None else streams.q * y
        return LayerOutput(self.out_proj(y), MambaState(conv.state, ssm))

    def _step_s6(self, u: Tensor, z: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        dt, B, C = self._select(u)
        dtype = u.dtype
        if not {"B", "C"} <= self.selected and u.shape[0] == self.d_inner:
            # As many rows as channels: a fixed B or C has to be told from one a row. That takes one a row and channel,
            # in the state's precision, which is the one that the step computes in.
            wide = torch.promote_types(dtype, torch.float32)
            B, C = (self._a_row(m, name, wide) for m, name in ((B, "B"), (C, "C")))
            u, dt, z = u.to(wide), dt.to(wide), None if z is None else z.to(wide)
        update = selective_state_update(
            state.to(self._state_dtype(dt)),
            u,
            dt,
            self._A(),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=self._dt_bias(),
            dt_softplus=True,
            backend=self.backend,
        )
        return update.y if update.y.dtype == dtype else update.y.to(dtype), update.state

    def _a_row(self, matrix: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """B or C of a step as (batch, d_inner, d_state) where it is fixed, where batch is d_inner."""
        matrix = matrix if matrix.is_complex() else matrix.to(dtype)
        return matrix if name in self.selected else matrix.expand(self.d_inner, *matrix.shape)

    def _after_in_proj(
        self, projected: Tensor, state: MambaState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MambaState | None]:
        # The streams stay views of in_proj's output; the ops read them in place.
        streams = self._split(projected)
        conv = self.conv1d(
            streams.x,
            activation=self._activation,
            initial_state=None if state is None else state.conv.to(streams.x.dtype),
            cu_seqlens=cu_seqlens,
            return_final_state=state is not None,
        )
        u = conv.y if streams.v is None else conv.y * streams.v
        before = None if state is None else state.ssm
        if self.inner == "s6":
            y, ssm = self._run_s6(u, streams.z, before, cu_seqlens)
        else:
            y, ssm = (u, before) if self.inner == "none" else run_linear(self.ssm, u, before, cu_seqlens)
            y = y if streams.z is None else y * F.silu(streams.z)
        y = y if streams.q is None else streams.q * y
        after = None
        if conv.final_state is not None and ssm is not None:
            after = MambaState(conv.final_state, ssm)
        return self.out_proj(y), after

    def _run_s6(
        self, u: Tensor, z: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dt, B, C = self._select(u)
        return selective_scan(
            u,
            dt,
            self._A(),
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=self._dt_bias(),
            dt_softplus=True,
            initial_state=None if state is None else state.to(self._state_dtype(dt)),
            cu_seqlens=cu_seqlens,
            return_final_state=state is not None,
            backend=self.backend,
        )

    @property
    def _activation(self) -> str | None:
        """Of the convolution: what H3 has there is a linear shift."""
        return None if self.block == "h3" else "silu"

    def _split(self, projected: Tensor) -> _Streams:
        if self.block == "mamba":
            x, z = projected.chunk(2, dim=-1)
            return _Streams(x, z=z)
        if self.block == "h3":
            q, k, v = projected.chunk(3, dim=-1)
            return _Streams(k, q=q, v=v)
        return _Streams(projected)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes before their bias, and B and C: as functions of the input, which makes the layer selective, or
        (B and C fixed, a step that is its bias alone) as what they are for every input."""
        made: dict[str, Tensor] = {}
        if self.selected:
            made = dict(zip(self._names, self.x_proj(u).split(self._widths, dim=-1), strict=True))
        if self.mixer_rms_eps is not None:
            made = {name: over_its_rms(part, self.mixer_rms_eps) for name, part in made.items()}
        dt = self.dt_proj(made["dt"]) if "dt" in made else torch.zeros_like(u)
        if self._is_complex:
            made = {name: _as_complex(part.unflatten(-1, (-1, 2))) for name, part in made.items() if name != "dt"}
        B = made["B"] if "B" in made else self._fixed(self.B)
        C = made["C"] if "C" in made else self._fixed(self.C)
        return dt, B, C

    def _fixed(self, matrix: Tensor) -> Tensor:
        return _as_complex(matrix) if self._is_complex else matrix

    def _dt_bias(self) -> Tensor | None:
        """The step's bias, also where a module without one of its own (an adapter) wraps the projection."""
        if "dt" not in self.selected:
            return self.dt_bias
        for module in self.dt_proj.modules():
            if isinstance(module, StepProjection):
                return module.bias
        return getattr(self.dt_proj, "bias", None)

    def _A(self) -> Tensor:
        exact = torch.promote_types(self.A_log.dtype, torch.float32)
        A = -torch.exp(self.A_log.to(exact))
        return torch.complex(A, self.A_imag.to(exact)) if self._is_complex else A

    def _state_dtype(self, activation: Tensor) -> torch.dtype:
        return torch.promote_types(activation.dtype, torch.complex64 if self._is_complex else torch.float32)

    def _check(self, caller: str, x: Tensor, dims: int) -> None:
        meaning = "(batch, length >= 1, d_model)" if dims == 3 else "(batch, d_model)"
        if x.ndim != dims or x.shape[-1] != self.d_model or 0 in x.shape:
            raise ShapeError(
                f"{caller}: x must be {meaning} with d_model {self.d_model}, got {tuple(x.shape)}; "
                "features come last, and there is at least one token"
            )
        if x.dtype not in _FLOATS:
            raise DTypeError(f"{caller}: x must be a float tensor, got {x.dtype}; pass embeddings, not token ids")
        where = self.conv1d.weight.device
        if x.device != where:
            raise ShapeError(
                f"{caller}: x must be on {where}, where the layer is, got {x.device}; pass x.to('{where}')"
            )

    def _check_state(self, caller: str, state: MambaState | None, rows: int, where: torch.device) -> None:
        if state is None:
            return
        wanted = (("conv", (rows, self.d_conv - 1, self.d_inner)), ("ssm", (rows, self.d_inner, self._states)))
        for (name, shape), tensor in zip(wanted, state, strict=True):
            if tuple(tensor.shape) != shape:
                raise ShapeError(
                    f"{caller}: state.{name} must be {shape}, got {tuple(tensor.shape)}; "
                    f"make it with init_state({rows}), one row a sequence"
                )
            if tensor.device != where:
                raise ShapeError(
                    f"{caller}: state.{name} must be on {where}, where the layer is, got {tensor.device}; "
                    f"make it with init_state({rows})"
                )
        if state.ssm.is_complex() != self._is_complex:
            raise DTypeError(
                f"{caller}: state.ssm must be {'complex' if self._is_complex else 'real'}, got {state.ssm.dtype}; "
                f"make it with init_state({rows})"
            )

    def extra_repr(self) -> str:
        shown = f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, dt_rank={self.dt_rank}"
        if self._is_published:
            return shown
        depends = ",".join(name for name in SELECTIVE if name in self.selected) or "none"
        return f"{shown}, block={self.block!r}, inner={self.inner!r}, selective={depends!r}, A_init={self.A_init!r}"
