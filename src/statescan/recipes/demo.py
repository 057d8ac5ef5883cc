"""A Mamba that learns Moby-Dick byte by byte in minutes on a CPU, beside what simpler things score on the same text."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statescan import __version__
from statescan.data import build_token_file, load_tokenizer
from statescan.errors import ConfigError, MissingExtraError
from statescan.evaluate import NGramModel, evaluate_tokens, xz_bits_per_byte
from statescan.files import atomic_file, is_leftover, make_folder
from statescan.generate import SamplingParams, generate
from statescan.inspect import inspect_text
from statescan.models import CausalLM, MambaConfig
from statescan.ops import _native
from statescan.train import Callback, DataConfig, RunConfig, TrainConfig, load_run, train

__all__ = ["CORPUS", "STEPS", "demo", "demo_run"]

CORPUS = "packaged:moby_dick"
# Found by trial on 2 cores with bfloat16: what scores best there in about two minutes. Wider and deeper models see too
# little text in that time; windows of 128 bytes train as well as longer ones, and the state carries on past them.
STEPS = 1700
MODEL = MambaConfig(d_model=192, n_layer=3, vocab_size=256, initializer_range=0.08)
# A machine on which all steps would take longer than the first figure trains fewer: as many as fit into the second. The
# third is the end in any case, for a machine that slows down on the way.
_ACCEPTED, _PLANNED, _LIMIT = 140.0, 120.0, 150.0
_PROMPTS = ("Call me Ishmael. ", "The whale ", "In the morning, the captain ")
_CONTEXT = 1024
_SUMMARY = "summary.json"
_MARK = ".statescan-demo"


def demo_run(steps: int = STEPS, precision: str = "float32", seed: int = 0) -> RunConfig:
    """The demo's training run as a configuration."""
    return RunConfig(
        MODEL,
        DataConfig(paths=(CORPUS,), valid_fraction=0.05),
        TrainConfig(
            steps=steps,
            batch_size=16,
            length=128,
            lr=8e-3,
            warmup=min(50, max(1, steps // 10)),
            precision="bf16" if precision == "bf16" else "float32",
            seed=seed,
            evaluate_every=max(1, steps // 8),
            checkpoint_every=max(1, steps // 4),
            keep_checkpoints=1,
            accelerator="cpu",
        ),
    )


def demo(
    out: str | os.PathLike[str],
    *,
    steps: int | None = None,
    seed: int = 0,
    say: Callable[[str], object] = print,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains, judges, samples and looks inside, and leaves all of it in a folder.

    Args:
        out: made anew; a finished demo that stands there is replaced, an interrupted one goes on.
        steps: updates; default: `STEPS`, or as many as about two minutes allow on a slower machine.
        seed: of weights, data and samples.
        say: called with each line of results.
        progress: a progress line on standard error, where that is a terminal.

    Returns:
        What summary.json holds.

    Raises:
        ConfigError: `out` holds something that no demo wrote.
        MissingExtraError: lightning-fabric is not installed.
        KeyboardInterrupt: interrupted; what was trained is kept, and the same call goes on.
    """
    begun = time.perf_counter()
    out = Path(out)
    _check_folder(out)
    tokens = build_token_file(CORPUS)
    train_ids, held_out = tokens.split(0.05)
    say(f"Moby-Dick, {len(tokens):,} bytes: {len(train_ids):,} to learn from, the last {len(held_out):,} held out.")
    learnt, judged = train_ids.tobytes(), held_out.tobytes()
    yardsticks = {
        "xz": xz_bits_per_byte(learnt, judged),
        "5-gram": NGramModel(5).fit(learnt).bits_per_byte(judged, context=learnt),
    }
    say(
        f"Yardsticks that learnt the same text, bits per held-out byte: xz {yardsticks['xz']:.3f}, "
        f"5-gram {yardsticks['5-gram']:.3f}."
    )

    resumed, run, speed = _plan(out, steps, seed)
    parameters = CausalLM(run.model, device="meta").parameter_count()
    say(
        f"Mamba, {parameters:,} parameters, {run.train.steps:,} updates of {run.train.batch_size} x {run.train.length} "
        f"bytes, {run.train.precision}" + (", going on where it was interrupted." if resumed else ".")
    )
    watch = _Watch(say, run.train.batch_size * run.train.length)
    started = time.perf_counter()
    result = train(run, out / "model", resume=resumed, progress=progress, callbacks=[watch])
    seconds = time.perf_counter() - started
    if result.interrupted and not watch.out_of_time:
        raise KeyboardInterrupt

    model = CausalLM.from_pretrained(out / "model").eval()
    tokenizer = load_tokenizer(out / "model")
    carried = evaluate_tokens(model, held_out, tokenizer=tokenizer, context=_CONTEXT, carry_state=True)
    windows = evaluate_tokens(model, held_out, tokenizer=tokenizer, context=_CONTEXT)
    bits = carried.bits_per_byte
    say(f"Held out, all of it, state carried through: {bits:.3f} bits per byte. {_verdict(bits, yardsticks)}")

    samples = _samples(model, tokenizer, seed)
    report = inspect_text(model, tokenizer, _passage(judged), title="What the demo's model writes down of Moby-Dick")
    files = ["model", "model/run.json", "model/log.csv"]
    report.save_html(out / "inspection.html")
    files.append("inspection.html")
    try:
        report.save_png(out / "inspection.png")
        windows.draw(out / "position.png", label=f"Mamba, {parameters:,} parameters")
        files += ["inspection.png", "position.png"]
    except MissingExtraError as missing:
        say(f"No pictures: {missing}")
    if (out / "model" / "loss.png").exists():
        shutil.copyfile(out / "model" / "loss.png", out / "loss.png")
        files.append("loss.png")
    _write(out / "samples.txt", "".join(f"{prompt}{text}\n\n----\n\n" for prompt, text in samples))
    files += ["samples.txt", "summary.md", _SUMMARY]
    say(f"\nIt writes:\n\n{samples[0][0]}{samples[0][1]}\n")

    summary = {
        "bits_per_byte": bits,
        "bits_per_byte_windows": {"context": _CONTEXT, "bits_per_byte": windows.bits_per_byte},
        "standard_error": carried.standard_error,
        "yardsticks": yardsticks,
        "held_out_bytes": len(held_out),
        "training_bytes": len(train_ids),
        "evaluations": [{"step": step, "bits_per_byte": value} for step, value in result.evaluations],
        "parameters": parameters,
        "run": run.to_dict(),
        "steps": result.steps,
        "stopped_by_time": watch.out_of_time,
        "tokens_per_second": result.tokens_per_second,
        "seconds": {"training": seconds, "all": time.perf_counter() - begun, "probe": speed},
        "samples": [{"prompt": prompt, "text": text} for prompt, text in samples],
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "cpu_kernels": _native.unavailable_reason() or _native.library().isa,
            "torch": torch.__version__,
            "statescan": __version__,
        },
        "files": files,
    }
    _write(out / "summary.md", _markdown(summary))
    # The last file: where it stands, the demo is whole.
    _write(out / _SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


@dataclass
class _Watch(Callback):
    """Tells of each evaluation, and ends the run when its time is over."""

    say: Callable[[str], object]
    tokens_per_step: int
    out_of_time: bool = False

    def __post_init__(self) -> None:
        self.started = time.perf_counter()

    def on_log(self, row: dict[str, float]) -> None:
        if not self.out_of_time and time.perf_counter() - self.started > _LIMIT:
            self.out_of_time = True
            # The trainer takes it as a wish to stop: it finishes its update and saves.
            signal.raise_signal(signal.SIGINT)

    def on_evaluation(self, step: int, bits_per_byte: float) -> None:
        seconds = time.perf_counter() - self.started
        read = step * self.tokens_per_step
        self.say(
            f"  {seconds:6.1f} s  step {step:5,}  {read:9,} bytes read  held out {bits_per_byte:.3f} bits per byte"
        )


def _check_folder(out: Path) -> None:
    """Refuses a folder with anything in it that a demo did not write."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"demo: --out must be a folder, got the file '{out}'; name another path")
    # A new demo replaces the folder: it must carry a demo's mark, and every name in it must be one that a demo writes.
    found = {entry.name for entry in out.iterdir() if not is_leftover(entry.name)}
    written = {
        _MARK,
        _SUMMARY,
        "summary.md",
        "samples.txt",
        "loss.png",
        "position.png",
        "inspection.html",
        "inspection.png",
        "model",
    }
    if found and not (_MARK in found and found <= written):
        raise ConfigError(f"demo: --out must be new, empty or an earlier demo's folder, got '{out}'; name another path")


def _make_anew(out: Path) -> None:
    """An empty folder with a demo's mark, which is there before anything else and stays longest."""
    make_folder(out)
    if not (out / _MARK).exists():
        _write(out / _MARK, "Made by statescan demo; the next demo into this folder replaces all of it.\n")
    for entry in out.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _MARK:
            entry.unlink()


def _plan(out: Path, steps: int | None, seed: int) -> tuple[bool, RunConfig, dict[str, float]]:
    """Whether a run goes on, the run, and the measured seconds of an update for each precision."""
    previous = out / "model" / "run.json"
    if previous.exists() and not (out / _SUMMARY).exists():
        run = load_run(out / "model")
        if run == demo_run(steps or run.train.steps, run.train.precision, seed):
            return True, run, {}
    speed = _probe()
    precision = min(speed, key=lambda name: speed[name])
    if steps is None:
        steps = STEPS
        if steps * speed[precision] > _ACCEPTED:
            steps = max(100, int(_PLANNED / speed[precision]) // 50 * 50)
    _make_anew(out)
    return False, demo_run(steps, precision, seed), speed


def _probe() -> dict[str, float]:
    """Seconds that an update takes in float32 and in bfloat16, which some CPUs only emulate."""
    run = demo_run()
    random = torch.random.get_rng_state()
    model = CausalLM(run.model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, 256, (run.train.batch_size, run.train.length + 1))
    seconds = {}
    for precision in ("float32", "bf16"):
        times = []
        for _ in range(8):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(ids[:, :-1], labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
        # The best of them: a neighbour that takes the cores for a moment says nothing about the minutes that follow.
        seconds[precision] = min(times)
    torch.random.set_rng_state(random)
    return seconds


def _samples(model: CausalLM, tokenizer: Any, seed: int) -> list[tuple[str, str]]:
    params = SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=300, seed=seed)
    written = generate(model, list(_PROMPTS), params, tokenizer=tokenizer)
    return [(prompt, row.text) for prompt, row in zip(_PROMPTS, written, strict=True)]


def _passage(held_out: bytes, length: int = 400) -> str:
    """The start of the first long paragraph of the held-out text."""
    paragraphs = held_out.decode("utf-8", "replace").replace("\r\n", "\n").split("\n\n")[1:]
    return " ".join(max(paragraphs[:40], key=len).split())[:length]


def _verdict(bits: float, yardsticks: dict[str, float]) -> str:
    parts = []
    for name, yardstick in yardsticks.items():
        difference = yardstick - bits
        parts.append(f"{abs(difference):.3f} {'better' if difference > 0 else 'worse'} than {name}")
    return "That is " + " and ".join(parts) + "."


def _markdown(summary: dict[str, Any]) -> str:
    yardsticks, train_config = summary["yardsticks"], summary["run"]["train"]
    rows = "\n".join(f"| {row['step']:,} | {row['bits_per_byte']:.4f} |" for row in summary["evaluations"])
    stopped = " It was stopped by its time limit before its schedule ended." if summary["stopped_by_time"] else ""
    return f"""# A Mamba that read Moby-Dick

{summary["parameters"]:,} parameters, {summary["steps"]:,} updates in {summary["seconds"]["training"]:.0f} s, \
{summary["tokens_per_second"]:,.0f} bytes/s, {train_config["precision"]}, {summary["machine"]["threads"]} threads \
({summary["machine"]["cpu_kernels"]}).{stopped}

Judged on the last {summary["held_out_bytes"]:,} bytes, after the {summary["training_bytes"]:,} before them:

| | bits per byte |
|---|---|
| xz -9e, growth of the archive | {yardsticks["xz"]:.4f} |
| 5-gram of bytes, modified Kneser-Ney | {yardsticks["5-gram"]:.4f} |
| Mamba, windows of {_CONTEXT} bytes | {summary["bits_per_byte_windows"]["bits_per_byte"]:.4f} |
| Mamba, state carried through | {summary["bits_per_byte"]:.4f} |

While it learnt (the first {train_config["evaluate_tokens"]:,} held-out bytes in windows of {train_config["length"]}):

| step | bits per byte |
|---|---|
{rows}
"""


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
