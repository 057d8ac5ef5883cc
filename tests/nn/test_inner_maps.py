"""The Mamba layer with another block, another inner map, or a map that selects less: each is what its equations say,
written out here number by number, however it is cut, packed or recomputed; the published layer is left as it was."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from statescan.errors import BackendUnavailableError, ConfigError, DTypeError, ShapeError
from statescan.nn import Mamba, MambaState
from statescan.nn import mamba as module
from statescan.nn.inner_maps import A_INITS, BLOCKS, INNER_MAPS, initial_A

MAPS: dict[str, dict[str, Any]] = {
    "s6": {},
    "s4": {"inner": "s4"},
    "s4d": {"inner": "s4d"},
    "s4d-real": {"inner": "s4d-real"},
    "none": {"inner": "none"},
    "no part selects": {"selective": "none"},
    "B selects": {"selective": "B"},
    "C selects": {"selective": "C"},
    "dt selects": {"selective": "dt"},
    "B, C select": {"dt_rank": "none"},
    "complex": {"A_init": "s4d-lin"},
    "complex, C selects": {"A_init": "s4d-lin", "selective": "C"},
    "complex, B and dt select": {"A_init": "s4d-lin", "selective": "dt,B"},
    "constant": {"A_init": "constant"},
    "random": {"A_init": "random", "mixer_rms_eps": 1e-3},
}
LENGTH, WIDTH = 11, 6


def make(block: str, kind: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Mamba:
    """A layer whose every parameter is random, so that none can be left out unseen."""
    torch.manual_seed(0)
    layer = Mamba(WIDTH, block=block, dtype=dtype, **{"d_state": 4, **MAPS[kind], **fields})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return layer


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max()) if b.numel() else 0.0


def bound(layer: Mamba) -> float:
    """What sums in another order may differ by: some dozen roundings, of a Fourier transform over the whole too."""
    return 32 * torch.finfo(layer.conv1d.weight.dtype).eps


def random_state(layer: Mamba, rows: int) -> MambaState:
    return MambaState(*(torch.randn_like(part) for part in layer.init_state(rows)))


choices = pytest.mark.parametrize("kind", MAPS)
blocks = pytest.mark.parametrize("block", BLOCKS)


# ------------------------------------------------------------------------------------------------- the equations


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def pairs(x: np.ndarray) -> np.ndarray:
    return x[..., 0] + 1j * x[..., 1]


def s6(p: dict[str, np.ndarray], layer: Mamba, u: np.ndarray) -> np.ndarray:
    """Equations 2a and 2b of the paper, one channel and one state after the other."""
    n, is_complex = layer.d_state, "A_imag" in p
    A = -np.exp(p["A_log"]) + (1j * p["A_imag"] if is_complex else 0)
    h = np.zeros(A.shape, dtype=A.dtype)
    out = np.zeros_like(u)
    for t, row in enumerate(u):
        made = p["x_proj.weight"] @ row if "x_proj.weight" in p else np.zeros(0)
        low, made = made[: layer.dt_rank], made[layer.dt_rank :]
        steps = p["dt_proj.weight"] @ rms(low, layer) + p["dt_proj.bias"] if "dt_bias" not in p else p["dt_bias"]
        dt = np.log1p(np.exp(steps))
        matrices = {}
        for name in "BC":
            if name in p:
                matrices[name] = pairs(p[name]) if is_complex else p[name]
            else:
                one, made = rms(made[:n], layer), made[n:]
                one = one.reshape(-1, 2) if is_complex else one
                matrices[name] = np.broadcast_to(pairs(one) if is_complex else one, A.shape)
        for i in range(A.shape[0]):
            for j in range(A.shape[1]):
                h[i, j] = np.exp(dt[i] * A[i, j]) * h[i, j] + dt[i] * matrices["B"][i, j] * row[i]
            y = (matrices["C"][i] * h[i]).sum()
            out[t, i] = (2 * y.real if is_complex else y) + p["D"][i] * row[i]
    return out


def rms(x: np.ndarray, layer: Mamba) -> np.ndarray:
    return x if layer.mixer_rms_eps is None else x / np.sqrt((x**2).mean() + layer.mixer_rms_eps)


def linear(p: dict[str, np.ndarray], layer: Mamba, u: np.ndarray) -> np.ndarray:
    """S4 and S4D as a dense matrix a channel, conjugates and all."""
    p = {name.removeprefix("ssm."): value for name, value in p.items() if name.startswith("ssm.")}
    out = np.zeros_like(u)
    for i in range(u.shape[1]):
        if layer.inner == "s4d-real":
            A, B, C = np.diag(-np.exp(p["log_A_real"][i])), p["B"][i], p["C"][0, i]
        else:
            half = -np.exp(p["log_A_real"][i]) + 1j * p["A_imag"][i]
            A = np.diag(np.concatenate([half, half.conj()]))
            B, C = (np.concatenate([x, x.conj()]) for x in (pairs(p["B"][i]), pairs(p["C"][0, i])))
            if layer.inner == "s4":
                P = pairs(p["P"][i, :, 0])
                P = np.concatenate([P, P.conj()])
                A = A - np.outer(P, P.conj())
        dt, one = np.exp(p["log_dt"][0, i]), np.eye(len(A))
        if layer.inner == "s4":  # bilinear
            inverse = np.linalg.inv(one - dt / 2 * A)
            A_bar, B_bar = inverse @ (one + dt / 2 * A), inverse @ (dt * B)
        else:  # zero-order hold
            A_bar = np.diag(np.exp(dt * np.diag(A)))
            B_bar = (np.diag(A_bar) - 1) / np.diag(A) * B
        h = np.zeros(len(A), dtype=A_bar.dtype)
        for t in range(len(u)):
            h = A_bar @ h + B_bar * u[t, i]
            out[t, i] = (C @ h).real + p["D"][i] * u[t, i]
    return out


def oracle(layer: Mamba, x: np.ndarray) -> np.ndarray:
    """(length, d_model) to the same; from zero states."""
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    streams = np.split(x @ p["in_proj.weight"].T, BLOCKS[layer.block], 1)
    into = streams[1] if layer.block == "h3" else streams[0]
    kernel = p["conv1d.weight"][:, 0]
    padded = np.concatenate([np.zeros((layer.d_conv - 1, layer.d_inner)), into])
    conv = np.stack([(padded[t : t + layer.d_conv].T * kernel).sum(1) for t in range(len(x))]) + p["conv1d.bias"]
    u = conv * streams[2] if layer.block == "h3" else silu(conv)
    y = u if layer.inner == "none" else s6(p, layer, u) if layer.inner == "s6" else linear(p, layer, u)
    if layer.block == "h3":
        y = streams[0] * y
    elif layer.block == "mamba":
        y = y * silu(streams[1])
    return y @ p["out_proj.weight"].T


@blocks
@choices
def test_layer_is_its_equations(block: str, kind: str) -> None:
    layer = make(block, kind)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    truth = torch.stack([torch.from_numpy(oracle(layer, row.numpy())) for row in x])
    assert relative(layer(x).output, truth) <= 1e-12


# ------------------------------------------------------------------------------------- cut, packed, padded, again


@blocks
@choices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cut_is_whole_is_steps(block: str, kind: str, dtype: torch.dtype) -> None:
    layer = make(block, kind, dtype)
    x, before = torch.randn(2, LENGTH, WIDTH, dtype=dtype), random_state(layer, 2)
    whole = layer(x, before)
    first = layer(x[:, :4], before)
    second = layer(x[:, 4:], first.state)
    steps, state = [], before
    for t in range(LENGTH):
        output, state = layer.step(x[:, t], state)
        steps.append(output)
    for output, after in (
        (torch.cat([first.output, second.output], 1), second.state),
        (torch.stack(steps, 1), state),
    ):
        assert relative(output, whole.output) <= bound(layer)
        assert relative(after.conv, whole.state.conv) <= bound(layer)
        assert relative(after.ssm, whole.state.ssm) <= bound(layer)
        assert after.ssm.dtype == before.ssm.dtype
    assert layer(x).state is None
    assert relative(layer(x, layer.init_state(2)).output, layer(x).output) <= bound(layer)


@blocks
@choices
def test_packed_is_apart(block: str, kind: str) -> None:
    layer = make(block, kind)
    cuts = [0, 3, 3, 4, 9, LENGTH]
    x, cu_seqlens = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64), torch.tensor(cuts)
    parts = [x[:, a:b] for a, b in itertools.pairwise(cuts)]
    alone = torch.cat([layer(part).output for part in parts if part.shape[1]], 1)
    assert relative(layer(x, cu_seqlens=cu_seqlens).output, alone) <= bound(layer)
    before = random_state(layer, 5)
    together = layer(x, before, cu_seqlens=cu_seqlens)
    for i, part in enumerate(parts):
        own = MambaState(before.conv[i : i + 1], before.ssm[i : i + 1])
        one = layer(part, own) if part.shape[1] else None
        after = own if one is None else one.state
        assert relative(together.state.ssm[i : i + 1], after.ssm) <= bound(layer)
        assert relative(together.state.conv[i : i + 1], after.conv) <= bound(layer)
        if one is not None:
            assert relative(together.output[:, cuts[i] : cuts[i + 1]], one.output) <= bound(layer)


@choices
def test_a_sequence_does_not_see_its_neighbour_in_the_line(kind: str) -> None:
    layer = make("mamba", kind)
    x = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    x[:, 5:] = math.nan
    output = layer(x, cu_seqlens=torch.tensor([0, 5, LENGTH])).output
    assert not output[:, :5].isnan().any()


@blocks
@choices
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "from a state"])
def test_padding_is_as_if_it_were_not_there(block: str, kind: str, with_state: bool) -> None:
    layer = make(block, kind)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    x[mask == 0] = math.nan
    state = random_state(layer, 3) if with_state else None
    output, after = layer(x, state, mask)
    assert (output[mask == 0] == 0).all()
    for row in range(3):
        real = mask[row] != 0
        own = None if state is None else MambaState(state.conv[row : row + 1], state.ssm[row : row + 1])
        if real.any():
            alone = layer(x[row : row + 1, real], own)
            assert relative(output[row, real], alone.output[0]) <= bound(layer)
            own = alone.state
        if own is not None:
            assert relative(after.ssm[row : row + 1], own.ssm) <= bound(layer)


@blocks
@choices
def test_gradcheck_with_a_state_in_and_out(block: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = Mamba(2, block=block, dtype=torch.float64, d_conv=2, **{"d_state": 2, **MAPS[kind]})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    state = random_state(layer, 2)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, conv: Tensor, ssm: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, parameters, strict=True))
        output, after = torch.func.functional_call(layer, given, (x, MambaState(conv, ssm)))
        return output, after.conv, after.ssm

    inputs = (x, state.conv.requires_grad_(), state.ssm.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs)


@blocks
@choices
def test_steps_have_the_gradients_of_one_pass(block: str, kind: str) -> None:
    layer = make(block, kind)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    given = [x, *layer.parameters()]
    whole = torch.autograd.grad((layer(x).output * weight).sum(), given)
    state, outputs = layer.init_state(2), []
    for t in range(5):
        output, state = layer.step(x[:, t], state)
        outputs.append(output)
    stepped = torch.autograd.grad((torch.stack(outputs, 1) * weight).sum(), given)
    for a, b in zip(stepped, whole, strict=True):
        assert relative(a, b) <= 1e-11


@blocks
@choices
@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_gradients_are_the_same_to_the_bit(block: str, kind: str, packed: bool) -> None:
    layer = make(block, kind, torch.float32)
    x = torch.randn(1, LENGTH, WIDTH, requires_grad=True)
    cu_seqlens = torch.tensor([0, 4, LENGTH]) if packed else None

    def gradients(policy: str) -> tuple[Tensor, ...]:
        output = layer(x, cu_seqlens=cu_seqlens, recompute=policy).output
        return output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])

    plain = gradients("none")
    for policy in ("cheap", "block"):
        assert all(torch.equal(a, b) for a, b in zip(gradients(policy), plain, strict=True))


@choices
def test_as_many_rows_as_channels_are_not_taken_for_a_fixed_matrix(kind: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        layer = make("mamba", kind, dtype)
        rows = layer.d_inner
        x, state = torch.randn(rows, WIDTH, dtype=dtype), random_state(layer, rows)
        output, after = layer.step(x, state)
        few = layer.step(x[:5], MambaState(state.conv[:5], state.ssm[:5]))
        eps = torch.finfo(dtype).eps
        assert relative(output[:5], few.output) <= 4 * eps
        assert relative(after.ssm[:5], few.state.ssm) <= 4 * eps


@blocks
@choices
def test_narrow_activations_keep_a_wide_state(block: str, kind: str) -> None:
    layer = make(block, kind, torch.bfloat16)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.bfloat16)
    output, after = layer(x, layer.init_state(2))
    assert output.dtype == torch.bfloat16
    assert after.ssm.dtype in (torch.float32, torch.complex64)
    wide = make(block, kind)
    wide.load_state_dict(layer.state_dict())
    assert relative(output.double(), wide(x.double()).output) <= 0.03
    stepped, _ = layer.step(x[:, 0], layer.init_state(2))
    assert relative(stepped.double(), output[:, 0].double()) <= 0.03


# --------------------------------------------------------------------------------------- what each choice takes away


def scanned(layer: Mamba, x: Tensor, monkeypatch: pytest.MonkeyPatch, step: bool) -> dict[str, Tensor]:
    """B, C and the step sizes that the layer hands to its op for an input, at two positions of one sequence."""
    seen: dict[str, Any] = {}
    op = module.selective_state_update if step else module.selective_scan

    def spy(*given: Any, **named: Any) -> Any:
        dt, B, C = (given[2], given[4], given[5]) if step else (given[1], given[3], given[4])
        bias = named["dt_bias"]
        seen.update(B=B, C=C, dt=nn.functional.softplus(dt + bias))
        return op(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, op.__name__, spy)
        layer.step(x[:, 0], layer.init_state(len(x))) if step else layer(x)
    return seen


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("complex_too", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("selective", ["none", "B", "C", "dt", "B,C", "C,dt", "dt,B", "B,C,dt"])
def test_only_what_is_selective_depends_on_the_input(
    selective: str, complex_too: bool, step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    A_init = "s4d-lin" if complex_too else "s4d-real"
    layer = Mamba(WIDTH, d_state=4, selective=selective, A_init=A_init, dtype=torch.float64)
    one, other = (scanned(layer, torch.randn(2, 3, WIDTH, dtype=torch.float64), monkeypatch, step) for _ in range(2))
    for name in ("B", "C", "dt"):
        assert torch.equal(one[name], other[name]) == (name not in selective.split(","))
    # What is fixed is learned, and it is there in place of a part of x_proj.
    names = {name for name, _ in layer.named_parameters()}
    assert names >= {{"dt": "dt_bias"}.get(name, name) for name in {"B", "C", "dt"} - set(selective.split(","))}
    assert ("x_proj.weight" in names) == (selective != "none")


def test_a_fixed_step_is_one_number_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = Mamba(WIDTH, dt_rank="none")
    dt = scanned(layer, torch.randn(2, 3, WIDTH), monkeypatch, step=False)["dt"]
    assert relative(dt, nn.functional.softplus(layer.dt_bias).expand(2, 3, -1)) <= 1e-6
    assert ((dt >= 0.001 * 0.999) & (dt <= 0.1 * 1.001)).all()


@pytest.mark.parametrize("kind", ["s4", "s4d", "s4d-real", "none", "no part selects", "complex, C selects"])
def test_maps_that_do_not_select_are_linear_and_the_same_at_all_times(kind: str) -> None:
    """Of an ungated layer without activation, what stands after the convolution: S6 isn't, the others are."""
    layer = make("ungated", kind)
    u, other = (torch.randn(1, LENGTH, layer.d_inner, dtype=torch.float64) for _ in range(2))

    def run(u: Tensor) -> Tensor:
        if layer.inner == "s6":
            return layer._run_s6(u, None, None, None)[0]
        return u if layer.inner == "none" else module.run_linear(layer.ssm, u, None, None)[0]

    selects = kind == "complex, C selects"
    assert (relative(run(2 * u + 3 * other), 2 * run(u) + 3 * run(other)) <= 1e-12) != selects
    later = torch.cat([torch.zeros_like(u[:, :2]), u[:, :-2]], 1)
    assert relative(run(later)[:, 2:], run(u)[:, :-2]) <= 1e-12  # nothing selects by position


