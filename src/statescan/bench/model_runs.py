"""Whole models measured on either device: training steps, generation, reading prompts; each checked beforehand."""

# The peers are no dependency of ours: where they are not installed nothing here is called.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.bench.subjects import Verdict, autocast, judge, slack
from statescan.models import CausalLM, ModelConfig, preset
from statescan.train import CapturedStep

__all__ = ["generate", "prefill", "read_long", "train"]

Measured = dict[str, Any]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def _ids(vocab: int, rows: int, length: int, device: str, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (rows, length), generator=g).to(device)


# ---- training -------------------------------------------------------------------------------------------------------

_CHECKED_LENGTH = 192


def _train_verdicts(
    build: Callable[[CausalLM], Any], config: ModelConfig, job: Mapping[str, Any]
) -> dict[str, Verdict]:
    """Loss and gradients of the same model with two layers, on one short row, against float64."""
    device, context = job["device"], autocast(job["device"], job["dtype"])
    small = config.replace(n_layer=2)
    torch.manual_seed(0)
    source = CausalLM(small, device=device)
    ids = _ids(small.vocab_size, 1, _CHECKED_LENGTH + 1, device)

    def differentiated(loss_of: Callable[[Tensor], Tensor], module: torch.nn.Module, exact: bool) -> list[Tensor]:
        with contextlib.nullcontext() if exact else context():
            loss = loss_of(ids)
        loss.backward()
        named = {k.replace("embeddings.", "embedding."): v.grad for k, v in module.named_parameters()}
        flat = torch.cat([named[k].double().flatten() for k, _ in source.named_parameters()])  # type: ignore[union-attr]
        return [loss.detach().double().reshape(1), flat]

    results = []
    for dtype in (torch.float64, torch.float32):
        twin = CausalLM(small.replace(recompute="none"), backend="torch", device=device, dtype=dtype)
        twin.load_state_dict(source.state_dict())
        ours = lambda ids, twin=twin: _loss(twin, ids)
        results.append(differentiated(ours, twin, dtype == torch.float64))
    truth, reference = results
    module, loss_of = build(source)
    got = differentiated(loss_of, module, False)
    # Under autocast everything passes through bfloat16: its rounding is the unit of the budget.
    unit = torch.bfloat16 if job["dtype"] == "bfloat16" else torch.float32
    verdicts = {}
    for i, name in enumerate(("loss", "gradients")):
        error, limit = judge(got[i], truth[i], reference[i])
        rounding = 2 * (torch.finfo(unit).eps - torch.finfo(torch.float64).eps) / 2
        verdicts[name] = Verdict(error, slack(job["implementation"]) * (limit + rounding))
    return verdicts


