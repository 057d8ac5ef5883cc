"""S4 and S4D: linear time-invariant state space layers, a convolution in training and a recurrence in generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.ops import fft_conv, s4_kernel, s4_response, s4d_kernel, s4d_response
from statescan.ops._checks import check_device, check_shape, check_tensor, transforms_active
from statescan.ops.discretization import check_method, discretize
from statescan.ops.hippo import HIPPO_MEASURES, hippo_nplr
from statescan.ops.ssm_kernel.real_form import real_form

__all__ = ["S4", "S4D", "S4D_INITS", "LinearLayerOutput", "joint_kernels", "s4d_init"]

S4D_INITS = ("lin", "inv", "legs", "real")


class LinearLayerOutput(NamedTuple):
    """What S4 and S4D give: output, shaped as the input; state after the last position, None unless one went in."""

    output: Tensor
    state: Tensor | None


def s4d_init(init: str, d_state: int) -> Tensor:
    """The diagonal A of S4D, one of each conjugate pair: complex128 ``(d_state / 2,)``; real ``(d_state,)`` for "real".

    * ``"lin"``: ``-1/2 + pi n i``
    * ``"inv"``: ``-1/2 + (d_state / pi) (d_state / (2n + 1) - 1) i``
    * ``"legs"``: the eigenvalues of the normal part of HiPPO-LegS
    * ``"real"``: ``-(n + 1)``

    Raises:
        ConfigError: an unknown init, or an odd d_state where pairs are wanted.

    Source: S4D, arXiv:2206.11893, section 4 (definitions of S4D-LegS, S4D-Inv, S4D-Lin); Mamba's S4D-Real.
    """
    if init not in S4D_INITS:
        raise ConfigError(f"s4d_init: init must be one of {list(S4D_INITS)}, got {init!r}")
    n = torch.arange(d_state if init == "real" else d_state // 2, dtype=torch.float64)
    if init == "real":
        return -(n + 1)
    if d_state < 2 or d_state % 2:
        raise ConfigError(f"s4d_init: d_state must be even with init {init!r}, got {d_state}; its states are pairs")
    if init == "lin":
        frequency = math.pi * n
    elif init == "inv":
        frequency = d_state / math.pi * (d_state / (2 * n + 1) - 1)
    else:
        eigenvalues = hippo_nplr("legs", d_state).Lambda
        return eigenvalues[eigenvalues.imag > 0]
    return torch.complex(torch.full_like(frequency, -0.5), frequency)


def joint_kernels(layers: Sequence[nn.Module], length: int, *, rate: float = 1.0) -> list[tuple[Tensor, ...]]:
    """The kernels of several layers of one kind, made in one computation: all their channels as those of one system.

    What a kernel costs on a GPU are the many small operations that make it, not the channels in them.

    Args:
        layers: `S4` or `S4D` layers that differ in nothing but their parameters.
        length: number of lags.
        rate: as in the layers' `forward`.

    Returns:
        For each layer what its `forward` takes as `kernels`: ``(d_model, length)`` of the past, and of the future where
        it is bidirectional.

    Raises:
        ConfigError: layers that are not alike.
    """
    systems, kinds = [], set()
    for layer in layers:
        if not isinstance(layer, _StateSpaceLayer):
            raise ConfigError(f"joint_kernels: layers must be S4 or S4D, got {type(layer).__name__}")
        sizes = tuple(parameter.shape for parameter in layer.parameters(recurse=False))
        kinds.add((type(layer), sizes, layer.discretization, layer.backend))
        systems += [layer._system(direction, rate) for direction in range(2 if layer.bidirectional else 1)]
    if len(kinds) != 1:
        raise ConfigError(f"joint_kernels: layers must be alike, got {len(kinds)} kinds; call it for each kind")
    first = layers[0]
    assert isinstance(first, _StateSpaceLayer)
    joined = {name: torch.cat([system[name] for system in systems]) for name in systems[0]}
    kernels = first._kernel_of(joined if len(systems) > 1 else systems[0], length).split(first.d_model)
    each = len(systems) // len(layers)
    return [tuple(kernels[at : at + each]) for at in range(0, len(kernels), each)]


class _StateSpaceLayer(nn.Module):
    """What S4 and S4D share: the convolution, the steps, the skip, and the mixing of channels after it.

    A subclass has `_system(rate)` (its continuous parameters and step) and names the kernel and response ops.
    """

    log_A_real: nn.Parameter  # (d_model, states)
    A_imag: Any  # the same; None where the states are real

    def __init__(
        self, d_model: int, d_state: int, dt_min: float, dt_max: float, discretization: str, bidirectional: bool,
        mix: bool, dropout: float, backend: str, device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        if d_model < 1 or d_state < 1:
            raise ConfigError(f"{name}: d_model and d_state must be >= 1, got {d_model} and {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ConfigError(f"{name}: step sizes must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        check_method(name, "discretization", discretization)
        if not 0 <= dropout < 1:
            raise ConfigError(f"{name}: dropout must be in [0, 1), got {dropout}")
        self.d_model, self.d_state, self.discretization = d_model, d_state, discretization
        self.bidirectional, self.backend = bidirectional, backend
        self.dt_min, self.dt_max = dt_min, dt_max
        directions = 2 if bidirectional else 1
        factory: dict[str, Any] = {"device": device}
        self.log_dt = nn.Parameter(torch.empty(directions, d_model, **factory))
        self.D = nn.Parameter(torch.empty(d_model, **factory))
        self.output_linear = nn.Linear(d_model, 2 * d_model, device=device, dtype=dtype) if mix else None
        self.dropout = nn.Dropout(dropout)
        self._held: tuple[Any, Any] | None = None

    def _reset_shared(self) -> None:
        self._mark(*self._marked)  # `to_empty` puts other parameters in place of those on the meta device
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        nn.init.uniform_(self.log_dt, low, high)
        nn.init.normal_(self.D)
        if self.output_linear is not None:
            self.output_linear.reset_parameters()

    def _mark(self, *names: str) -> None:
        """Parameters of the system itself: never decayed, as published, and trained no faster than 0.001.

        Published is 0.001 scaled by the schedule, which falls from the start; here the schedule is cut off at 0.001.
        """
        self._marked = names
        for name in names:
            parameter = getattr(self, name)
            parameter._no_weight_decay = True
            parameter._max_lr = 1e-3

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Loading may put other parameters in place of the marked ones.
        super()._load_from_state_dict(*args, **kwargs)
        self._mark(*self._marked)

    def _system(self, direction: int, rate: float) -> dict[str, Tensor]:
        raise NotImplementedError

    def _kernel_of(self, system: dict[str, Tensor], length: int) -> Tensor:
        raise NotImplementedError

    def _response(self, u: Tensor, state: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _advance(self, u: Tensor, state: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def kernel(self, length: int, *, rate: float = 1.0, direction: int = 0) -> Tensor:
        """The convolution's kernel ``(d_model, length)``, float32.

        Args:
            length: number of lags.
            rate: step between samples in units of that in training: 2 for half the sampling rate.
            direction: 0 the past, 1 the future (bidirectional layers).

        Raises:
            ConfigError: a length < 1, a rate <= 0, or a direction that the layer has not.
        """
        name = f"{type(self).__name__}.kernel"
        if direction not in range(2 if self.bidirectional else 1):
            wanted = "0 or 1" if self.bidirectional else "0, the past, in a causal layer"
            raise ConfigError(f"{name}: direction must be {wanted}, got {direction!r}")
        self._check_rate(name, rate)
        return self._kernel_of(self._system(direction, rate), length)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> Tensor:
        """The state before the first position: zeros ``(batch, d_model, states)``.

        Args:
            batch: number of rows.
            device: default: that of the parameters.
        """
        if self.bidirectional:
            raise ConfigError(f"{type(self).__name__}: a bidirectional layer has no state; it must see the whole input")
        template = self._system(0, 1.0)
        like = template.get("A", template.get("Lambda"))
        assert like is not None
        return torch.zeros(batch, *like.shape, dtype=like.dtype, device=device or like.device)

    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        *,
        rate: float = 1.0,
        kernels: tuple[Tensor, ...] | None = None,
    ) -> LinearLayerOutput:
        """Runs a whole sequence.

        Args:
            u: ``(batch, length, d_model)``.
            state: what `init_state`, `forward` or `step` gave. Default None: zeros, and no state comes out.
            rate: step between samples in units of that in training.
            kernels: this layer's, as `joint_kernels` gave them. Default: made here.

        Returns:
            `LinearLayerOutput`.

        Raises:
            ShapeError, DTypeError: u or the state doesn't fit.
            ConfigError: rate <= 0, or a state for a bidirectional layer.
        """
        name = type(self).__name__
        self._check(name, u, 3, rate)
        if state is not None and self.bidirectional:
            raise ConfigError(f"{name}: a bidirectional layer takes no state; it must see the whole input")
        past, *future = kernels or joint_kernels([self], u.shape[1], rate=rate)[0]
        y = fft_conv(u, past, reverse_kernel=future[0] if future else None, D=self.D)
        final = None
        if state is not None:
            added, final = self._response(u, state, rate)
            y = y + added.to(y.dtype)
            final = final.to(state.dtype)
        return LinearLayerOutput(self._mix(y), final)

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0) -> LinearLayerOutput:
        """One position.

        Args:
            u: ``(batch, d_model)``.
            state: ``(batch, d_model, states)``; it is left as it is.
            rate: as in `forward`.

        Returns:
            `LinearLayerOutput` with the state after this position.

        Raises:
            ShapeError, DTypeError: u or the state doesn't fit.
            ConfigError: rate <= 0, or a bidirectional layer.
        """
        name = f"{type(self).__name__}.step"
        self._check(name, u, 2, rate)
        if self.bidirectional:
            raise ConfigError(f"{name}: a bidirectional layer has no steps; it must see the whole input")
        check_tensor(name, "state", state)
        check_device(name, "state", state, u, "u")
        check_shape(
            name, "state", state, (u.shape[0], *self.log_A_real.shape), "(batch, d_model, states)",
            "take it from init_state(batch) or a call",
        )  # fmt: skip
        wanted = "real" if self.A_imag is None else "complex"
        if state.is_complex() != (wanted == "complex"):
            raise DTypeError(f"{name}: state must be {wanted}, got {state.dtype}; take it from init_state or a call")
        y, after = self._advance(u, state, rate)
        return LinearLayerOutput(self._mix((y + self.D * u).to(u.dtype)), after.to(state.dtype))

    def _mix(self, y: Tensor) -> Tensor:
        """GELU, then every channel from all of them through a gated linear unit; the bare map without `mix`."""
        if self.output_linear is None:
            return y
        return F.glu(self.output_linear(self.dropout(F.gelu(y))), dim=-1)

    def _check(self, caller: str, u: Tensor, dims: int, rate: float) -> None:
        if not isinstance(u, Tensor) or not u.is_floating_point():
            raise DTypeError(f"{caller}: u must be a floating tensor, got {getattr(u, 'dtype', type(u).__name__)}")
        if u.dim() != dims or u.shape[-1] != self.d_model or 0 in u.shape:
            wanted = "(batch, length, d_model)" if dims == 3 else "(batch, d_model)"
            raise ShapeError(
                f"{caller}: u must have shape {wanted} with d_model = {self.d_model}, got {tuple(u.shape)}"
            )
        self._check_rate(caller, rate)

    def _check_rate(self, caller: str, rate: float) -> None:
        if not 0 < rate < math.inf:
            raise ConfigError(f"{caller}: rate must be positive, got {rate!r}; 2 means half the sampling rate")

    def _discrete(self, rate: float, make: Any) -> Any:
        """The discretised system, kept while no parameter changes: a step would spend its time on it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms_active():
            return make()
        key = (rate, *((p.data_ptr(), p._version, p.device) for p in self.parameters(recurse=False)))
        if self._held is None or self._held[0] != key:
            self._held = (key, make())
        return self._held[1]

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, discretization={self.discretization!r}" + (
            ", bidirectional=True" if self.bidirectional else ""
        )