@choices
def test_the_gate_is_what_ungated_lacks_and_h3_multiplies(kind: str) -> None:
    """Half of in_proj is the gate: at 0 it closes; H3's q and v close it too; an ungated layer has no such half."""
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    for block, streams in (("mamba", [1]), ("h3", [0, 2])):
        for closed in streams:
            layer = make(block, kind)
            rows = slice(closed * layer.d_inner, (closed + 1) * layer.d_inner)
            with torch.no_grad():
                layer.in_proj.weight[rows] = 0
            assert layer.in_proj.out_features == BLOCKS[block] * layer.d_inner
            assert (layer(x).output == 0).all()
    layer = make("ungated", kind)
    assert layer.in_proj.out_features == layer.d_inner
    assert relative(layer(2 * x).output, layer(x).output) > 0.1


# ---------------------------------------------------------------------------------------------------- initial values


def test_initial_A() -> None:
    n = torch.arange(4.0, dtype=torch.float64)
    for A_init, real, imaginary in (
        ("s4d-real", -(n + 1), None),
        ("constant", torch.full((4,), -0.5, dtype=torch.float64), None),
        ("s4d-lin", torch.full((2,), -0.5, dtype=torch.float64), n[:2]),
    ):
        A = Mamba(3, d_state=4, A_init=A_init, dtype=torch.float64)._A()
        assert relative(A.real if A.is_complex() else A, real.expand(6, -1)) <= 1e-15
        assert A.is_complex() == (imaginary is not None)
        if imaginary is not None:
            assert torch.equal(A.imag, imaginary.expand(6, -1))
    torch.manual_seed(0)
    log, nothing = initial_A("random", 500, 100, dtype=torch.float64)
    assert nothing is None
    assert abs(float(log.mean())) < 0.02
    assert abs(float(log.std()) - 1) < 0.02  # -exp(N(0, 1)), each entry by itself
    assert torch.equal(Mamba(3, A_init="random")._A() < 0, torch.ones(6, 16, dtype=torch.bool))


