"""Checks that the ops share: each raises one line with the op, the argument, what was wanted, what came, the cure.

Everything here looks at shapes, dtypes and devices alone, so torch.compile traces it away. The only check that reads
values is `check_cu_seqlens`, which is left out while a graph is traced.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from statescan.errors import BackendUnavailableError, ConfigError, DTypeError, ShapeError

__all__ = [
    "ACTIVATION_DTYPES",
    "COMPLEX_DTYPES",
    "as_checked",
    "assert_cu_seqlens",
    "check_cu_seqlens",
    "check_device",
    "check_dtype",
    "check_parameters",
    "check_projection",
    "check_shape",
    "check_state",
    "check_tensor",
    "in_capture",
    "is_checked",
    "mark_checked",
    "no_device",
    "refuse_second_derivative",
    "seen_and_right",
    "sequence_of",
    "state_dtypes",
    "transformed",
    "transforms_active",
    "usable_device",
    "values_readable",
    "wants_gradients",
    "without_autocast",
]

COMPLEX_DTYPES = (torch.complex64, torch.complex128)
ACTIVATION_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def check_tensor(op: str, argument: str, value: Any) -> None:
    """Raises DTypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise DTypeError(
            f"{op}: {argument} must be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor"
        )


def _transposed(argument: str, value: Tensor, wanted: tuple[int, ...]) -> str | None:
    """The call that mends a shape whose last two sizes are swapped."""
    if len(wanted) >= 2 and wanted[-1] != wanted[-2] and tuple(value.shape) == (*wanted[:-2], wanted[-1], wanted[-2]):
        return f"pass {argument}.transpose(-1, -2)"
    return None


def check_shape(
    op: str, argument: str, value: Tensor, wanted: tuple[int, ...], meaning: str, cure: str = "give it that shape"
) -> None:
    """Raises ShapeError unless `value` has the wanted shape; `meaning` names its dimensions, ``"(batch, length)"``."""
    if tuple(value.shape) != wanted:
        cure = _transposed(argument, value, wanted) or cure
        raise ShapeError(f"{op}: {argument} must have shape {meaning} = {wanted}, got {tuple(value.shape)}; {cure}")


def check_dtype(op: str, argument: str, value: Tensor, wanted: Sequence[torch.dtype], why: str = "") -> None:
    """Raises DTypeError unless the dtype is among the wanted ones; `why` says where the wish comes from."""
    if value.dtype not in wanted:
        first = str(wanted[0])
        raise DTypeError(
            f"{op}: {argument} must be {_names(wanted)}{f' ({why})' if why else ''}, "
            f"got {str(value.dtype).removeprefix('torch.')}; pass {argument}.to({first})"
        )


def check_device(op: str, argument: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """Raises ShapeError unless `value` lies on the device of `like`."""
    if value.device != like.device:
        raise ShapeError(
            f"{op}: {argument} must be on {like.device}, where {like_name} is, got {value.device}; "
            f"pass {argument}.to('{like.device}')"
        )


def check_cu_seqlens(op: str, cu_seqlens: Tensor, batch: int, length: int, in_graph: bool = False) -> None:
    """Checks the boundaries of packed sequences: int32 or int64, from 0 to the length, never falling, batch 1.

    The values are read on the host (one copy from the device), and only outside of torch.compile and torch.export, and
    of a CUDA graph's capture: there each backend checks them where they are, in every call and replay. A tensor on a
    CUDA device is read once, as long as nothing changes it: each layer has the same one, and each look waits for all
    that the device has to do. `in_graph`: for a caller with nothing behind it that would check there.
    """
    check_tensor(op, "cu_seqlens", cu_seqlens)
    check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ShapeError(
            f"{op}: cu_seqlens must have shape (sequences + 1,) with at least one sequence, "
            f"got {tuple(cu_seqlens.shape)}; pass the running sum of the sequences' lengths, with 0 in front"
        )
    if batch != 1:
        raise ShapeError(
            f"{op}: with cu_seqlens the batch must be 1, got {batch}; "
            "put all sequences one after the other along the length"
        )
    if _in_graph(cu_seqlens):
        if in_graph:
            assert_cu_seqlens(op, cu_seqlens, length)
        return
    if is_checked(cu_seqlens, length):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ShapeError(f"{op}: cu_seqlens must start at 0, got {bounds[0]}; put a 0 in front")
    for before, after in itertools.pairwise(bounds):
        if after < before:
            raise ShapeError(
                f"{op}: cu_seqlens must never fall, got {before} followed by {after}; "
                "pass the running sum of the sequences' lengths"
            )
    if bounds[-1] != length:
        raise ShapeError(
            f"{op}: cu_seqlens must end at the length {length}, got {bounds[-1]}; "
            "cut the padding off, or make it a sequence of its own"
        )
    if cu_seqlens.is_cuda and not cu_seqlens.is_inference():
        mark_checked(cu_seqlens, length)


def _in_graph(cu_seqlens: Tensor) -> bool:
    return torch.compiler.is_compiling() or in_capture(cu_seqlens)


def in_capture(value: Tensor) -> bool:
    """Whether what is done with this tensor goes into a CUDA graph."""
    return value.is_cuda and torch.cuda.is_current_stream_capturing()


def assert_cu_seqlens(op: str, cu_seqlens: Tensor, length: int) -> None:
    """What `check_cu_seqlens` leaves out in a graph, as a part of the graph, for what is written in plain PyTorch:
    boundaries that are wrong stop the program, with no wait for the device. Does nothing outside of graphs."""
    if not _in_graph(cu_seqlens) or not _has_assert(cu_seqlens.device.type):
        return
    never_falls = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
        never_falls & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length),
        f"{op}: cu_seqlens must go from 0 to the length and never fall, got other offsets; pass the running sum of "
        "the sequences' lengths, with 0 in front",
    )


