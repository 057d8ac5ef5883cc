"""The layer's forward and backward pass, written out, over kernels for its convolution and its scan.

Nothing here is specific to a device. In place of what autograd would do, no half of in_proj's output is copied, the
gradients of its halves are written into one tensor, and gradients meet inside of a matrix product.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["POLICIES", "Kept", "Kernels", "LayerGradients", "LayerWeights", "Normed", "backward", "forward", "rehearse"]

# What a policy keeps of a layer between the passes, beside the layer's input or what that is made again from. dt_proj's
# output is as large as the convolution's, and one product over a few dozen columns makes it: nobody keeps it.
POLICIES: dict[str, tuple[str, ...]] = {
    "none": ("xz", "u", "x_dbl", "checkpoints"),
    "cheap": ("xz", "x_dbl", "checkpoints"),
    "block": (),
}


class LayerWeights(NamedTuple):
    """The layer's parameters in any float dtype: in_proj (2 d_inner, d_model), conv (d_inner, d_conv), x_proj (dt_rank
    + 2 d_state, d_inner), dt_proj (d_inner, dt_rank), A (d_inner, d_state, negative), D (d_inner,), out_proj (d_model,
    d_inner); the biases have one number a row of what they belong to."""

    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    out_proj: Tensor
    out_bias: Tensor | None


class Normed(NamedTuple):
    """What the layer's input is made again from: it is rms_norm(stream) * weight."""

    stream: Tensor
    weight: Tensor
    eps: float


class Kept(NamedTuple):
    """What stays between the passes; None is made again."""

    xz: Tensor | None = None  # in_proj's output (batch, length, 2 d_inner)
    u: Tensor | None = None  # the convolution's
    x_dbl: Tensor | None = None  # x_proj's: dt_rank numbers for the step, B, C
    checkpoints: Tensor | None = None  # the scan's


class LayerGradients(NamedTuple):
    """Of the input and of every weight; None where it isn't wanted."""

    x: Tensor | None
    in_proj: Tensor | None
    in_bias: Tensor | None
    conv: Tensor | None
    conv_bias: Tensor | None
    x_proj: Tensor | None
    dt_proj: Tensor | None
    dt_bias: Tensor | None
    A: Tensor | None
    D: Tensor | None
    out_proj: Tensor | None
    out_bias: Tensor | None


