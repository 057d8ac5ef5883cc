"""The model that comes with the package writes, learns a text in two minutes on a CPU, and writes again."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statescan import __version__
from statescan.data import build_token_file, load_tokenizer
from statescan.errors import ConfigError, DataError, MissingExtraError
from statescan.evaluate import NGramModel, evaluate_tokens, xz_bits_per_byte
from statescan.files import is_leftover, make_folder, write_json, write_text
from statescan.generate import SamplingParams, generate
from statescan.inspect import inspect_text
from statescan.models import CausalLM
from statescan.ops import _native
from statescan.recipes.finetuning import PASSES, finetuning_run
from statescan.recipes.shipped import BUILTIN, shipped_model
from statescan.train import Callback, RunConfig, load_run, train

__all__ = ["CORPUS", "demo", "demo_run"]

# The packaged model has not read it, see `statescan.recipes.novels.SHIPPED_TEXTS`.
CORPUS = "packaged:moby_dick"
# Seconds of training that are planned; at the second figure it ends in any case, on a machine that slows down.
_PLANNED, _LIMIT = 75.0, 100.0
_PROMPTS = ("Call me Ishmael. ", "The whale ", "In the morning, the captain ")
_CONTEXT = 1024
# Held-out bytes that are judged: two passes of them, before and after, take some ten seconds on two cores.
_JUDGED = 24_576
# What the yardsticks learn from at most: xz and a table of 5-grams of a whole library would take longer than the rest.
_YARDSTICK_BYTES = 2_000_000
_SUMMARY = "summary.json"
_MARK = ".statescan-demo"


def demo_run(
    data: Sequence[str] = (CORPUS,), steps: int = 300, precision: str = "float32", seed: int = 0, lora: int = 0
) -> RunConfig:
    """The demo's training run as a configuration: the packaged model goes on with a text."""
    run = finetuning_run(shipped_model(BUILTIN), data, steps=steps, lora=lora)
    return replace(
        run,
        data=replace(run.data, valid_fraction=0.05),
        train=replace(
            run.train,
            batch_size=4,
            precision="bf16" if precision == "bf16" else "float32",
            seed=seed,
            evaluate_every=max(1, steps // 4),
            checkpoint_every=max(1, steps // 3),
            accelerator="cpu",
        ),
    )


def demo(
    out: str | os.PathLike[str],
    *,
    data: Sequence[str] = (CORPUS,),
    steps: int | None = None,
    seed: int = 0,
    say: Callable[[str], object] = print,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes, learns a text, writes again; judges both, looks inside, and leaves all of it in a folder.

    Args:
        out: made anew; a finished demo that stands there is replaced, an interrupted one goes on.
        data: the text: files, folders, globs or packaged names, of which the last 5 % are held out. Default: Moby-Dick,
            which the packaged model has not read.
        steps: updates; default: as many as fit into 75 seconds on this machine, and three passes at most.
        seed: of data and samples.
        say: called with each line of results.
        progress: a progress line on standard error, where that is a terminal.

    Returns:
        What summary.json holds.

    Raises:
        ConfigError: `out` holds something that no demo wrote.
        DataError: the text can't be read, or is shorter than a window of training.
        MissingExtraError: lightning-fabric is not installed.
        KeyboardInterrupt: interrupted; what was trained is kept, and the same call goes on.
    """
    begun = time.perf_counter()
    out = Path(out)
    _check_folder(out)
    folder = shipped_model(BUILTIN)
    model, tokenizer = CausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    tokens = build_token_file(list(data), tokenizer)
    train_ids, held_out = tokens.split(0.05)
    held_out = held_out[: _JUDGED + 1]
    if len(held_out) < 2:
        raise DataError(f"demo: wanted a text of some thousand bytes, got {len(tokens)}; name a longer one with --data")
    learnt, judged = train_ids[-_YARDSTICK_BYTES:].tobytes(), held_out.tobytes()
    name = "Moby-Dick" if list(data) == [CORPUS] else ", ".join(data)
    prompts = _PROMPTS if list(data) == [CORPUS] else _beginnings(judged)

    parameters = model.parameter_count()
    say(f'The model that comes with the package, {parameters:,} parameters, writes on from "{prompts[0]}":\n')
    written = _samples(model, tokenizer, prompts, seed)
    say(textwrap.fill(prompts[0] + written[0], 100) + "\n")

    say(f"{name}: {len(tokens):,} bytes, {len(train_ids):,} to learn from; {len(held_out):,} of the rest held out.")
    yardsticks = {
        "xz": xz_bits_per_byte(learnt, judged),
        "5-gram": NGramModel(5).fit(learnt).bits_per_byte(judged, context=learnt),
    }
    before = evaluate_tokens(model, held_out, tokenizer=tokenizer, context=_CONTEXT, carry_state=True).bits_per_byte
    say(
        f"Bits per held-out byte of what has read the {len(learnt):,} bytes before: xz {yardsticks['xz']:.3f}, 5-gram "
        f"{yardsticks['5-gram']:.3f}; of the model as it comes, which reads none of them: {before:.3f}."
    )

    resumed, run, speed = _plan(out, data, steps, seed, len(train_ids))
    say(
        f"Now it learns: {run.train.steps:,} updates of {run.train.batch_size} x {run.train.length} bytes, "
        f"{run.train.precision}" + (", going on where it was interrupted." if resumed else ".")
    )
    watch = _Watch(say, run.train.batch_size * run.train.length)
    started = time.perf_counter()
    result = train(run, out / "model", resume=resumed, progress=progress, callbacks=[watch])
    seconds = time.perf_counter() - started
    if result.signalled and not watch.out_of_time:
        raise KeyboardInterrupt

    tuned = CausalLM.from_pretrained(out / "model").eval()
    carried = evaluate_tokens(tuned, held_out, tokenizer=tokenizer, context=_CONTEXT, carry_state=True)
    windows = evaluate_tokens(tuned, held_out, tokenizer=tokenizer, context=_CONTEXT)
    bits = carried.bits_per_byte
    say(
        f"Held out, state carried through: {before:.3f} before, {bits:.3f} bits per byte now. "
        f"{_verdict(bits, yardsticks)}"
    )
    if bits >= before:
        say(
            "So the model is the better as it came: so little text, or one that it knows, is learnt by heart. Name "
            "more text with --data, or fewer updates with --steps."
        )

    rewritten = _samples(tuned, tokenizer, prompts, seed)
    say("\n" + _side_by_side("before", prompts[0] + written[0], "after", prompts[0] + rewritten[0]) + "\n")
    report = inspect_text(tuned, tokenizer, _passage(judged), title=f"What the model writes down of {name}")
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
    samples = [
        {"prompt": prompt, "before": one, "after": other}
        for prompt, one, other in zip(prompts, written, rewritten, strict=True)
    ]
    text = "".join(
        f"{s['prompt']}...\n\n-- before --\n{s['before']}\n\n-- after --\n{s['after']}\n\n----\n\n" for s in samples
    )
    write_text(out / "samples.txt", text)
    files += ["samples.txt", "summary.md", _SUMMARY]

    summary = {
        "text": name,
        "bits_per_byte": bits,
        "bits_per_byte_before": before,
        "bits_per_byte_windows": {"context": _CONTEXT, "bits_per_byte": windows.bits_per_byte},
        "standard_error": carried.standard_error,
        "yardsticks": yardsticks,
        "yardstick_bytes": len(learnt),
        "held_out_bytes": len(held_out),
        "training_bytes": len(train_ids),
        "evaluations": [{"step": step, "bits_per_byte": value} for step, value in result.evaluations],
        "parameters": parameters,
        "run": run.to_dict(),
        "steps": result.steps,
        "stopped_by_time": watch.out_of_time,
        "tokens_per_second": result.tokens_per_second,
        "seconds": {"training": seconds, "all": time.perf_counter() - begun, "probe": speed},
        "samples": samples,
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "cpu_kernels": _native.unavailable_reason() or _native.library().isa,
            "torch": torch.__version__,
            "statescan": __version__,
        },
        "files": files,
    }
    write_text(out / "summary.md", _markdown(summary))
    # The last file: where it stands, the demo is whole.
    write_json(out / _SUMMARY, summary, indent=2)
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
        write_text(out / _MARK, "Made by statescan demo; the next demo into this folder replaces all of it.\n")
    for entry in out.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _MARK:
            entry.unlink()


def _plan(
    out: Path, data: Sequence[str], steps: int | None, seed: int, training_bytes: int
) -> tuple[bool, RunConfig, dict[str, float]]:
    """Whether a run goes on, the run, and the measured seconds of an update for each precision."""
    previous = out / "model" / "run.json"
    if previous.exists() and not (out / _SUMMARY).exists():
        run = load_run(out / "model")
        if run == demo_run(data, steps or run.train.steps, run.train.precision, seed):
            return True, run, {}
    speed = _probe()
    precision = min(speed, key=lambda name: speed[name])
    if steps is None:
        config = demo_run(data).train
        whole = PASSES * training_bytes / (config.batch_size * config.length)
        steps = max(10, min(int(_PLANNED / speed[precision]), int(whole)))
    _make_anew(out)
    return False, demo_run(data, steps, precision, seed), speed


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
        for _ in range(4):
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


def _samples(model: CausalLM, tokenizer: Any, prompts: Sequence[str], seed: int) -> list[str]:
    params = SamplingParams(temperature=0.8, top_p=0.95, max_new_tokens=300, seed=seed)
    return [row.text for row in generate(model, list(prompts), params, tokenizer=tokenizer, dtype="bfloat16")]


def _paragraphs(text: bytes) -> list[str]:
    whole = text.decode("utf-8", "replace").replace("\r\n", "\n")
    # The first one may begin in the middle of a word.
    return [part.strip() for part in whole.split("\n\n")[1:] if part.strip()] or [whole]


def _beginnings(held_out: bytes, count: int = 3, words: int = 4) -> tuple[str, ...]:
    """The first words of the longest held-out paragraphs, to write on from."""
    longest = sorted(_paragraphs(held_out), key=len, reverse=True)[:count]
    return tuple(" ".join(paragraph.split()[:words]) + " " for paragraph in longest)


def _passage(held_out: bytes, length: int = 400) -> str:
    """The start of the first long paragraph of the held-out text."""
    return " ".join(max(_paragraphs(held_out)[:40], key=len).split())[:length]


def _side_by_side(left_title: str, left: str, right_title: str, right: str, width: int = 52) -> str:
    """Two texts in columns."""
    columns = [
        [title, "-" * width, *(line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""])]
        for title, text in ((left_title, left), (right_title, right))
    ]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(f"{one:{width}}  |  {other}".rstrip() for one, other in rows)


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
    return f"""# A Mamba that learnt {summary["text"]}

{summary["parameters"]:,} parameters, {summary["steps"]:,} updates in {summary["seconds"]["training"]:.0f} s, \
{summary["tokens_per_second"]:,.0f} bytes/s, {train_config["precision"]}, {summary["machine"]["threads"]} threads \
({summary["machine"]["cpu_kernels"]}).{stopped}

Judged on {summary["held_out_bytes"]:,} held-out bytes, after the {summary["training_bytes"]:,} before them:

| | bits per byte |
|---|---|
| xz -9e, growth of the archive | {yardsticks["xz"]:.4f} |
| 5-gram of bytes, modified Kneser-Ney | {yardsticks["5-gram"]:.4f} |
| Mamba as it comes, before it reads any of it, state carried through | {summary["bits_per_byte_before"]:.4f} |
| Mamba now, windows of {_CONTEXT} bytes | {summary["bits_per_byte_windows"]["bits_per_byte"]:.4f} |
| Mamba now, state carried through | {summary["bits_per_byte"]:.4f} |

While it learnt (the first {train_config["evaluate_tokens"]:,} held-out bytes in windows of {train_config["length"]}):

| step | bits per byte |
|---|---|
{rows}
"""