def sequence_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """The sequence that each of `length` packed positions belongs to, (length,), int64: the last one that begins at or
    before it. Searched in all of the boundaries: torch.compile on GPUs forgets where a slice of them would begin."""
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens.contiguous(), positions, right=True) - 1


def _has_assert(device: str) -> bool:
    """torch has it on MPS from 2.13 on."""
    return device in ("cpu", "cuda", "xpu") or (
        device == "mps" and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_assert_async.msg", "MPS")
    )


_has_assert._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # as `_dispatch.choose`


def seen_and_right(cu_seqlens: Tensor, length: int) -> bool:
    """Whether the host has found these boundaries right, so that kernels need not look: never in a CUDA graph's
    capture, since a replay may find other values there."""
    return not in_capture(cu_seqlens) and is_checked(cu_seqlens, length)


def is_checked(cu_seqlens: Tensor, length: int) -> bool:
    """Whether these boundaries were found right for `length`, and have not changed since."""
    known = getattr(cu_seqlens, "_statescan_checked", None)
    return known is not None and known == as_checked(cu_seqlens, length)


def as_checked(cu_seqlens: Tensor, length: int) -> tuple[int, int, int]:
    """Tells boundaries from those that were checked: in inference mode torch counts no changes in place."""
    return length, cu_seqlens.data_ptr(), -1 if cu_seqlens.is_inference() else cu_seqlens._version


def mark_checked(cu_seqlens: Tensor, length: int) -> None:
    """Says of boundaries that the caller made that they are right for `length`, so that no op waits to look at them.
    The caller does not change them afterwards."""
    cu_seqlens._statescan_checked = as_checked(cu_seqlens, length)  # type: ignore[attr-defined]


def state_dtypes(u: torch.dtype, complex_A: bool) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of real arithmetic, dtype of the state): float64 for float64 inputs, else float32; complex where A is."""
    real = torch.float64 if u == torch.float64 else torch.float32
    if not complex_A:
        return real, real
    return real, torch.complex128 if real == torch.float64 else torch.complex64


def check_parameters(op: str, u: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> None:
    """Checks what does not depend on the position: A (d_inner, d_state), D and dt_bias (d_inner,)."""
    d_inner = u.shape[-1]
    check_tensor(op, "A", A)
    check_dtype(op, "A", A, ACTIVATION_DTYPES + COMPLEX_DTYPES)
    check_device(op, "A", A, u, "u")
    if A.dim() != 2 or A.shape[0] != d_inner or A.shape[1] < 1:
        raise ShapeError(
            f"{op}: A must have shape (d_inner, d_state) = ({d_inner}, d_state >= 1), got {tuple(A.shape)}; "
            f"{_transposed('A', A, (d_inner, A.shape[0])) or 'give it a row for each channel of u'}"
        )
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            check_tensor(op, name, value)
            check_dtype(op, name, value, ACTIVATION_DTYPES)
            check_device(op, name, value, u, "u")
            check_shape(op, name, value, (d_inner,), "(d_inner,)", "give it a number for each channel of u")


def check_projection(op: str, name: str, value: Tensor, u: Tensor, A: Tensor, leading: tuple[int, ...]) -> None:
    """Checks B or C: (*leading, d_state), (*leading, groups, d_state), or (d_inner, d_state) for all positions.

    `leading` is (batch, length) for the scan and (batch,) for one step. Where a step's batch equals d_inner, both
    readings have one shape; then the one per position is meant.
    """
    d_inner, d_state = A.shape
    check_tensor(op, name, value)
    check_device(op, name, value, u, "u")
    dims = value.dim() - len(leading)
    grouped = dims == 2 and tuple(value.shape[: len(leading)]) == leading and value.shape[-1] == d_state
    if grouped and (value.shape[-2] < 1 or d_inner % value.shape[-2] != 0):
        raise ShapeError(
            f"{op}: {name} must have a number of groups that divides d_inner = {d_inner}, "
            f"got {value.shape[-2]} groups; pass (..., groups, d_state) with such a number"
        )
    per_position = grouped or tuple(value.shape) == (*leading, d_state)
    if not per_position and tuple(value.shape) != (d_inner, d_state):
        lead = ", ".join(str(size) for size in leading)
        raise ShapeError(
            f"{op}: {name} must have shape ({lead}, {d_state}), ({lead}, groups, {d_state}) or, the same at every "
            f"position, ({d_inner}, {d_state}), got {tuple(value.shape)}; "
            f"{_transposed(name, value, (*leading, d_state)) or 'its last size is the d_state of A'}"
        )
    if value.is_complex() and not A.is_complex():
        raise DTypeError(
            f"{op}: {name} must be real where A is, got {str(value.dtype).removeprefix('torch.')}; "
            f"pass {name}.real, or a complex A"
        )
    wanted = (u.dtype,) if per_position else ACTIVATION_DTYPES
    why = "the dtype of u" if per_position else ""
    if A.is_complex():
        wanted, why = (*wanted, state_dtypes(u.dtype, True)[1]), "A is complex"
    check_dtype(op, name, value, wanted, why)


def check_state(op: str, name: str, state: Tensor, u: Tensor, A: Tensor, rows: int, meaning: str) -> None:
    """Checks a state: (rows, d_inner, d_state) in the state's dtype."""
    check_tensor(op, name, state)
    check_device(op, name, state, u, "u")
    cure = "give it one state for each sequence" if meaning == "sequences" else "give it one state for each row of u"
    check_shape(op, name, state, (rows, *A.shape), f"({meaning}, d_inner, d_state)", cure)
    complex_too = " and complex A" if A.is_complex() else ""
    why = f"the state's dtype for {str(u.dtype).removeprefix('torch.')} inputs{complex_too}"
    check_dtype(op, name, state, (state_dtypes(u.dtype, A.is_complex())[1],), why)


