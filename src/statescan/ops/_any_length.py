"""Operators for lengths that are symbols, as in `torch.export` with a dynamic dimension.

The long convolution and the kernels of S4 and S4D take sizes of tables, numbers of squarings and lengths of transforms
from the length, which no symbol can tell. Such a call becomes one operator, which makes the call when it runs and the
length is a number: the results are those of the call itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from statescan.errors import BackendUnavailableError

__all__ = ["define", "is_symbol"]

_LAZY = (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative)


def is_symbol(length: int | torch.SymInt) -> bool:
    """Whether this length is known only when an exported program runs. (torch.compile's tracer takes it for a number,
    and compiles again for another one where it has to know.)"""
    return isinstance(length, torch.SymInt)


def define(name: str, schema: str, tensors: int, call: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes ``statescan::<name>`` and its gradients, ``statescan::<name>_backward``.

    Args:
        name: of the operator.
        schema: its arguments and results; the tensors, which may be optional, come first.
        tensors: how many arguments these are.
        call: the operator's work. It differentiates by autograd; gradients are found by doing it again.
        fake: its results' sizes, for tensors without values.
    """
    rest = schema[schema.index("(") + 1 : schema.index(")")].split(", ")[tensors:]
    backward_schema = f"({', '.join(['Tensor?[] inputs', 'Tensor[] grads', *rest])}) -> Tensor[]"

    def forward(*arguments: Any) -> Any:
        with torch.no_grad(), _views_that_negate():
            found = call(*arguments)
            return _plain(found) if isinstance(found, Tensor) else tuple(_plain(part) for part in found)

    def backward(inputs: list[Tensor | None], grads: list[Tensor], *settings: Any) -> list[Tensor]:
        with torch.enable_grad(), _views_that_negate():
            leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
            found = call(*leaves, *settings)
            found = [found] if isinstance(found, Tensor) else list(found)
            wanted = [x for x in leaves if x is not None]
            return [_plain(part) for part in torch.autograd.grad(found, wanted, grads, materialize_grads=True)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.settings = inputs[tensors:]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise BackendUnavailableError(
                f"{name}: a program of any length has no second derivatives; export it at one length"
            )
        inputs = list(ctx.saved_tensors)
        found = iter(getattr(torch.ops.statescan, f"{name}_backward")(inputs, list(grads), *ctx.settings))
        return (*(None if x is None else next(found) for x in inputs), *(None for _ in ctx.settings))

    operator = torch.library.custom_op(f"statescan::{name}", forward, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_autograd(differentiate, setup_context=setup_context)
    # No custom_op: what that one calls stands below autograd, where nothing can be differentiated.
    torch.library.define(f"statescan::{name}_backward", backward_schema)
    torch.library.impl(f"statescan::{name}_backward", "CompositeExplicitAutograd", backward)
    torch.library.register_fake(
        f"statescan::{name}_backward",
        lambda inputs, *_: [torch.empty_like(x).contiguous() for x in inputs if x is not None],
    )


@contextlib.contextmanager
def _views_that_negate() -> Iterator[None]:
    """Compiled programs, which have none, run with views that conjugate or negate taken for what they are views of."""
    off = [key for key in _LAZY if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in off:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        for key in off:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def _plain(x: Tensor) -> Tensor:
    """Contiguous, and no view that conjugates when it is read."""
    return x.resolve_conj().resolve_neg().contiguous()
