"""What `statescan bench` measures in one process after another: everything on a GPU, and attention, block and generate
on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from statescan.bench import costs
from statescan.bench.costs import Cost

__all__ = ["FULL", "QUICK", "DeviceJob", "device_jobs"]


@dataclass
class DeviceJob:
    """One implementation of one benchmark on one shape.

    Args:
        bench: name of the benchmark. case: shape and mode, for the table. implementation: ours or a peer's.
        kind: what measures it (`statescan.bench.device_worker`).
        options: of that.
        cost: the least it has to do, for its floor.
        needs: module of a peer that has to be there.
    """

    bench: str
    case: str
    implementation: str
    dtype: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    cost: Cost | None = None
    needs: str | None = None


FULL: dict[str, dict[str, Any]] = {
    "cuda": {
        # (batch, length, d_inner), dtype
        "scan": [
            ([8, 2048, 2048], "bfloat16"),
            ([8, 2048, 4096], "bfloat16"),
            ([1, 2048, 1536], "bfloat16"),
            ([1, 65536, 2048], "bfloat16"),
            ([8, 2048, 2048], "float32"),
        ],
        "conv": [([8, 2048, 2048], "bfloat16"), ([8, 2048, 2048], "float32")],
        "norm": [([8, 2048, 1024], "bfloat16"), ([8, 2048, 1024], "float32")],
        "attention": {"tokens": 65536, "width": 1024, "lengths": [512 * 2**i for i in range(8)], "dtype": "bfloat16"},
        "block": [([8, 2048, 1024], "bfloat16"), ([8, 2048, 2048], "bfloat16")],
        "train": [("130m", 8, 2048), ("130m", 32, 2048), ("370m", 16, 2048)],
        "train_dtypes": ["bfloat16"],
        "generate": [(name, batch) for name in ("130m", "1.4b", "pythia-1.4b") for batch in (1, 16, 64, 128)],
        "generate_lengths": (2048, 128),
        "generate_dtypes": ["bfloat16"],
        "prefill": ("1.4b", 16, 2048),
        "prefill_long": ("1.4b", 2**20),
        "peer_model": "130m",
    },
    "cpu": {
        "attention": {
            "tokens": 8192,
            "width": 768,
            "lengths": [512, 1024, 2048, 4096, 8192],
            "dtype": "float32",
        },
        "block": [([1, 2048, 768], "float32"), ([1, 2048, 768], "bfloat16")],
        "generate": [("130m", 1), ("130m", 8)],
        "generate_lengths": (128, 32),
        "generate_dtypes": ["float32", "bfloat16", "int8"],
        "peer_model": "130m",
    },
}
_QUICK_MODELS: dict[str, Any] = {
    "scan": [([2, 256, 64], "float32")],
    "conv": [([2, 256, 64], "float32")],
    "norm": [([2, 256, 64], "float32")],
    "train": [("tiny", 2, 64)],
    "train_dtypes": ["bfloat16"],
    "generate": [("tiny", 1), ("tiny", 2)],
    "generate_lengths": (48, 8),
    "prefill": ("tiny", 2, 64),
    "prefill_long": ("tiny", 5000),
    "peer_model": "tiny",
}
QUICK: dict[str, dict[str, Any]] = {
    "cuda": {
        **_QUICK_MODELS,
        "attention": {"tokens": 1024, "width": 128, "lengths": [256, 1024], "dtype": "bfloat16"},
        "block": [([2, 256, 64], "bfloat16")],
        "generate_dtypes": ["bfloat16"],
    },
    "cpu": {
        **_QUICK_MODELS,
        "attention": {"tokens": 512, "width": 128, "lengths": [256, 512], "dtype": "float32"},
        "block": [([1, 256, 64], "float32")],
        "generate_dtypes": ["float32", "int8"],
    },
}


def _backends(op: str, device: str) -> list[str]:
    """The backends of an op meant for this device, as ``statescan NAME``; the reference is no contender."""
    from statescan.ops._dispatch import BACKENDS

    others = {"cpu": {"cuda", "triton"}, "cuda": {"cpu"}}[device]
    return [f"statescan {name}" for name in BACKENDS[op] if name not in others and name != "reference"]


def _op(
    bench: str, op: str, cost: Callable[[list[int], str, str], Cost], peers: list[tuple[str, str | None]]
) -> Callable[[dict[str, Any], str], Iterable[DeviceJob]]:
    def jobs(sizes: dict[str, Any], device: str) -> Iterable[DeviceJob]:
        for shape, dtype in sizes[bench]:
            modes = ("inference", "forward", "backward") if bench == "scan" else ("forward", "backward")
            for mode in modes:
                options = {"shape": shape, "mode": mode, "d_state": 16}
                names: list[tuple[str, str | None]] = [(name, None) for name in _backends(op, device)] + peers
                if bench == "scan" and mode != "inference":
                    names.append((f"statescan {device}, batch invariant", None))
                for name, needs in names:
                    heavy = bench == "scan" and name in ("statescan torch", "PyTorch loop")
                    # The plain forms are there once, for the scale: the loop's backward keeps every step's state.
                    if heavy and (mode != "forward" or shape != sizes[bench][0][0] or dtype != sizes[bench][0][1]):
                        continue
                    least = cost(shape, dtype, mode)
                    yield DeviceJob(bench, f"{tuple(shape)} {mode}", name, dtype, bench, options, least, needs)

    return jobs


def _attention_jobs(sizes: dict[str, Any], device: str) -> Iterable[DeviceJob]:
    s = sizes["attention"]
    tokens, width, dtype = s["tokens"], s["width"], s["dtype"]
    heads = width // 64
    kinds = ("flash", "cuDNN") if device == "cuda" else ("flash",)
    ours = f"statescan {device}"
    for length in s["lengths"]:
        batch = tokens // length
        for mode in ("forward", "forward+backward"):
            case = f"{batch} x {length}, width {width}, {mode}"
            notes = {"mode": mode, "length": length}
            for kind in kinds:
                options = {**notes, "shape": [batch, length, heads, 64]}
                least = costs.attention_cost(batch, length, heads, 64, dtype, mode)
                yield DeviceJob("attention", case, f"torch SDPA {kind}", dtype, "attention", options, least)
            # The scan over the tokens' own width, as attention mixes it, and the scan that a Mamba layer of this width
            # runs: twice as wide, with its gate.
            for d_inner, gated in ((width, False), (2 * width, True)):
                options = {**notes, "shape": [batch, length, d_inner], "d_state": 16, "gated": gated}
                name = f"{ours}, {d_inner} channels{', gated' if gated else ''}"
                least = costs.scan_cost(batch, length, d_inner, 16, dtype, mode, gated)
                yield DeviceJob("attention", case, name, dtype, "scan", options, least)
            if device == "cuda":
                options = {**notes, "shape": [batch, length, width], "d_state": 16, "gated": False}
                least = costs.scan_cost(batch, length, width, 16, dtype, mode, False)
                yield DeviceJob("attention", case, "mamba_ssm", dtype, "scan", options, least, "mamba_ssm")


def _block_jobs(sizes: dict[str, Any], device: str) -> Iterable[DeviceJob]:
    from statescan.models import MambaConfig

    for shape, dtype in sizes["block"]:
        batch, length, d_model = shape
        config = MambaConfig(d_model=d_model, n_layer=1, vocab_size=8)
        for mode in ("forward", "backward"):
            least = costs.block_cost(config, batch, length, dtype, mode)
            names: list[tuple[str, str | None]] = [
                ("statescan, recompute none", None),
                ("statescan, recompute cheap", None),
                ("statescan, recompute block", None),
            ]
            names = names if mode == "backward" else names[:1]
            if mode == "forward":
                names.append(("statescan, plain PyTorch", None))
            if device == "cuda":
                names.append(("mamba_ssm", "mamba_ssm"))
            for name, needs in names:
                options = {"shape": shape, "mode": mode}
                yield DeviceJob("block", f"{tuple(shape)} {mode}", name, dtype, "block", options, least, needs)


def _train_jobs(sizes: dict[str, Any], device: str) -> Iterable[DeviceJob]:
    from statescan.models import preset

    for name, batch, length in sizes["train"]:
        for dtype in sizes["train_dtypes"]:
            case = f"{name}, {batch} x {length}"
            least = costs.train_cost(preset(name), batch, length, dtype)
            options = {"preset": name, "batch": batch, "length": length}
            names = [f"statescan, recompute {policy}" for policy in ("none", "cheap", "block")]
            if device == "cuda":
                names = [each for ours in names for each in (ours, f"{ours}, captured")]
            for ours in names:
                yield DeviceJob("train", case, ours, dtype, "train", options, least)
            yield DeviceJob("train", case, "mamba_ssm", dtype, "train", options, least, "mamba_ssm")
    if device == "cuda":
        # Where the host decides, and at the end: compiling takes minutes.
        (name, batch, length), dtype = sizes["train"][0], sizes["train_dtypes"][0]
        least = costs.train_cost(preset(name), batch, length, dtype)
        options = {"preset": name, "batch": batch, "length": length}
        compiled = "statescan, recompute none, compiled"
        yield DeviceJob("train", f"{name}, {batch} x {length}", compiled, dtype, "train", options, least)


def _generate_jobs(sizes: dict[str, Any], device: str) -> Iterable[DeviceJob]:
    from statescan.models import MambaConfig, preset

    length, new = sizes["generate_lengths"]
    for name, batch in sizes["generate"]:
        case = f"{name}, {batch} x ({length} + {new})"
        for dtype in sizes["generate_dtypes"]:
            options = {"preset": name, "batch": batch, "length": length, "new": new}
            config = preset(name)
            if dtype == "int8" and not isinstance(config, MambaConfig):
                continue  # only packed weights have it
            # Of attention's cache, what is filled at the middle of the tokens that are written.
            least = costs.decode_cost(config, batch, dtype, length + new // 2)
            yield DeviceJob("generate", case, "statescan", dtype, "generate", options, least)
            if device == "cuda" and isinstance(config, MambaConfig):
                yield DeviceJob("generate", case, "mamba_ssm", dtype, "generate", options, least, "mamba_ssm")
            if name == sizes["peer_model"] and batch == 1 and dtype != "int8":
                fewer = {**options, "new": min(new, 32)}
                theirs = "transformers"
                yield DeviceJob("generate", case, theirs, dtype, "generate", fewer, least, theirs)


def _prefill_jobs(sizes: dict[str, Any], device: str) -> Iterable[DeviceJob]:
    from statescan.models import preset

    dtype = "bfloat16"
    name, batch, length = sizes["prefill"]
    least = costs.prefill_cost(preset(name), batch, length, dtype)
    options = {"preset": name, "batch": batch, "length": length}
    yield DeviceJob("prefill", f"{name}, {batch} x {length}", "statescan", dtype, "prefill", options, least)
    small = sizes["peer_model"]
    least = costs.prefill_cost(preset(small), 1, length, dtype)
    options = {"preset": small, "batch": 1, "length": length}
    for implementation in ("statescan", "transformers"):
        needs = None if implementation == "statescan" else implementation
        yield DeviceJob("prefill", f"{small}, 1 x {length}", implementation, dtype, "prefill", options, least, needs)
    name, length = sizes["prefill_long"]
    least = costs.prefill_cost(preset(name), 1, length, dtype)
    options = {"preset": name, "length": length}
    yield DeviceJob("prefill", f"{name}, 1 x {length}, in chunks", "statescan", dtype, "read_long", options, least)


_JOBS: dict[str, Callable[[dict[str, Any], str], Iterable[DeviceJob]]] = {
    "scan": _op(
        "scan",
        "selective_scan",
        lambda s, dtype, mode: costs.scan_cost(s[0], s[1], s[2], 16, dtype, mode),
        [("PyTorch loop", None), ("mamba_ssm", "mamba_ssm")],
    ),
    "conv": _op(
        "conv",
        "causal_conv1d",
        lambda s, dtype, mode: costs.conv_cost(s[0], s[1], s[2], 4, dtype, mode),
        [("torch", None), ("causal_conv1d", "causal_conv1d")],
    ),
    "norm": _op(
        "norm",
        "add_rms_norm",
        lambda s, dtype, mode: costs.norm_cost(s[0], s[1], s[2], dtype, mode),
        [("torch", None), ("torch compiled", None)],
    ),
    "attention": _attention_jobs,
    "block": _block_jobs,
    "train": _train_jobs,
    "generate": _generate_jobs,
    "prefill": _prefill_jobs,
}
DEVICE_BENCHMARKS = {"cuda": tuple(_JOBS), "cpu": ("attention", "block", "generate")}


def device_jobs(bench: str, device: str, quick: bool, model: str | None = None) -> list[DeviceJob]:
    """The measurements of one benchmark on ``"cuda"`` or ``"cpu"``; `model`: a preset, for "generate"."""
    sizes = (QUICK if quick else FULL)[device]
    if model is not None:
        batches = dict.fromkeys(batch for _, batch in sizes["generate"])
        sizes = {**sizes, "generate": [(model, batch) for batch in batches]}
    return list(_JOBS[bench](sizes, device))