def values_readable(value: Tensor) -> bool:
    """Whether a check may read values: not while a graph is traced or captured, nor inside vmap."""
    if torch.compiler.is_compiling():
        return False
    while _functorch.is_functorch_wrapped_tensor(value):
        if _functorch.is_batchedtensor(value):
            return False
        value = _functorch.get_unwrapped(value)
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def transforms_active() -> bool:
    """Whether forward-mode AD is on, or the call stands inside a transform of torch.func."""
    # The level is read where torch.compile sees it, which so compiles anew for dual tensors; for torch.func it does so
    # by itself.
    return forward_ad._current_level >= 0 or _in_torch_func()


def _in_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()


_in_torch_func._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # as `_dispatch.choose`


def transformed(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD or a transform of torch.func wants a derivative by any of these tensors, which kernels
    with a backward pass of their own do not give: a tangent would be lost without a word, and
    ``torch.autograd.Function`` raises. While torch.compile traces inside one, always."""
    if not transforms_active():
        return False
    return torch.compiler.is_compiling() or any(t is not None and _takes_part(t) for t in tensors)


def _takes_part(value: Tensor) -> bool:
    if value.requires_grad and torch.is_grad_enabled():
        return _in_torch_func() or forward_ad.unpack_dual(value).tangent is not None
    if not _functorch.is_functorch_wrapped_tensor(value):
        return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None
    if forward_ad._current_level >= 0:
        return True  # what vmap wraps does not tell whether a tangent lies inside
    while _functorch.is_functorch_wrapped_tensor(value):
        if _functorch.is_gradtrackingtensor(value):
            return True
        value = _functorch.get_unwrapped(value)
    return False


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_second_derivative(op: str, backend: str) -> None:
    """For the first line of a kernel's backward pass, which autograd can't differentiate.

    Raises:
        BackendUnavailableError: the gradient shall be differentiated itself.
    """
    # create_graph=True runs a backward with gradients enabled; without this the second derivative would be missing.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise BackendUnavailableError(
            f"{op}: backend '{backend}' has no second derivatives; use backend='torch' with create_graph=True"
        )


def no_device(kind: str) -> str:
    """That torch sees no device of this kind, ``"cuda"`` or another, and what helps."""
    missing = f"torch sees no {kind.upper()} device"
    if kind != "cuda":
        return f"{missing}; see to its driver and to a build of torch for it"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"{missing}, since this build has no CUDA; install one that has it (pytorch.org/get-started)"
    return f"{missing}; see what nvidia-smi shows, and whether CUDA_VISIBLE_DEVICES hides it"


def usable_device(argument: str, device: torch.device | str) -> torch.device:
    """The device, where torch can use it here; `argument` names what it was given for.

    Raises:
        ConfigError: it can't.
    """
    try:
        found = torch.device(device)
        if found.type == "cuda" and not torch.cuda.is_available():
            raise AssertionError(no_device("cuda"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).partition("\n")[0]
        raise ConfigError(
            f"{argument} must be a device that torch can use here, got '{device}': {reason}; 'cpu' is always there"
        ) from None
    return found


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast changes nothing: an op's dtypes follow from its arguments alone."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
