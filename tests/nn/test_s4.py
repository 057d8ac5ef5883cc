"""S4 and S4D: one map as convolution, as steps, cut anywhere, at another rate; a dense system as the truth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statescan.errors import ConfigError, DTypeError, ShapeError
from statescan.nn import S4, S4D
from statescan.nn.s4 import joint_kernels, s4d_init
from statescan.ops.discretization import discretize
from statescan.ops.hippo import HIPPO_MEASURES, hippo
from statescan.ops.linear_ssm import ssm_kernel

LAYERS = {
    "s4": lambda **given: S4(6, 8, **given),
    "s4 legt": lambda **given: S4(6, 8, measure="legt", **given),
    "s4d legs": lambda **given: S4D(6, 8, **given),
    "s4d lin, bilinear": lambda **given: S4D(6, 8, init="lin", discretization="bilinear", **given),
    "s4d inv": lambda **given: S4D(6, 8, init="inv", **given),
    "s4d real": lambda **given: S4D(6, 8, init="real", **given),
}


def _layer(kind: str, **given: object) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind](**given).double()


def _input(length: int) -> torch.Tensor:
    return torch.randn(2, length, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mix", [True, False])
def test_convolution_is_steps_is_pieces(kind: str, mix: bool) -> None:
    layer, u = _layer(kind, mix=mix), _input(21)
    whole = layer(u).output
    with torch.no_grad():
        state, steps = layer.init_state(2), []
        for t in range(21):
            y, state = layer.step(u[:, t], state)
            steps.append(y)
        first = layer(u[:, :8], layer.init_state(2))
        second = layer(u[:, 8:], first.state)
    assert (whole - torch.stack(steps, 1)).abs().max() < 1e-10
    assert (whole - torch.cat([first.output, second.output], 1)).abs().max() < 1e-10
    assert (second.state - state).abs().max() < 1e-10 * state.abs().max()
    assert layer(u).state is None


@pytest.mark.parametrize("measure", HIPPO_MEASURES)
def test_s4_starts_as_the_hippo_system(measure: str) -> None:
    """Its kernel is that of the dense HiPPO matrices, with C carried over into the eigenbasis."""
    torch.manual_seed(0)
    layer = S4(1, 8, measure=measure, mix=False).double()
    if measure in ("legt", "fourier"):
        layer.log_A_real.data.fill_(-40.0)  # what a float keeps of "no damping at all"
    A, B = hippo(measure, 8)
    dt = layer.log_dt.exp().item()
    # x_eigen = V^* x, y = C_eigen x_eigen + conj: solve for C on 8 independent lags of the kernel
    K = layer.kernel(200)[0].detach()
    A_bar, B_bar = discretize(A, B, dt, "bilinear")
    basis = ssm_kernel(A_bar, B_bar, torch.eye(8, dtype=torch.float64), 200).squeeze(-1)  # (lags, 8)
    C = torch.linalg.lstsq(basis, K.unsqueeze(-1), driver="gelsd").solution
    assert (basis @ C - K.unsqueeze(-1)).abs().max() < 2e-5 * K.abs().max()


@pytest.mark.parametrize("kind", LAYERS)
def test_another_sampling_rate(kind: str) -> None:
    """rate=2 is the same layer with every step doubled: nothing else of the parameters knows the rate."""
    layer, u = _layer(kind), _input(15)
    got = layer(u, rate=2.0).output
    with torch.no_grad():
        layer.log_dt += torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert (layer(u).output - got).abs().max() < 1e-12
    state = layer.init_state(2)
    with torch.no_grad():
        for t in range(15):
            y, state = layer.step(u[:, t], state, rate=0.5)
        half = layer(u, rate=0.5).output[:, -1]
    assert (y - half).abs().max() < 1e-10


def test_rate_on_a_smooth_signal() -> None:
    """Trained at one rate, read at half of it: a smooth input gives nearly the output it gave."""
    layer = _layer("s4d legs", mix=False, dt_min=0.001, dt_max=0.002)
    time = torch.linspace(0, 1, 2001, dtype=torch.float64)[1:]
    signal = torch.sin(6 * time).view(1, -1, 1).expand(1, -1, 6)
    fast, slow = layer(signal).output[:, 1::2], layer(signal[:, 1::2], rate=2.0).output
    skip = layer.D * signal[:, 1::2]
    assert ((fast - skip) - (slow - skip)).abs().max() < 0.02 * (fast - skip).abs().max()


@pytest.mark.parametrize("kind", ["s4", "s4d legs"])
def test_bidirectional_sees_the_future_and_both_ways_alike(kind: str) -> None:
    layer, u = _layer(kind, bidirectional=True, mix=False), _input(12)
    causal = _layer(kind, mix=False)
    moved = u.clone()
    moved[:, 9] += 1
    assert (layer(moved).output - layer(u).output)[:, :9].abs().amin(1).min() > 0
    assert (causal(moved).output - causal(u).output)[:, :9].abs().max() < 1e-12
    y = torch.zeros_like(u)
    past, future = layer.kernel(12), layer.kernel(12, direction=1)
    for t in range(12):
        for s in range(12):
            y[:, t] += u[:, s] * (past[:, t - s] if s <= t else future[:, s - t - 1])
    assert (layer(u).output - y - layer.D * u).abs().max() < 1e-12
    with pytest.raises(ConfigError, match="a bidirectional layer has no state"):
        layer.init_state(2)
    with pytest.raises(ConfigError, match="a bidirectional layer has no steps"):
        layer.step(u[:, 0], torch.zeros(2, 6, 4, dtype=torch.complex128))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_parameter_and_the_state_have_gradients(kind: str) -> None:
    """Against differences of the loss along a random direction of everything at once."""
    layer, u = _layer(kind), _input(7)
    state = layer.init_state(2)
    state = (state + torch.randn(state.shape, dtype=state.dtype)).requires_grad_()

    def loss() -> torch.Tensor:
        y, last = layer(u, state)
        return y.square().sum() + last.abs().square().sum()

    loss().backward()
    draw = torch.Generator().manual_seed(3)
    for name, leaf in [*layer.named_parameters(), ("state", state)]:
        direction = torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype)
        with torch.no_grad():
            values = []
            for shift in (1e-6, -1e-6):
                leaf += shift * direction
                values.append(loss().item())
                leaf -= shift * direction
        assert leaf.grad is not None, name
        slope = (leaf.grad.conj() * direction).real.sum().item()
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-6), name


def test_initial_values_of_s4d() -> None:
    """Entries of the definitions, by hand."""
    assert torch.allclose(s4d_init("lin", 6).imag, torch.pi * torch.arange(3, dtype=torch.float64))
    inv = s4d_init("inv", 4).imag
    assert torch.allclose(inv, 4 / torch.pi * torch.tensor([3.0, 1 / 3], dtype=torch.float64))
    assert s4d_init("real", 3).tolist() == [-1.0, -2.0, -3.0]
    for init in ("lin", "inv", "legs"):
        assert torch.allclose(s4d_init(init, 6).real, torch.full((3,), -0.5, dtype=torch.float64))
    dt = S4D(4000, 2).log_dt.exp()
    assert 0.001 <= dt.min() < 0.0011
    assert 0.09 < dt.max() <= 0.1


def test_float32_layer_and_autocast() -> None:
    torch.manual_seed(0)
    layer = S4(6, 8)
    u = _input(40).float()
    truth = S4(6, 8).double()
    truth.load_state_dict(layer.state_dict())
    wanted = truth(u.double()).output
    assert (layer(u).output - wanted).abs().max() < 1e-5 * wanted.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(u.bfloat16())
    assert low.output.dtype == torch.bfloat16
    assert (low.output.double() - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_the_held_system_follows_the_parameters() -> None:
    layer, u = _layer("s4"), _input(1)
    with torch.no_grad():
        before = layer.step(u[:, 0], layer.init_state(2)).output
        layer.log_dt += 1
        after = layer.step(u[:, 0], layer.init_state(2)).output
        assert (before - after).abs().max() > 1e-4
        slow = layer.step(u[:, 0], layer.init_state(2), rate=2.0).output
        assert (slow - layer(u, rate=2.0).output[:, 0]).abs().max() < 1e-10 < (slow - after).abs().max()
        assert torch.equal(after, layer.step(u[:, 0], layer.init_state(2)).output)


def test_parameters_are_marked() -> None:
    """The system's own parameters are never decayed, as published, and have their own highest rate."""
    for layer in (S4(4, 4), S4D(4, 4)):
        marked = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert {"log_dt", "log_A_real", "A_imag", "B"} <= marked
        assert not marked & {"C", "D", "output_linear.weight"}
        assert all(dict(layer.named_parameters())[n]._max_lr == 1e-3 for n in marked)


