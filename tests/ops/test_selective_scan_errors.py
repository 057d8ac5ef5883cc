"""Bad input to `selective_scan`: one line each, word for word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statescan.errors import BackendUnavailableError, ConfigError, DTypeError, ShapeError, StatescanError
from statescan.ops import selective_scan
from statescan.testing import SCAN_CASES, ScanCase, scan_problem

zeros = torch.zeros
WHOLE = ScanCase(
    batch=2, length=8, d_inner=4, d_state=3, D=True, z=True, dt_bias=True, initial_state=True, dt_softplus=True
)
PACKABLE = ScanCase(batch=1, length=8, d_inner=4, d_state=3)

MESSAGES: dict[str, tuple[dict[str, Any], type[StatescanError], str]] = {
    "u a list": (
        {"u": [1.0]},
        DTypeError,
        "u must be a torch.Tensor, got list; convert it with torch.as_tensor",
    ),
    "u of integers": (
        {"u": zeros(2, 8, 4, dtype=torch.int64)},
        DTypeError,
        "u must be float32, float64, bfloat16 or float16, got int64; pass u.to(torch.float32)",
    ),
    "u of two dimensions": (
        {"u": zeros(8, 4)},
        ShapeError,
        "u must have shape (batch, length, d_inner), each at least 1, got (8, 4); "
        "add the missing dimension with unsqueeze, or leave the call out where there is nothing to scan",
    ),
    "u of length 0": (
        {"u": zeros(2, 0, 4)},
        ShapeError,
        "u must have shape (batch, length, d_inner), each at least 1, got (2, 0, 4); "
        "add the missing dimension with unsqueeze, or leave the call out where there is nothing to scan",
    ),
    "dt features first": (
        {"dt": zeros(2, 4, 8)},
        ShapeError,
        "dt must have shape (batch, length, d_inner) = (2, 8, 4), got (2, 4, 8); pass dt.transpose(-1, -2)",
    ),
    "dt None": (
        {"dt": None},
        DTypeError,
        "dt must be a torch.Tensor, got NoneType; convert it with torch.as_tensor",
    ),
    "dt of another dtype": (
        {"dt": zeros(2, 8, 4, dtype=torch.bfloat16)},
        DTypeError,
        "dt must be float32 (the dtype of u), got bfloat16; pass dt.to(torch.float32)",
    ),
    "z of another length": (
        {"z": zeros(2, 7, 4)},
        ShapeError,
        "z must have shape (batch, length, d_inner) = (2, 8, 4), got (2, 7, 4); give it u's shape",
    ),
    "z on another device": (
        {"z": zeros(2, 8, 4, device="meta")},
        ShapeError,
        "z must be on cpu, where u is, got meta; pass z.to('cpu')",
    ),
    "A transposed": (
        {"A": zeros(3, 4)},
        ShapeError,
        "A must have shape (d_inner, d_state) = (4, d_state >= 1), got (3, 4); pass A.transpose(-1, -2)",
    ),
    "A without states": (
        {"A": zeros(4, 0)},
        ShapeError,
        "A must have shape (d_inner, d_state) = (4, d_state >= 1), got (4, 0); give it a row for each channel of u",
    ),
    "A of integers": (
        {"A": zeros(4, 3, dtype=torch.int32)},
        DTypeError,
        "A must be float32, float64, bfloat16, float16, complex64 or complex128, got int32; pass A.to(torch.float32)",
    ),
    "B of another state size": (
        {"B": zeros(2, 8, 5)},
        ShapeError,
        "B must have shape (2, 8, 3), (2, 8, groups, 3) or, the same at every position, (4, 3), got (2, 8, 5); "
        "its last size is the d_state of A",
    ),
    "B with three groups for four channels": (
        {"B": zeros(2, 8, 3, 3)},
        ShapeError,
        "B must have a number of groups that divides d_inner = 4, got 3 groups; "
        "pass (..., groups, d_state) with such a number",
    ),
    "C features first": (
        {"C": zeros(2, 3, 8)},
        ShapeError,
        "C must have shape (2, 8, 3), (2, 8, groups, 3) or, the same at every position, (4, 3), got (2, 3, 8); "
        "pass C.transpose(-1, -2)",
    ),
    "C complex where A is real": (
        {"C": zeros(2, 8, 3, dtype=torch.complex64)},
        DTypeError,
        "C must be real where A is, got complex64; pass C.real, or a complex A",
    ),
    "C of another dtype": (
        {"C": zeros(2, 8, 3, dtype=torch.float64)},
        DTypeError,
        "C must be float32 (the dtype of u), got float64; pass C.to(torch.float32)",
    ),
    "D of another size": (
        {"D": zeros(5)},
        ShapeError,
        "D must have shape (d_inner,) = (4,), got (5,); give it a number for each channel of u",
    ),
    "dt_bias complex": (
        {"dt_bias": zeros(4, dtype=torch.complex64)},
        DTypeError,
        "dt_bias must be float32, float64, bfloat16 or float16, got complex64; pass dt_bias.to(torch.float32)",
    ),
    "initial_state of another batch": (
        {"initial_state": zeros(1, 4, 3)},
        ShapeError,
        "initial_state must have shape (batch, d_inner, d_state) = (2, 4, 3), got (1, 4, 3); "
        "give it one state for each row of u",
    ),
    "initial_state in low precision": (
        {"initial_state": zeros(2, 4, 3, dtype=torch.bfloat16)},
        DTypeError,
        "initial_state must be float32 (the state's dtype for float32 inputs), got bfloat16; "
        "pass initial_state.to(torch.float32)",
    ),
    "initial_state real where A is complex": (
        {"A": zeros(4, 3, dtype=torch.complex64)},
        DTypeError,
        "initial_state must be complex64 (the state's dtype for float32 inputs and complex A), got float32; "
        "pass initial_state.to(torch.complex64)",
    ),
    "cu_seqlens with a batch": (
        {"cu_seqlens": torch.tensor([0, 8])},
        ShapeError,
        "with cu_seqlens the batch must be 1, got 2; put all sequences one after the other along the length",
    ),
    "unknown backend": (
        {"backend": "gpu"},
        ConfigError,
        "backend must be one of ['auto', 'cpu', 'cuda', 'triton', 'torch', 'reference'], got 'gpu'",
    ),
}

PACKED_MESSAGES: dict[str, tuple[dict[str, Any], type[StatescanError], str]] = {
    "a list": (
        {"cu_seqlens": [0, 8]},
        DTypeError,
        "cu_seqlens must be a torch.Tensor, got list; convert it with torch.as_tensor",
    ),
    "floats": (
        {"cu_seqlens": torch.tensor([0.0, 8.0])},
        DTypeError,
        "cu_seqlens must be int32 or int64, got float32; pass cu_seqlens.to(torch.int32)",
    ),
    "two dimensions": (
        {"cu_seqlens": torch.tensor([[0, 8]])},
        ShapeError,
        "cu_seqlens must have shape (sequences + 1,) with at least one sequence, got (1, 2); "
        "pass the running sum of the sequences' lengths, with 0 in front",
    ),
    "no sequence": (
        {"cu_seqlens": torch.tensor([8])},
        ShapeError,
        "cu_seqlens must have shape (sequences + 1,) with at least one sequence, got (1,); "
        "pass the running sum of the sequences' lengths, with 0 in front",
    ),
    "no 0 in front": (
        {"cu_seqlens": torch.tensor([1, 8])},
        ShapeError,
        "cu_seqlens must start at 0, got 1; put a 0 in front",
    ),
    "falling": (
        {"cu_seqlens": torch.tensor([0, 5, 3, 8])},
        ShapeError,
        "cu_seqlens must never fall, got 5 followed by 3; pass the running sum of the sequences' lengths",
    ),
    "a negative length": (
        {"cu_seqlens": torch.tensor([0, -2, 8])},
        ShapeError,
        "cu_seqlens must never fall, got 0 followed by -2; pass the running sum of the sequences' lengths",
    ),
    "ending too soon": (
        {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)},
        ShapeError,
        "cu_seqlens must end at the length 8, got 7; cut the padding off, or make it a sequence of its own",
    ),
    "ending too late": (
        {"cu_seqlens": torch.tensor([0, 9])},
        ShapeError,
        "cu_seqlens must end at the length 8, got 9; cut the padding off, or make it a sequence of its own",
    ),
    "one state for two sequences": (
        {"cu_seqlens": torch.tensor([0, 4, 8]), "initial_state": zeros(1, 4, 3)},
        ShapeError,
        "initial_state must have shape (sequences, d_inner, d_state) = (2, 4, 3), got (1, 4, 3); "
        "give it one state for each sequence",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name: str) -> None:
    change, error, text = MESSAGES[name]
    with pytest.raises(error) as raised:
        selective_scan(**{**scan_problem(WHOLE, torch.float32), **change})
    assert str(raised.value) == f"selective_scan: {text}"


@pytest.mark.parametrize("name", PACKED_MESSAGES)
def test_message_about_packing(name: str) -> None:
    change, error, text = PACKED_MESSAGES[name]
    with pytest.raises(error) as raised:
        selective_scan(**{**scan_problem(PACKABLE, torch.float32), **change})
    assert str(raised.value) == f"selective_scan: {text}"


def test_a_named_backend_runs_or_raises() -> None:
    """The C++ kernel leaves complex A to the others; named all the same, it says so in one line with a cure."""
    with pytest.raises(
        BackendUnavailableError, match=r"^selective_scan: backend 'cpu' can't run this call: .+$"
    ) as raised:
        selective_scan(**scan_problem(SCAN_CASES["complex A"], torch.float32), backend="cpu")
    assert "\n" not in str(raised.value)