class S4D(_StateSpaceLayer):
    """S4 with a diagonal A.

    ``x' = A x + B u, y = 2 Re(C x) + D u`` for each channel, A diagonal, then GELU and a gated linear unit.

    Args:
        d_model: number of channels.
        d_state: size of the state of a channel; complex states come in pairs, of which d_state / 2 are kept.
        init: initial A, see `s4d_init`: ``"legs"``, ``"lin"``, ``"inv"`` or ``"real"``.
        discretization: ``"zoh"`` or another rule of `statescan.ops.discretization`.
        dt_min, dt_max: steps are drawn log-uniformly between them.
        bidirectional: see the future too; such a layer has neither state nor steps.
        mix: GELU, dropout and the gated linear unit after the state space. Without: the bare map.
        dropout: before the gated linear unit.
        backend: as in `statescan.ops.s4d_kernel`.
        device, dtype: of the parameters; those of the system stay float32.

    Source: S4D, arXiv:2206.11893. B is 1 at the start and trained, Re(A) = -exp(log_A_real) so that it stays negative.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "legs",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bidirectional: bool = False,
        mix: bool = True,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, d_state, dt_min, dt_max, discretization, bidirectional, mix, dropout, backend, device, dtype
        )
        self.init = init
        A = s4d_init(init, d_state)
        states, directions = A.shape[0], 2 if bidirectional else 1
        parts = (2,) if A.is_complex() else ()
        self.log_A_real = nn.Parameter(torch.empty(d_model, states, device=device))
        self.A_imag = nn.Parameter(torch.empty(d_model, states, device=device)) if A.is_complex() else None
        self.B = nn.Parameter(torch.empty(d_model, states, *parts, device=device))
        self.C = nn.Parameter(torch.empty(directions, d_model, states, *parts, device=device))
        self._mark("log_dt", "log_A_real", "B", *(["A_imag"] if A.is_complex() else []))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter as published."""
        self._reset_shared()
        A = s4d_init(self.init, self.d_state)
        with torch.no_grad():
            self.log_A_real.copy_(torch.log(-A.real).expand_as(self.log_A_real))
            if self.A_imag is not None:
                self.A_imag.copy_(A.imag.expand_as(self.A_imag))
                self.B.copy_(torch.tensor([1.0, 0.0]).expand_as(self.B))
                nn.init.normal_(self.C, std=math.sqrt(0.5))
            else:
                nn.init.ones_(self.B)
                nn.init.normal_(self.C)

    def _system(self, direction: int, rate: float) -> dict[str, Tensor]:
        A, B, C = -torch.exp(self.log_A_real), self.B, self.C[direction]
        if self.A_imag is not None:
            A, B, C = torch.complex(A, self.A_imag), torch.view_as_complex(B), torch.view_as_complex(C)
        return {"A": A, "B": B, "C": C, "dt": rate * torch.exp(self.log_dt[direction])}

    def _kernel_of(self, system: dict[str, Tensor], length: int) -> Tensor:
        return s4d_kernel(**system, length=length, discretization=self.discretization, backend=self.backend)

    def _response(self, u: Tensor, state: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        return s4d_response(**self._system(0, rate), u=u, state=state, discretization=self.discretization)

    def _advance(self, u: Tensor, state: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor, Tensor]:
            system = self._system(0, rate)
            A_bar, B_bar = discretize(system["A"], system["B"], system["dt"], self.discretization, diagonal=True)
            return A_bar, B_bar, system["C"] * (2 if system["A"].is_complex() else 1)

        A_bar, B_bar, C = self._discrete(rate, make)
        x = A_bar * state + B_bar * u.unsqueeze(-1)
        y = (C * x).sum(-1)
        return (y.real if y.is_complex() else y), x


class S4(_StateSpaceLayer):
    """The structured state space layer: A is diagonal plus low rank, a HiPPO matrix at the start.

    ``x' = (diag(Lambda) - P P^*) x + B u, y = 2 Re(C x) + D u`` for each channel, then GELU and a gated linear unit.

    Args:
        d_model: number of channels.
        d_state: size of the state of a channel, even; d_state / 2 of its conjugate pairs are kept.
        measure: HiPPO measure of the initial A and B: ``"legs"``, ``"legt"``, ``"lagt"``, ``"fourier"``.
        discretization: ``"bilinear"``, as published, or another rule (not on the backends named cauchy).
        dt_min, dt_max, bidirectional, mix, dropout, device, dtype: as in `S4D`.
        backend: as in `statescan.ops.s4_kernel`.

    Source: S4, arXiv:2111.00396; P P^* in place of P Q^* keeps A stable (Goel et al., arXiv:2202.09729).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        measure: str = "legs",
        discretization: str = "bilinear",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bidirectional: bool = False,
        mix: bool = True,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, d_state, dt_min, dt_max, discretization, bidirectional, mix, dropout, backend, device, dtype
        )
        if measure not in HIPPO_MEASURES:
            raise ConfigError(f"S4: measure must be one of {sorted(HIPPO_MEASURES)}, got {measure!r}")
        if d_state % 2:
            raise ConfigError(f"S4: d_state must be even, got {d_state}; its states are conjugate pairs")
        self.measure = measure
        states, directions, rank = d_state // 2, 2 if bidirectional else 1, 2 if measure == "legt" else 1
        self.log_A_real = nn.Parameter(torch.empty(d_model, states, device=device))
        self.A_imag = nn.Parameter(torch.empty(d_model, states, device=device))
        self.P = nn.Parameter(torch.empty(d_model, states, rank, 2, device=device))
        self.B = nn.Parameter(torch.empty(d_model, states, 2, device=device))
        self.C = nn.Parameter(torch.empty(directions, d_model, states, 2, device=device))
        self._mark("log_dt", "log_A_real", "A_imag", "P", "B")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter as published."""
        self._reset_shared()
        Lambda, P, B, _ = hippo_nplr(self.measure, self.d_state)
        half = slice(self.d_state // 2, None)  # sorted by imaginary part: the upper half
        with torch.no_grad():
            # The windowed measures' normal parts have no damping of their own: a floor keeps the logarithm finite.
            self.log_A_real.copy_(torch.log((-Lambda.real[half]).clamp(min=1e-4)).expand_as(self.log_A_real))
            self.A_imag.copy_(Lambda.imag[half].expand_as(self.A_imag))
            self.P.copy_(torch.view_as_real(P[half]).expand_as(self.P))
            self.B.copy_(torch.view_as_real(B[half]).expand_as(self.B))
        nn.init.normal_(self.C, std=math.sqrt(0.5))

    def _system(self, direction: int, rate: float) -> dict[str, Tensor]:
        return {
            "Lambda": torch.complex(-torch.exp(self.log_A_real), self.A_imag),
            "P": torch.view_as_complex(self.P),
            "B": torch.view_as_complex(self.B),
            "C": torch.view_as_complex(self.C[direction]),
            "dt": rate * torch.exp(self.log_dt[direction]),
        }

    def _kernel_of(self, system: dict[str, Tensor], length: int) -> Tensor:
        return s4_kernel(**system, length=length, discretization=self.discretization, backend=self.backend)

    def _response(self, u: Tensor, state: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        return s4_response(**self._system(0, rate), u=u, state=state, discretization=self.discretization)

    def _advance(self, u: Tensor, state: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor, Tensor]:
            system = self._system(0, rate)
            A, B, C = real_form(system["Lambda"], system["P"], system["B"], system["C"])
            A_bar, B_bar = discretize(A, B.unsqueeze(-1), system["dt"], self.discretization)
            return A_bar, B_bar.squeeze(-1), C

        A_bar, B_bar, C = (m.to(state.real.dtype) for m in self._discrete(rate, make))
        held = torch.cat([state.real, state.imag], -1)
        held = torch.einsum("dmn,bdn->bdm", A_bar, held) + B_bar * u.unsqueeze(-1)
        real, imag = held.chunk(2, -1)
        return (C * held).sum(-1), torch.complex(real, imag)