def test_bad_input() -> None:
    layer = S4D(6, 8)
    with pytest.raises(ShapeError, match=r"S4D: u must have shape \(batch, length, d_model\) with d_model = 6"):
        layer(torch.zeros(2, 3, 5))
    with pytest.raises(DTypeError, match="S4D: u must be a floating tensor"):
        layer(torch.zeros(2, 3, 6, dtype=torch.long))
    with pytest.raises(ConfigError, match="rate must be positive, got 0"):
        layer(torch.zeros(2, 3, 6), rate=0.0)
    with pytest.raises(ShapeError, match="state must have shape"):
        layer(torch.zeros(2, 3, 6), torch.zeros(2, 6, 3, dtype=torch.complex64))
    s4, u = S4(6, 8), torch.zeros(1, 6)
    for one in (layer, s4):
        with pytest.raises(ShapeError, match=r"step: state must have shape .* = \(1, 6, 4\), got \(3, 6, 4\)"):
            one.step(u, one.init_state(3))
        with pytest.raises(DTypeError, match=r"step: state must be a torch.Tensor, got NoneType"):
            one.step(u, None)
        with pytest.raises(DTypeError, match=r"step: state must be complex, got torch.float32"):
            one.step(u, one.init_state(1).real)
        with pytest.raises(ConfigError, match=r"kernel: direction must be 0, the past, in a causal layer, got 1"):
            one.kernel(4, direction=1)
        with pytest.raises(ConfigError, match=r"kernel: rate must be positive, got -1"):
            one.kernel(4, rate=-1)
        with pytest.raises(ConfigError, match=r"dropout must be in \[0, 1\), got 1.5"):
            type(one)(6, 8, dropout=1.5)
    with pytest.raises(DTypeError, match=r"step: state must be real, got torch.complex64"):
        S4D(6, 8, init="real").step(u, torch.zeros(1, 6, 8, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="init must be one of"):
        S4D(6, 8, init="random")
    with pytest.raises(ConfigError, match="d_state must be even"):
        S4D(6, 7)
    with pytest.raises(ConfigError, match="measure must be one of"):
        S4(6, 8, measure="legq")
    with pytest.raises(ConfigError, match="step sizes must satisfy"):
        S4(6, 8, dt_min=0.1, dt_max=0.01)


class _Whole(nn.Module):
    """A layer as tensors in, tensors out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return tuple(part for part in self.layer(u, state) if part is not None)


def _exported(layer: nn.Module, *example: torch.Tensor) -> nn.Module:
    length = torch.export.Dim("length", max=2**20)
    sizes = ({1: length}, *({} for _ in example[1:]))
    return torch.export.export(_Whole(layer), example, dynamic_shapes=sizes).module()


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(kind, backend) for kind in LAYERS for backend in ("auto", "torch")]
    + [("s4", "cauchy"), ("s4d inv", "reference")],
)
def test_exported_at_any_length_it_is_the_layer_itself(kind: str, backend: str) -> None:
    layer = _layer(kind, mix=False, backend=backend).float()
    state = layer.init_state(2)
    with torch.no_grad():
        from_zero, from_state = _exported(layer, _input(9).float()), _exported(layer, _input(9).float(), state)
        state = torch.randn(state.shape, generator=torch.Generator().manual_seed(2), dtype=state.dtype)
        for length in (1, 7, 64, 100, 1000):
            u = _input(length).float()
            assert torch.equal(from_zero(u)[0], layer(u).output)
            for got, wanted in zip(from_state(u, state), layer(u, state), strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["s4", "s4d lin, bilinear"])
def test_exported_both_ways_and_its_gradients(kind: str) -> None:
    layer = _layer(kind, bidirectional=True)
    program = _exported(layer, _input(9))
    for length in (1, 7, 100):
        u, v = _input(length).requires_grad_(), _input(length).requires_grad_()
        layer(u).output.square().sum().backward()
        program(v)[0].square().sum().backward()
        assert (u.grad - v.grad).abs().max() < 1e-12 * u.grad.abs().max()
    wanted, got = dict(layer.named_parameters()), dict(program.named_parameters())
    for name, value in wanted.items():
        assert (got[f"layer.{name}"].grad - value.grad).abs().max() < 1e-11 * value.grad.abs().max(), name


@pytest.mark.parametrize("kind", ["s4", "s4d legs"])
def test_compiled_with_dynamic_lengths_in_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    layer = _layer(kind).float()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (5, 64, 100):
        u, v = _input(length).float().requires_grad_(), _input(length).float().requires_grad_()
        y, wanted = compiled(u).output, layer(v).output
        assert (y - wanted).abs().max() < 1e-5 * wanted.abs().max()
        y.sum().backward()
        wanted.sum().backward()
        assert (u.grad - v.grad).abs().max() < 1e-5 * v.grad.abs().max()
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_kernels_made_together_are_those_made_alone(kind: str, bidirectional: bool) -> None:
    layers = [_layer(kind, bidirectional=bidirectional) for _ in range(3)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for parameter in layer.parameters():
                parameter.add_(0.01 * number)
    u = _input(21)
    for layer, kernels in zip(layers, joint_kernels(layers, 21), strict=True):
        assert len(kernels) == 1 + bidirectional
        for direction, kernel in enumerate(kernels):
            assert (kernel - layer.kernel(21, direction=direction)).abs().max() < 1e-12
        assert (layer(u, kernels=kernels).output - layer(u).output).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [S4, S4D])
def test_forward_euler_that_grows_is_refused(kind: type[S4] | type[S4D]) -> None:
    """At the default steps every number of the kernel was NaN from some position on, without a word."""
    torch.manual_seed(0)
    u = torch.randn(1, 300, 8)
    with pytest.raises(
        ConfigError, match=r"'forward_euler' no eigenvalue of A_bar may be larger than 1, .* smaller dt"
    ):
        kind(8, discretization="forward_euler")(u)
    assert kind(8, discretization="forward_euler", dt_min=1e-7, dt_max=1e-6)(u).output.isfinite().all()
    with pytest.raises(ConfigError, match=r"discretization must be one of .*, got \['zoh'\]"):
        kind(8, discretization=["zoh"])  # type: ignore[arg-type]


def test_joint_kernels_wants_layers_that_are_alike() -> None:
    for others in ([S4D(6, 8)], [S4(6, 4)], [S4(6, 8, discretization="zoh")], [S4(6, 8, bidirectional=True)]):
        with pytest.raises(ConfigError, match="layers must be alike, got 2 kinds"):
            joint_kernels([S4(6, 8), *others], 5)
    with pytest.raises(ConfigError, match="layers must be S4 or S4D, got Linear"):
        joint_kernels([nn.Linear(2, 2)], 5)
