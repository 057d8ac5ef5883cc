"""The layer written out by hand against autograd over its ops, with kernels that any device has; the kernels of the
GPU are held to the same in tests/gpu/test_block.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.errors import BackendUnavailableError
from statescan.ops import add_rms_norm, causal_conv1d, selective_scan
from statescan.ops.mamba_inner import LayerWeights, api, unavailable_reason
from statescan.ops.mamba_inner.layer import POLICIES, Kept, LayerGradients, Normed, backward, forward
from statescan.testing import assert_within_budget

CU_SEQLENS = torch.tensor([0, 5, 5, 6, 13], dtype=torch.int32)


def gradients_of(outputs: Tensor, inputs: list[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    given = iter(torch.autograd.grad(outputs, [x for x in inputs if x is not None], dy))
    return [None if x is None else next(given) for x in inputs]


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().requires_grad_() for x in tensors]


class AutogradKernels:
    """The convolution and the scan by the public ops; backward passes by autograd over them."""

    def norm_again(self, source, dtype):
        # The norm computes in the stream's precision and rounds once: the way by its dtype gives the same bits.
        return add_rms_norm(source.stream, source.weight, eps=source.eps).output.to(dtype)

    def conv_forward(self, x, weight, bias, cu_seqlens):
        return causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=cu_seqlens).y

    def conv_backward(self, dy, x, weight, bias, cu_seqlens, dx):
        with torch.enable_grad():
            inputs = leaves(x, weight, bias)
            given, *rest = gradients_of(self.conv_forward(*inputs, cu_seqlens), inputs, dy)
        dx.copy_(given)
        return tuple(rest)

    def scan(self, u, dt, B, C, z, A, D, bias, cu_seqlens):
        return selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, cu_seqlens=cu_seqlens).y

    def scan_forward(self, u, dt, B, C, z, w, cu_seqlens):
        return self.scan(u, dt, B, C, z, w.A, w.D, w.dt_bias, cu_seqlens), u.new_ones(3)

    def scan_backward(self, dy, checkpoints, u, dt, B, C, z, w, cu_seqlens, dz):
        assert checkpoints.sum() == 3
        with torch.enable_grad():
            inputs = leaves(u, dt, B, C, z, w.A, w.D, w.dt_bias)
            y = self.scan(*inputs, cu_seqlens)
            du, ddt, dB, dC, given, dA, dD, d_bias = gradients_of(y, inputs, dy)
        dz.copy_(given)
        return y.detach(), du, ddt, dB, dC, dA, dD, d_bias


def problem(dtype: torch.dtype = torch.float64, biases: bool = True, batch: int = 2) -> tuple[Tensor, LayerWeights]:
    """The layer's input and weights: d_model 6, d_inner 8, d_state 3, dt_rank 2, d_conv 4."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = LayerWeights(
        draw(16, 6), draw(16) if biases else None, draw(8, 4), draw(8) if biases else None, draw(8, 8), draw(8, 2),
        draw(8), -draw(8, 3).exp(), draw(8), draw(6, 8), draw(6) if biases else None,
    )  # fmt: skip
    return draw(batch, 13, 6), weights


def composed(x: Tensor, w: LayerWeights, cu_seqlens: Tensor | None) -> Tensor:
    """The layer's ops one after the other, as `statescan.nn.Mamba` runs them."""
    before, z = F.linear(x, w.in_proj, w.in_bias).chunk(2, -1)
    u = causal_conv1d(before, w.conv, w.conv_bias, activation="silu", cu_seqlens=cu_seqlens).y
    dt, B, C = F.linear(u, w.x_proj).split([2, 3, 3], -1)
    y = selective_scan(
        u, F.linear(dt, w.dt_proj), w.A, B, C, D=w.D, z=z, dt_bias=w.dt_bias, dt_softplus=True, cu_seqlens=cu_seqlens
    ).y
    return F.linear(y, w.out_proj, w.out_bias)