def _captured_verdict(config: ModelConfig, job: Mapping[str, Any]) -> Verdict:
    """Weights of a model with two layers after a few captured steps, against as many steps kernel by kernel."""
    small = config.replace(n_layer=2)
    ids = _ids(small.vocab_size, 1, _CHECKED_LENGTH + 1, job["device"])
    weights = []
    for capture in (False, None):
        torch.manual_seed(0)
        model = CausalLM(small, device=job["device"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        step = _captured(optimizer, lambda ids, model=model: _loss(model, ids), job, capture)
        for _ in range(6):
            step.step(ids)
        weights.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    eager, captured = weights
    # They are to be the same bits.
    return Verdict(float((captured - eager).norm() / eager.norm()), torch.finfo(torch.float32).eps)


def _captured(
    optimizer: torch.optim.Optimizer, loss: Callable[..., Tensor], job: Mapping[str, Any], capture: bool | None = None
) -> CapturedStep:
    dtype = torch.bfloat16 if job["dtype"] == "bfloat16" else None
    return CapturedStep(optimizer, loss, autocast=dtype, capture=capture)


def _loss(model: Any, ids: Tensor) -> Tensor:
    return model(ids[:, :-1], labels=ids).loss


def _builder(name: str) -> Callable[[CausalLM], tuple[Any, Callable[[Tensor], Tensor]]]:
    """From our model to (what is trained, its loss of a token window)."""
    if name.startswith("statescan"):

        def ours(model: CausalLM) -> tuple[Any, Callable[[Tensor], Tensor]]:
            run: Any = torch.compile(model, fullgraph=True) if "compiled" in name else model
            return model, lambda ids: _loss(run, ids)

        return ours
    if name.startswith("transformers"):

        def theirs(model: CausalLM) -> tuple[Any, Callable[[Tensor], Tensor]]:
            from statescan.bench.peers import transformers_model

            made = transformers_model(model).to(next(model.parameters()).device).train()

            def loss_of(ids: Tensor) -> Tensor:
                logits = made(ids[:, :-1], use_cache=False).logits
                return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

            return made, loss_of

        return theirs

    def mamba_ssm(model: CausalLM) -> tuple[Any, Callable[[Tensor], Tensor]]:
        from statescan.bench.peers import mamba_ssm_model

        made = mamba_ssm_model(model)

        def loss_of(ids: Tensor) -> Tensor:
            logits = made(ids[:, :-1]).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

        return made, loss_of

    return mamba_ssm


def train(job: Mapping[str, Any]) -> Measured:
    """Steps of float32 weights with autocast and fused AdamW, no clipping: seconds each, and peak memory.

    With "captured" in the implementation's name a step is `statescan.train.CapturedStep`, guard and counters included.
    """
    device, name, batch, length = job["device"], job["implementation"], job["batch"], job["length"]
    policy = name.split("recompute ")[1].split(",")[0] if "recompute" in name else "none"
    config = preset(job["preset"], recompute=policy)
    build = _builder(name)
    verdicts = _train_verdicts(build, config, job)
    if "captured" in name:
        verdicts["captured steps"] = _captured_verdict(config, job)
    _reset_peak(device)
    torch.manual_seed(0)
    model = CausalLM(config, device=device)
    trained, loss_of = build(model)
    del model
    ids = _ids(config.vocab_size, batch, length + 1, device)
    context = autocast(device, job["dtype"])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with context():
            loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    warmup = job.get("warmup", 3)
    if "captured" in name:
        captured = _captured(optimizer, loss_of, job)
        step = lambda: captured.step(ids)
        warmup += 4  # three steps kernel by kernel, and one that is captured
    losses = [float(step()) for _ in range(warmup)]
    samples, last = [], None
    begin = time.perf_counter()
    while len(samples) < job.get("repeats", 8) and (
        len(samples) < 2 or time.perf_counter() - begin < job["max_seconds"]
    ):
        _synchronize(device)
        start = time.perf_counter()
        last = step()
        _synchronize(device)
        samples.append(time.perf_counter() - start)
    losses.append(float(last) if last is not None else float("nan"))
    return {
        "samples": samples,
        "verdicts": verdicts,
        "tokens": batch * length,
        "peak_memory_bytes": _peak(device),
        # What a graph holds for itself stays taken, between its steps too.
        "reserved_memory_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
        "losses": losses,
    }


# ---- inference ------------------------------------------------------------------------------------------------------


class _Ids:
    """A tokenizer for models of random weights: token ids are all that is looked at."""

    name = "ids"
    bytes_add_up = True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"." * len(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return "." * len(ids)


def _random_model(name: str, device: str, dtype: str) -> CausalLM:
    """The preset with random weights that the packed dtype holds exactly, so that only arithmetic rounds."""
    torch.manual_seed(0)
    model = CausalLM(preset(name), device=device).eval().requires_grad_(False)
    if dtype == "bfloat16":
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


@torch.no_grad()
def _logprobs(model: CausalLM, ids: Tensor, count: int) -> Tensor:
    """Log-probabilities that a model gives the last `count` tokens of each row, without the vocabulary's padding."""
    logits = model(ids[:, :-1], logits_to_keep=count).logits[..., : model.config.vocab_size]
    chosen = torch.log_softmax(logits.double(), -1).gather(-1, ids[:, -count:, None].long())
    return chosen.flatten()


def _twin(model: CausalLM, dtype: torch.dtype) -> CausalLM:
    with torch.device("meta"):
        made = CausalLM(model.config, backend="torch", dtype=dtype)
    state = {k: v.to(dtype) for k, v in model.state_dict().items()}
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    return made.eval().requires_grad_(False)


def _engine_verdicts(model: CausalLM, engine: Any, job: Mapping[str, Any]) -> dict[str, Verdict]:
    """What the engine says of the tokens that it draws greedily, against the model in float64 on the same tokens."""
    from statescan.generate import SamplingParams

    rows, count, device = job["batch"], 24 if job["batch"] == 1 else 8, job["device"]
    prompts = _ids(model.config.vocab_size, rows, 40, device, seed=2)
    greedy = {"temperature": 0.0, "max_new_tokens": count}
    found = engine.generate(list(prompts), SamplingParams(logprobs=True, **greedy))
    plain = engine.generate(list(prompts), SamplingParams(**greedy))
    if [f.tokens for f in found] != [p.tokens for p in plain]:
        raise RuntimeError("wrong result: asking for logprobs changes the tokens drawn")
    few = range(min(rows, 4))
    tokens = torch.tensor([found[i].tokens for i in few], device=device)
    ids = torch.cat([prompts[: len(few)], tokens], 1)
    got = torch.tensor([found[i].logprobs for i in few], device=device).flatten()
    twin = _twin(model, torch.float64)
    truth = _logprobs(twin, ids, count)
    del twin
    low = torch.float32 if job["dtype"] == "float32" else torch.bfloat16
    reference = _logprobs(_twin(model, low), ids, count)
    error, limit = judge(got.double(), truth, reference)
    unit = 2.0**-6 if job["dtype"] == "int8" else torch.finfo(low).eps
    return {"log-probabilities": Verdict(error, limit + unit)}


_TOGETHER = 32768


def _engine(model: CausalLM, job: Mapping[str, Any]) -> Any:
    from statescan.generate import Engine

    return Engine(model, _Ids(model.config.vocab_size), job["dtype"], max_batch=job["batch"])


def generate(job: Mapping[str, Any]) -> Measured:
    """`Engine` on `batch` prompts at once: seconds a decoding step, and how fast the prompts were read.

    Greedy. A decoding step's time is that from the moment when every row has its first token to the end, over the
    steps between; both moments follow a token's way to the host, so that all work is done.
    """
    device, name, batch = job["device"], job["implementation"], job["batch"]
    new, length = job["new"], job["length"]
    model = _random_model(job["preset"], device, job["dtype"])
    prompts = _ids(model.config.vocab_size, batch, length, device)
    if name.startswith("transformers"):
        return _generate_transformers(model, prompts, job)
    if name == "mamba_ssm":
        return _generate_mamba_ssm(model, prompts, job)
    from statescan.generate import SamplingParams

    engine = _engine(model, job)
    verdicts = _engine_verdicts(model, engine, job)
    del model
    held = list(prompts.cpu().numpy())
    _reset_peak(device)
    samples, prefills = [], []
    for _ in range(job.get("repeats", 5 if batch <= 16 else 2)):
        _synchronize(device)
        start = time.perf_counter()
        first: dict[int, float] = {}
        last = start
        for piece in engine.stream(held, SamplingParams(temperature=0.0, max_new_tokens=new)):
            last = time.perf_counter()
            first.setdefault(piece.row, last)
        read = max(first.values())
        samples.append((last - read) / (new - 1))
        prefills.append(read - start)
    return {
        "samples": samples,
        "verdicts": verdicts,
        "tokens": batch,
        "peak_memory_bytes": _peak(device),
        "weights_bytes": engine.decoder.nbytes,
        "prefill_tokens_per_second": batch * length / min(prefills),
    }


def _held_to(model: CausalLM, ids: Tensor, logits: Tensor, name: str) -> dict[str, Verdict]:
    truth = model(ids, logits_to_keep=1).logits[:, -1].double()
    vocab = model.config.vocab_size
    reference = _twin(model, torch.bfloat16)(ids, logits_to_keep=1).logits[:, -1]
    return {"logits": judge(logits[:, :vocab].bfloat16(), truth[:, :vocab], reference[:, :vocab], slack(name))}


@torch.no_grad()
def _generate_transformers(model: CausalLM, prompts: Tensor, job: Mapping[str, Any]) -> Measured:
    from statescan.bench.peers import transformers_model

    device, new, name = job["device"], job["new"], job["implementation"]
    theirs = (
        transformers_model(model).to(device, torch.bfloat16 if job["dtype"] == "bfloat16" else torch.float32).eval()
    )
    short = prompts[:1, :40]
    verdicts = _held_to(model, short, theirs(short, use_cache=False).logits[:, -1], name)
    _synchronize(device)
    start = time.perf_counter()
    out = theirs(prompts, use_cache=True, logits_to_keep=1)
    _synchronize(device)
    read = time.perf_counter() - start
    token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.cache_params
    samples = []
    for step in range(new):
        _synchronize(device)
        start = time.perf_counter()
        token = theirs(token, cache_params=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        _synchronize(device)
        if step >= 3:
            samples.append(time.perf_counter() - start)
    return {
        "samples": samples,
        "verdicts": verdicts,
        "tokens": prompts.shape[0],
        "peak_memory_bytes": _peak(device),
        "prefill_tokens_per_second": prompts.numel() / read,
    }


@torch.no_grad()
def _generate_mamba_ssm(model: CausalLM, prompts: Tensor, job: Mapping[str, Any]) -> Measured:
    from statescan.bench.peers import mamba_ssm_model

    new, length = job["new"], job["length"]
    theirs = mamba_ssm_model(model).to(torch.bfloat16).eval()
    short = prompts[:1, :40]
    verdicts = _held_to(model, short, theirs(short).logits[:, -1], job["implementation"])

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        theirs.generate(input_ids=prompts, max_length=length + count, cg=True, top_k=1)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(2)  # captures its graph
    read = seconds(1)
    samples = [(seconds(new) - read) / (new - 1) for _ in range(job.get("repeats", 2))]
    return {
        "samples": samples,
        "verdicts": verdicts,
        "tokens": prompts.shape[0],
        "peak_memory_bytes": _peak("cuda"),
        "prefill_tokens_per_second": prompts.numel() / read,
    }


def prefill(job: Mapping[str, Any]) -> Measured:
    """`PackedModel.prefill` of a whole batch of prompts, as `Engine` reads it: logits of every row's last position."""
    device, batch, length, name = job["device"], job["batch"], job["length"], job["implementation"]
    model = _random_model(job["preset"], device, job["dtype"])
    ids = _ids(model.config.vocab_size, batch, length, device)
    if name.startswith("transformers"):
        return _prefill_transformers(model, ids, job)
    engine = _engine(model, job)
    verdicts = _engine_verdicts(model, engine, {**job, "batch": 1})
    decoder = engine.decoder
    # A GPU is filled by several prompts at once, whole.
    chunk = max(engine.prefill_chunk, min(_TOGETHER, ids.numel())) if device == "cuda" else None
    del model
    _reset_peak(device)
    samples = []
    for turn in range(job.get("repeats", 5) + 1):
        state = decoder.init_state(batch)
        _synchronize(device)
        start = time.perf_counter()
        decoder.prefill(ids, state, together=device == "cuda", chunk=chunk)
        _synchronize(device)
        if turn:
            samples.append(time.perf_counter() - start)
    return {
        "samples": samples,
        "verdicts": verdicts,
        "tokens": batch * length,
        "peak_memory_bytes": _peak(device),
        "weights_bytes": decoder.nbytes,
    }


@torch.no_grad()
def _prefill_transformers(model: CausalLM, ids: Tensor, job: Mapping[str, Any]) -> Measured:
    from statescan.bench.peers import transformers_model

    device = job["device"]
    theirs = (
        transformers_model(model).to(device, torch.bfloat16 if job["dtype"] == "bfloat16" else torch.float32).eval()
    )
    short = ids[:1, :40]
    verdicts = _held_to(model, short, theirs(short, use_cache=False).logits[:, -1], job["implementation"])
    samples = []
    for _ in range(2):
        _synchronize(device)
        start = time.perf_counter()
        theirs(ids, use_cache=False, logits_to_keep=1)
        _synchronize(device)
        samples.append(time.perf_counter() - start)
    return {
        "samples": samples[1:],
        "verdicts": verdicts,
        "tokens": ids.numel(),
        "peak_memory_bytes": _peak(device),
    }


def read_long(job: Mapping[str, Any]) -> Measured:
    """One very long prompt through `Engine.open`, which reads it in chunks: seconds and peak memory."""
    device, length = job["device"], job["length"]
    model = _random_model(job["preset"], device, job["dtype"])
    engine = _engine(model, {**job, "batch": 1})
    verdicts = _engine_verdicts(model, engine, {**job, "batch": 1})
    del model
    ids = _ids(engine.tokenizer.vocab_size, 1, length, device)[0].cpu().numpy()
    engine.open(ids[: min(length, 2 * engine.prefill_chunk)])
    _reset_peak(device)
    start = time.perf_counter()
    session = engine.open(ids)
    _synchronize(device)
    seconds = time.perf_counter() - start
    if not bool(torch.isfinite(session._state.ssm).all()):
        raise RuntimeError("wrong result: the state after the prompt is not finite")
    return {
        "samples": [seconds],
        "verdicts": verdicts,
        "tokens": length,
        "peak_memory_bytes": _peak(device),
        "weights_bytes": engine.decoder.nbytes,
    }