def test_fixed_matrices_start_as_in_s4d() -> None:
    torch.manual_seed(0)
    real = Mamba(64, d_state=64, selective="none")
    assert (real.B == 1).all()
    assert abs(float(real.C.detach().std()) - 1) < 0.05
    pair = Mamba(64, d_state=64, selective="none", A_init="s4d-lin")
    assert (pair.B[..., 0] == 1).all()
    assert (pair.B[..., 1] == 0).all()
    assert abs(float(pair.C.detach().std()) - math.sqrt(0.5)) < 0.05


@blocks
@choices
def test_a_layer_from_the_meta_device_has_initial_values_as_any_other(block: str, kind: str) -> None:
    fields = {"block": block, "d_state": 4, **MAPS[kind]}
    layer = Mamba(WIDTH, **fields, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    torch.manual_seed(1)
    layer.reset_parameters()
    again = Mamba(WIDTH, **fields)
    torch.manual_seed(1)
    again.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))
    assert layer.state_dict().keys() == again.state_dict().keys()


@pytest.mark.parametrize("inner", ["s4", "s4d", "s4d-real"])
def test_marks_of_the_system_outlive_loading(inner: str) -> None:
    """S4's own parameters are trained at 0.001 at most and not decayed, also where loading puts others in place."""
    made = Mamba(WIDTH, inner=inner, d_state=4)

    def marked(layer: Mamba) -> set[str]:
        return {n for n, p in layer.named_parameters() if getattr(p, "_max_lr", None) and p._no_weight_decay}  # type: ignore[attr-defined]

    assert {"ssm.log_dt", "ssm.log_A_real", "ssm.B"} <= marked(made)
    loaded = Mamba(WIDTH, inner=inner, d_state=4, device="meta")
    loaded.load_state_dict(made.state_dict(), assign=True)
    assert marked(loaded) == marked(made)
    empty = Mamba(WIDTH, inner=inner, d_state=4, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert marked(empty) == marked(made)


# ------------------------------------------------------------------------------------------------ the published layer


def test_the_default_layer_is_the_published_one() -> None:
    layer = Mamba(8, d_state=3)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "A_log": (16, 3),
        "D": (16,),
        "in_proj.weight": (32, 8),
        "conv1d.weight": (16, 1, 4),
        "conv1d.bias": (16,),
        "x_proj.weight": (7, 16),
        "dt_proj.weight": (16, 1),
        "dt_proj.bias": (16,),
        "out_proj.weight": (8, 16),
    }