def run(x: Tensor, w: LayerWeights, cu_seqlens: Tensor | None, policy: str, source: Tensor | Normed | None = None):
    """(output, gradients) of the layer written out."""
    out, kept = forward(AutogradKernels(), x, w, cu_seqlens, POLICIES[policy])
    for name, tensor in kept._asdict().items():
        assert (tensor is not None) == (name in POLICIES[policy]), name
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = [True, *(weight is not None for weight in w)]
    source = x if source is None else source
    return out, backward(AutogradKernels(), dout, source, w, cu_seqlens, kept, tuple(wanted)), dout


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_equals_its_ops_under_autograd(policy: str, biases: bool, packed: bool) -> None:
    cu_seqlens = CU_SEQLENS if packed else None
    x, w = problem(biases=biases, batch=1 if packed else 2)
    out, gradients, dout = run(x, w, cu_seqlens, policy)
    inputs = leaves(x, *w)
    wanted = composed(inputs[0], LayerWeights(*inputs[1:]), cu_seqlens)
    truth = gradients_of(wanted, inputs, dout)
    assert (out - wanted).abs().max() <= 1e-13 * wanted.abs().max()
    for name, got, want in zip(LayerGradients._fields, gradients, truth, strict=True):
        assert (got is None) == (want is None), name
        assert got is None or (got - want).norm() <= 1e-13 * want.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_within_the_budget_of_its_ops(dtype: torch.dtype, packed: bool) -> None:
    """Against float64, weights and activations of `dtype` beside A, D and the step's bias in float32."""
    cu_seqlens = CU_SEQLENS if packed else None
    columns: dict[str, list[list[Tensor]]] = {}
    for scale in (0.2, 0.3, 0.5):
        x, w = problem(torch.float32, batch=1 if packed else 2)
        narrow = LayerWeights(*(None if t is None else (t * scale).to(dtype) for t in w))
        narrow = narrow._replace(A=w.A, D=w.D * scale, dt_bias=w.dt_bias * scale)
        out, gradients, dout = run(x.to(dtype), narrow, cu_seqlens, "cheap")
        sides = [[out, *gradients]]
        for kind in (torch.float64, dtype):
            inputs = leaves(*(t if t is None or kind == dtype else t.double() for t in (x.to(dtype), *narrow)))
            y = composed(inputs[0], LayerWeights(*inputs[1:]), cu_seqlens)
            sides.append([y.detach(), *gradients_of(y, inputs, dout.to(y.dtype))])
        for name, *row in zip(("output", *LayerGradients._fields), *sides, strict=True):
            for column, entry in zip(columns.setdefault(name, [[], [], []]), row, strict=True):
                column.append(entry)
    for name, column in columns.items():
        assert_within_budget(*column, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_policy_gives_the_same_bits(dtype: torch.dtype) -> None:
    stream = problem(torch.float32)[0] * 3
    weight = torch.linspace(0.5, 1.5, 6)
    x = add_rms_norm(stream.to(dtype), weight, residual=torch.zeros_like(stream)).output
    # The stream is what the norm saw: here, as in a block, x rounded and added to the float32 stream.
    stream = stream.to(dtype).float()
    w = problem(torch.float32)[1]
    first = run(x, w, None, "none")
    for policy in ("cheap", "block"):
        for source in (None, Normed(stream, weight, 1e-5)):
            other = run(x, w, None, policy, source)
            assert torch.equal(first[0], other[0])
            for name, a, b in zip(LayerGradients._fields, first[1], other[1], strict=True):
                assert torch.equal(a, b), (policy, name)
                assert a.dtype == (dtype if name == "x" else torch.float32)


def test_only_wanted_gradients_come_out() -> None:
    x, w = problem()
    out, kept = forward(AutogradKernels(), x, w, None, POLICIES["none"])
    for index, name in enumerate(LayerGradients._fields):
        wanted = [i == index for i in range(len(LayerGradients._fields))]
        gradients = backward(AutogradKernels(), torch.ones_like(out), x, w, None, kept, tuple(wanted))
        assert [field for field, value in gradients._asdict().items() if value is not None] == [name]


def test_what_is_kept_is_what_the_policies_say() -> None:
    x, w = problem(torch.float32)
    sizes = {}
    for policy, names in POLICIES.items():
        kept = forward(AutogradKernels(), x, w, None, names)[1]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t is not None}
        sizes[policy] = sum(storages.values())
    d_inner, rank, state, item, checkpoints = 8, 2, 3, 4, 3 * 4
    tokens = 2 * 13
    narrow = rank + 2 * state
    assert sizes["none"] == tokens * item * (2 * d_inner + d_inner + narrow) + checkpoints
    assert sizes["cheap"] == tokens * item * (2 * d_inner + narrow) + checkpoints
    assert sizes["block"] == 0
    assert Kept._fields == POLICIES["none"]


def test_a_kernel_that_cannot_be_made_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_, **__):
        raise BackendUnavailableError("no compiler")

    monkeypatch.setattr(api, "mamba_inner", fails)
    monkeypatch.setattr(api, "_broken", {})
    x, w = problem(torch.float32)
    with pytest.warns(UserWarning, match="op by op instead of as one function: no compiler"):
        assert api.mamba_inner_or_none(x, w) is None
    assert api._broken == {(torch.float32, 3, 4): "no compiler"}


def test_elsewhere_the_layer_takes_its_ops() -> None:
    assert unavailable_reason("cpu", torch.float32, 16, 4) == "causal_conv1d runs on 'cpu'"
