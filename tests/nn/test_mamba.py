"""The Mamba layer against its float64 oracle and itself: whole = prefill + steps, padded = alone, packed = apart."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError, ConfigError, DTypeError, ShapeError
from statescan.nn import CausalConv1d, Mamba, MambaState, StepProjection
from statescan.testing import model_oracle

BACKENDS = ["auto", "torch", "reference"]


def make(dtype: torch.dtype = torch.float64, backend: str = "auto", seed: int = 0, **fields) -> Mamba:
    """A layer whose every parameter is random, so that none can be left out unseen."""
    torch.manual_seed(seed)
    layer = Mamba(**{"d_model": 8, "d_state": 3, **fields}, backend=backend, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


def bound(layer: Mamba) -> float:
    """What sums taken in another order may differ by: d_inner roundings of one product, and no more."""
    return layer.d_inner * torch.finfo(layer.D.dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"d_conv": 1}, {"d_conv": 5, "d_state": 1}, {"bias": True, "conv_bias": False}, {"expand": 3, "dt_rank": 3}],
    ids=str,
)
def test_layer_is_the_oracle(backend: str, fields: dict) -> None:
    layer = make(backend=backend, **fields)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    parameters = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    truth = torch.stack([torch.from_numpy(model_oracle.layer(parameters, row.numpy())) for row in x])
    assert relative(layer(x).output, truth) <= 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_a_state_in_and_out(backend: str) -> None:
    layer = make(backend=backend, d_model=4, d_state=2)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    conv = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    ssm = torch.randn(2, 8, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, conv: Tensor, ssm: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, parameters, strict=True))
        output, state = torch.func.functional_call(layer, given, (x, MambaState(conv, ssm)))
        return output, state.conv, state.ssm

    assert torch.autograd.gradcheck(run, (x, conv, ssm, *layer.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_differentiable_and_their_gradients_those_of_one_pass(backend: str) -> None:
    layer = make(backend=backend)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 8, dtype=torch.float64)

    def gradients(output: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((output * weight).sum(), [x, *layer.parameters()]))

    whole = gradients(layer(x).output)
    state = layer.init_state(2)
    outputs = []
    for t in range(5):
        before = MambaState(state.conv.clone(), state.ssm.clone())
        output, after = layer.step(x[:, t], state)
        assert torch.equal(before.conv, state.conv)
        assert torch.equal(before.ssm, state.ssm)
        outputs.append(output)
        state = after
    for a, b in zip(gradients(torch.stack(outputs, 1)), whole, strict=True):
        assert relative(a, b) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cuts", [[1], [2, 3], [5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], ids=str)
def test_cut_anywhere_is_whole(backend: str, dtype: torch.dtype, cuts: list[int]) -> None:
    layer = make(dtype, backend)
    x = torch.randn(2, 11, 8, dtype=dtype)
    whole = layer(x, layer.init_state(2))
    parts, state = [], layer.init_state(2)
    for part in x.tensor_split(cuts, 1):
        output, state = layer(part, state)
        parts.append(output)
    assert relative(torch.cat(parts, 1), whole.output) <= bound(layer)
    assert torch.equal(state.conv, whole.state.conv) or relative(state.conv, whole.state.conv) <= bound(layer)
    assert relative(state.ssm, whole.state.ssm) <= bound(layer)


def test_no_state_goes_in_none_comes_out() -> None:
    layer = make()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert layer(x).state is None
    assert relative(layer(x, layer.init_state(2)).output, layer(x).output) <= bound(layer)


MASKS = {
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1]],
    "an empty row": [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]],
    "no padding": [[1] * 6] * 3,
    "padding alone": [[0] * 6] * 3,
}


@pytest.mark.parametrize("kind", [torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "from a state"])
@pytest.mark.parametrize("name", MASKS)
def test_padding_is_as_if_it_were_not_there(name: str, with_state: bool, kind: torch.dtype) -> None:
    layer = make()
    mask = torch.tensor(MASKS[name]).to(kind)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    x[mask == 0] = math.nan
    state = None
    if with_state:
        state = MambaState(*(torch.randn_like(part) for part in layer.init_state(3)))
    output, after = layer(x, state, mask)
    assert (output[mask == 0] == 0).all()
    for row in range(3):
        real = mask[row] != 0
        before = None if state is None else MambaState(state.conv[row : row + 1], state.ssm[row : row + 1])
        if not real.any():
            if state is not None:
                assert torch.equal(after.ssm[row], state.ssm[row])
                assert torch.equal(after.conv[row], state.conv[row])
            continue
        alone = layer(x[row : row + 1, real], before)
        assert relative(output[row, real], alone.output[0]) <= bound(layer)
        if state is not None:
            assert relative(after.ssm[row], alone.state.ssm[0]) <= bound(layer)
            assert relative(after.conv[row], alone.state.conv[0]) <= bound(layer)


def test_gradients_do_not_see_padding() -> None:
    layer = make()
    mask = torch.tensor(MASKS["holes"]).bool()
    x = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    (padded,) = torch.autograd.grad(layer(x, mask=mask).output.square().sum(), x)
    assert (padded[~mask] == 0).all()
    for row in range(3):
        (alone,) = torch.autograd.grad(layer(x[row : row + 1, mask[row]]).output.square().sum(), x)
        assert relative(padded[row], alone[row]) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [[0, 9], [0, 4, 9], [0, 1, 1, 2, 9], [0, 0, 5, 9, 9]], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_packed_is_separate(backend: str, offsets: list[int], kind: torch.dtype) -> None:
    layer = make(backend=backend)
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    rows = len(offsets) - 1
    state = MambaState(*(torch.randn_like(part) for part in layer.init_state(rows)))
    packed = layer(x, state, cu_seqlens=torch.tensor(offsets, dtype=kind))
    for i in range(rows):
        start, end = offsets[i], offsets[i + 1]
        before = MambaState(state.conv[i : i + 1], state.ssm[i : i + 1])
        if start == end:
            assert torch.equal(packed.state.ssm[i], before.ssm[0])
            continue
        alone = layer(x[:, start:end], before)
        assert relative(packed.output[:, start:end], alone.output) <= bound(layer)
        assert relative(packed.state.ssm[i], alone.state.ssm[0]) <= bound(layer)
        assert relative(packed.state.conv[i], alone.state.conv[0]) <= bound(layer)


def test_published_names_shapes_and_initial_values() -> None:
    torch.manual_seed(0)
    layer = Mamba(768)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "A_log": (1536, 16),
        "D": (1536,),
        "in_proj.weight": (3072, 768),
        "conv1d.weight": (1536, 1, 4),
        "conv1d.bias": (1536,),
        "x_proj.weight": (80, 1536),
        "dt_proj.weight": (1536, 48),
        "dt_proj.bias": (1536,),
        "out_proj.weight": (768, 1536),
    }
    assert torch.equal(layer.A_log, torch.arange(1, 17).float().log().expand(1536, 16))
    assert torch.equal(layer.D, torch.ones(1536))
    dt = torch.nn.functional.softplus(layer.dt_proj.bias.double())
    assert 0.001 * (1 - 1e-5) <= dt.min() <= 0.00102
    assert 0.098 <= dt.max() <= 0.1 * (1 + 1e-5)
    # spread evenly in the logarithm: each decade has half of them
    assert abs(float((dt < 0.01).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(1536)
    spread = 48**-0.5
    assert layer.dt_proj.weight.abs().max() <= spread
    assert float(layer.dt_proj.weight.detach().std()) == pytest.approx(spread / math.sqrt(3), rel=0.02)
    for weight, inputs in ((layer.in_proj.weight, 768), (layer.x_proj.weight, 1536), (layer.conv1d.weight, 4)):
        assert weight.abs().max() <= inputs**-0.5
        assert float(weight.detach().std()) == pytest.approx(inputs**-0.5 / math.sqrt(3), rel=0.05)
    assert isinstance(layer.dt_proj, StepProjection)
    assert isinstance(layer.conv1d, CausalConv1d)


def test_dt_init_constant_and_floor() -> None:
    layer = Mamba(32, dt_init="constant", dt_scale=2.0, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3)
    assert torch.allclose(layer.dt_proj.weight, torch.full_like(layer.dt_proj.weight, 2 * 2**-0.5))
    assert torch.allclose(torch.nn.functional.softplus(layer.dt_proj.bias), torch.tensor(1e-3), rtol=1e-5)


def test_step_projection_leaves_its_bias_out() -> None:
    projection = StepProjection(3, 5)
    x = torch.randn(2, 3)
    assert torch.equal(projection(x), x @ projection.weight.T)


def test_low_precision_layers_keep_their_dynamics_in_float32() -> None:
    layer = Mamba(8, dtype=torch.bfloat16)
    assert layer.A_log.dtype == layer.D.dtype == torch.float32
    assert layer.in_proj.weight.dtype == torch.bfloat16
    state = layer.init_state(2)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    output, after = layer(torch.randn(2, 5, 8, dtype=torch.bfloat16), state)
    assert output.dtype == torch.bfloat16
    assert (after.conv.dtype, after.ssm.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_forward_and_steps_in_bfloat16(backend: str) -> None:
    layer = make(torch.float32, backend)
    x = torch.randn(2, 6, 8)
    exact = layer(x).output
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = layer(x)
        first, state = layer(x[:, :4], layer.init_state(2))
        second, state = layer.step(x[:, 4], state)
        third, state = layer.step(x[:, 5], state)
    assert whole.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    pieces = torch.cat([first, second[:, None], third[:, None]], 1)
    # three products in a row, each rounded to 8 bits
    assert relative(whole.float(), exact) <= 16 * torch.finfo(torch.bfloat16).eps
    assert relative(pieces.float(), exact) <= 16 * torch.finfo(torch.bfloat16).eps


def test_recompute_changes_no_bit() -> None:
    layer = make(torch.float32)
    x = torch.randn(2, 9, 8, requires_grad=True)
    results = []
    for recompute in (False, True):
        output = layer(x, recompute=recompute).output
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_halves_of_in_proj_reach_the_ops_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    import statescan.nn.mamba as module

    seen: dict[str, Tensor] = {}
    conv, scan = module.causal_conv1d, module.selective_scan

    def spy_conv(x: Tensor, *args, **named):
        seen["x"] = x
        return conv(x, *args, **named)

    def spy_scan(u: Tensor, *args, **named):
        seen["z"] = named["z"]
        return scan(u, *args, **named)

    monkeypatch.setattr(module, "causal_conv1d", spy_conv)
    monkeypatch.setattr(module, "selective_scan", spy_scan)
    make()(torch.randn(1, 3, 8, dtype=torch.float64))
    assert seen["x"].untyped_storage().data_ptr() == seen["z"].untyped_storage().data_ptr()
    assert seen["x"].stride(1) == seen["z"].stride(1) == 2 * 16


def test_meta_construction_then_reset() -> None:
    layer = Mamba(8, device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(1, 3, 8)).output).all()
    assert torch.equal(layer.D, torch.ones(16))
    assert copy.deepcopy(layer).d_inner == 16


def test_two_runs_are_equal_to_the_bit() -> None:
    layer = make(torch.float32)
    x = torch.randn(2, 33, 8, requires_grad=True)
    runs = [torch.autograd.grad(layer(x).output.square().sum(), [x, *layer.parameters()]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"d_model": 0}, "d_model"),
        ({"d_state": -1}, "d_state"),
        ({"d_conv": 2.5}, "d_conv"),
        ({"expand": 0}, "expand"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"dt_init": "zeros"}, "dt_init"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min"),
    ],
    ids=str,
)
def test_bad_arguments(fields: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Mamba(**{"d_model": 8, **fields})


def test_bad_inputs_name_argument_wanted_got_and_cure() -> None:
    layer = make()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    good = layer.init_state(2)
    with pytest.raises(ShapeError, match=r"Mamba.forward: x must be .*d_model 8, got \(2, 3, 7\)"):
        layer(x[..., :7])
    with pytest.raises(ShapeError, match=r"length >= 1.*got \(2, 0, 8\)"):
        layer(x[:, :0])
    with pytest.raises(DTypeError, match="pass embeddings, not token ids"):
        layer(x.long())
    with pytest.raises(ShapeError, match="where the layer is, got meta"):
        layer(x.to("meta"))
    with pytest.raises(ShapeError, match=r"state.conv must be \(2, 3, 16\), got \(3, 3, 16\).*init_state\(2\)"):
        layer(x, layer.init_state(3))
    with pytest.raises(ShapeError, match=r"state.ssm must be"):
        layer(x, MambaState(good.conv, good.ssm[..., :2]))
    with pytest.raises(ShapeError, match=r"Mamba.step: x must be \(batch, d_model\)"):
        layer.step(x, good)
    with pytest.raises(ShapeError, match=r"mask must be \(batch, length\) = \(2, 3\), got \(2, 4\)"):
        layer(x, mask=torch.ones(2, 4))
    with pytest.raises(DTypeError, match="mask must be bool or integer"):
        layer(x, mask=torch.ones(2, 3))
    with pytest.raises(ConfigError, match="mask and cu_seqlens exclude each other"):
        layer(x, mask=torch.ones(2, 3).bool(), cu_seqlens=torch.tensor([0, 3]))
    for wrong in ([0, 2], [1, 3], [0, 2, 1, 3]):
        with pytest.raises(ShapeError, match="cu_seqlens"):
            layer(x[:1], cu_seqlens=torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ShapeError, match="batch"):
        layer(x, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ShapeError, match="batch must be >= 1"):
        layer.init_state(0)
    with pytest.raises((ConfigError, BackendUnavailableError), match="backend"):
        make(backend="fastest")(x)


def test_oracle_itself_notices_a_flipped_sign() -> None:
    layer = make()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    parameters = {name: value.detach().numpy().copy() for name, value in layer.named_parameters()}
    for name in parameters:
        wrong = {**parameters, name: -parameters[name]}
        difference = np.abs(model_oracle.layer(wrong, x[0].numpy()) - layer(x).output[0].detach().numpy()).max()
        assert difference > 1e-6, name