def test_the_default_layer_draws_the_numbers_that_it_always_drew() -> None:
    torch.manual_seed(3)
    layer = Mamba(8, d_state=3)
    torch.manual_seed(3)
    in_proj, conv = nn.Linear(8, 32, bias=False), nn.Conv1d(16, 16, 4, groups=16, padding=3)
    x_proj, _, out_proj = nn.Linear(16, 7, bias=False), nn.Linear(1, 16), nn.Linear(16, 8, bias=False)
    spread = torch.empty(16, 1).uniform_(-1, 1)
    dt = torch.exp(torch.rand(16) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    for ours, theirs in (
        (layer.in_proj.weight, in_proj.weight),
        (layer.conv1d.weight, conv.weight),
        (layer.conv1d.bias, conv.bias),
        (layer.x_proj.weight, x_proj.weight),
        (layer.out_proj.weight, out_proj.weight),
        (layer.dt_proj.weight, spread),
        (layer.dt_proj.bias, dt + torch.log(-torch.expm1(-dt))),
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fields", [{"selective": "dt, C,B"}, {"A_init": "constant"}, {"A_init": "random"}], ids=str)
def test_other_words_for_the_published_layer_give_its_bits(fields: dict[str, Any]) -> None:
    plain, other = Mamba(WIDTH), Mamba(WIDTH, **fields)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, LENGTH, WIDTH)
    assert torch.equal(plain(x).output, other(x).output)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"block": "mambo"}, "block must be one of mamba, h3, ungated, got 'mambo'; did you mean 'mamba'"),
        ({"inner": "s5"}, "inner must be one of .*got 's5'"),
        ({"inner": None}, "inner must be one of .*got None"),
        ({"A_init": "s4d-inv"}, "A_init must be one of .*got 's4d-inv'; did you mean 's4d-lin'"),
        ({"selective": "B,D"}, "selective must be 'B,C,dt', some of its parts, or 'none', got 'B,D'"),
        ({"selective": "B,B"}, "selective must be"),
        ({"selective": ""}, "selective must be"),
        ({"selective": ["B"]}, "selective must be"),
        ({"inner": "s4", "selective": "B"}, "selective must be 'B,C,dt' with inner 's4', got 'B'"),
        ({"inner": "none", "A_init": "random"}, "A_init must be 's4d-real' with inner 'none', got 'random'"),
        ({"inner": "s4d", "dt_rank": 3}, "dt_rank must be 'auto' with inner 's4d', got 3"),
        ({"inner": "s4d-real", "mixer_rms_eps": 1e-6}, "mixer_rms_eps must be None with inner 's4d-real'"),
        ({"inner": "s4", "d_state": 5}, "d_state must be even with inner 's4', got 5"),
        ({"A_init": "s4d-lin", "d_state": 1}, "d_state must be even with A_init 's4d-lin', got 1"),
        ({"dt_rank": "full"}, "dt_rank must be 'auto', 'none' or an integer"),
    ],
    ids=str,
)
def test_choices_that_make_no_sense_are_named(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^Mamba: {text}") as caught:
        Mamba(WIDTH, **fields)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


def test_a_state_of_another_kind_is_named() -> None:
    layer, other = make("mamba", "complex"), make("mamba", "s6")
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"state.ssm must be \(2, 12, 2\), got \(2, 12, 4\)"):
        layer.step(x, other.init_state(2))
    conv, ssm = layer.init_state(2)
    with pytest.raises(DTypeError, match=r"state.ssm must be complex, got torch.float64; make it with init_state"):
        layer.step(x, MambaState(conv, ssm.real))


def test_a_named_backend_without_complex_A_says_so() -> None:
    layer = Mamba(WIDTH, A_init="s4d-lin", backend="cuda")
    with pytest.raises(BackendUnavailableError):
        layer(torch.randn(1, 3, WIDTH))


def test_every_word_is_tested() -> None:
    assert {fields.get("inner", "s6") for fields in MAPS.values()} == set(INNER_MAPS)
    assert {fields.get("A_init", "s4d-real") for fields in MAPS.values()} == set(A_INITS)


def test_a_layer_shows_what_it_is() -> None:
    assert "block" not in repr(Mamba(WIDTH))
    shown = repr(Mamba(WIDTH, block="h3", selective="C", A_init="s4d-lin"))
    assert "block='h3', inner='s6', selective='C', A_init='s4d-lin'" in shown