class Kernels(Protocol):
    """The layer's convolution (with SiLU) and scan (with gate, D, bias and softplus) and their backward passes."""

    def norm_again(self, source: Normed, dtype: torch.dtype) -> Tensor:
        """rms_norm(stream) * weight in `dtype`, to the bits that the norm gave."""
        ...

    def conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """y of `causal_conv1d`; x may be half of a tensor."""
        ...

    def conv_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, dx: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Writes dx, which may be half of a tensor; gives the gradients of weight and bias."""
        ...

    def scan_forward(
        self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, w: LayerWeights, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y and checkpoints."""
        ...

    def scan_backward(
        self,
        dy: Tensor,
        checkpoints: Tensor,
        u: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        w: LayerWeights,
        cu_seqlens: Tensor | None,
        dz: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Writes dz, which may be half of a tensor; gives y again, du, ddt and the gradients of B, C, A, D, dt_bias."""
        ...


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _weight_gradient(dy: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """dy^T x over all positions: for 16-bit factors a float32 sum, which is not rounded on its way to a wide weight."""
    a, b = _flat(dy).T, _flat(x)
    if a.is_cuda and a.dtype.itemsize == 2 and like.dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload]
    return torch.mm(a, b).to(like.dtype)


def _bias_gradient(dy: Tensor, like: Tensor) -> Tensor:
    return _flat(dy).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(like.dtype)


class _Inside(NamedTuple):
    xz: Tensor
    u: Tensor
    x_dbl: Tensor
    dt: Tensor

    def split(self, w: LayerWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(half of xz before the convolution, the gate z, B, C), all views."""
        inner, rank, state = w.A.shape[0], w.dt_proj.shape[1], w.A.shape[1]
        return (
            self.xz[..., :inner],
            self.xz[..., inner:],
            self.x_dbl[..., rank : rank + state],
            self.x_dbl[..., rank + state :],
        )


def _inside(k: Kernels, x: Tensor | None, w: LayerWeights, cu_seqlens: Tensor | None, kept: Kept) -> _Inside:
    """Everything up to the scan; what is kept is taken."""
    xz = kept.xz
    if xz is None:
        assert x is not None
        xz = _linear(x, w.in_proj, w.in_bias)
    u = kept.u
    if u is None:
        u = k.conv_forward(xz[..., : w.A.shape[0]], w.conv, w.conv_bias, cu_seqlens)
    x_dbl = _linear(u, w.x_proj) if kept.x_dbl is None else kept.x_dbl
    dt = _linear(x_dbl[..., : w.dt_proj.shape[1]], w.dt_proj)
    return _Inside(xz, u, x_dbl, dt)


def forward(
    k: Kernels, x: Tensor, w: LayerWeights, cu_seqlens: Tensor | None, keep: tuple[str, ...]
) -> tuple[Tensor, Kept]:
    """The layer over (batch, length, d_model), in x's dtype, and what `keep` names."""
    inside = _inside(k, x, w, cu_seqlens, Kept())
    _, z, B, C = inside.split(w)
    y, checkpoints = k.scan_forward(inside.u, inside.dt, B, C, z, w, cu_seqlens)
    made = {**inside._asdict(), "checkpoints": checkpoints}
    kept = Kept(**{name: made[name] for name in keep})
    del inside, made, z, B, C, checkpoints
    return _linear(y, w.out_proj, w.out_bias), kept


def backward(
    k: Kernels,
    dout: Tensor,
    x: Tensor | Normed,
    w: LayerWeights,
    cu_seqlens: Tensor | None,
    kept: Kept,
    wanted: LayerGradients | tuple[bool, ...],
) -> LayerGradients:
    """The gradients of `forward`, given that of its output; `wanted` has a bool for each."""
    want = LayerGradients(*wanted)  # type: ignore[arg-type]
    inner, rank = w.A.shape[0], w.dt_proj.shape[1]

    def input_() -> Tensor:
        return k.norm_again(x, dout.dtype) if isinstance(x, Normed) else x

    again = input_() if kept.xz is None else None
    inside = _inside(k, again, w, cu_seqlens, kept)
    before, z, B, C = inside.split(w)
    xz, u, x_dbl, dt = inside
    checkpoints = kept.checkpoints
    if checkpoints is None:
        checkpoints = k.scan_forward(u, dt, B, C, z, w, cu_seqlens)[1]

    dy = torch.matmul(dout, w.out_proj.to(dout.dtype))
    d_xz = torch.empty_like(xz)
    y, du, ddt, dB, dC, dA, dD, d_dt_bias = k.scan_backward(
        dy, checkpoints, u, dt, B, C, z, w, cu_seqlens, d_xz[..., inner:]
    )
    del dy, dt, inside, checkpoints
    d_out_proj = _weight_gradient(dout, y, w.out_proj) if want.out_proj else None
    del y
    d_dbl = torch.empty_like(x_dbl)
    flat_dbl = _flat(d_dbl)
    torch.mm(_flat(ddt), w.dt_proj.to(ddt.dtype), out=flat_dbl[:, :rank])
    d_dbl[..., rank : rank + w.A.shape[1]] = dB
    d_dbl[..., rank + w.A.shape[1] :] = dC
    d_dt_proj = _weight_gradient(ddt, x_dbl[..., :rank], w.dt_proj) if want.dt_proj else None
    del ddt, x_dbl, B, C, dB, dC
    d_x_proj = _weight_gradient(d_dbl, u, w.x_proj) if want.x_proj else None
    del u
    # What comes by way of x_proj is added inside of the product, before it is rounded.
    flat_du = _flat(du)
    torch.addmm(flat_du, flat_dbl, w.x_proj.to(du.dtype), out=flat_du)
    d_conv, d_conv_bias = k.conv_backward(du, before, w.conv, w.conv_bias, cu_seqlens, d_xz[..., :inner])
    del du, flat_du
    d_in_proj = None
    if want.in_proj:
        d_in_proj = _weight_gradient(d_xz, input_() if again is None else again, w.in_proj)
    del again
    return LayerGradients(
        x=torch.matmul(d_xz, w.in_proj.to(d_xz.dtype)) if want.x else None,
        in_proj=d_in_proj,
        in_bias=_bias_gradient(d_xz, w.in_bias) if want.in_bias and w.in_bias is not None else None,
        conv=d_conv.to(w.conv.dtype) if want.conv else None,
        conv_bias=d_conv_bias.to(w.conv_bias.dtype)
        if want.conv_bias and d_conv_bias is not None and w.conv_bias is not None
        else None,
        x_proj=d_x_proj,
        dt_proj=d_dt_proj,
        dt_bias=d_dt_bias.to(w.dt_bias.dtype) if want.dt_bias else None,
        A=dA.to(w.A.dtype) if want.A else None,
        D=dD.to(w.D.dtype) if want.D else None,
        out_proj=d_out_proj,
        out_bias=_bias_gradient(dout, w.out_bias) if want.out_bias and w.out_bias is not None else None,
    )


def rehearse(k: Kernels, x: Tensor, w: LayerWeights, cu_seqlens: Tensor | None, normed: Normed | None) -> None:
    """Calls the kernels of `forward` and `backward` in x's dtype with tensors that lie as theirs do, and does nothing
    else.

    Args:
        x: (batch, length, d_model), the layer's input; only its layout is asked for.
        normed: what the input is made again from; None where it is kept.
    """
    xz = x.new_empty(*x.shape[:2], w.in_proj.shape[0])
    u, dt, dy, du = (x.new_empty(*x.shape[:2], w.A.shape[0]) for _ in range(4))
    inside, d_xz = _Inside(xz, u, x.new_empty(*x.shape[:2], w.x_proj.shape[0]), dt), torch.empty_like(xz)
    before, z, B, C = inside.split(w)
    _, dz, _, _ = inside._replace(xz=d_xz).split(w)
    if normed is not None:
        k.norm_again(normed, x.dtype)
    k.conv_forward(before, w.conv, w.conv_bias, cu_seqlens)
    checkpoints = k.scan_forward(u, dt, B, C, z, w, cu_seqlens)[1]
    k.scan_backward(dy, checkpoints, u, dt, B, C, z, w, cu_seqlens, dz)
    k.conv_backward(du, before, w.conv, w.conv_bias, cu_seqlens, d_xz[..., : w.A.shape[0]])
