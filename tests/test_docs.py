"""What the documents show works: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(kind: str) -> Iterator[tuple[Path, int, str]]:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match.group(1) == kind:
                yield document, text.count("\n", 0, match.start()) + 2, match.group(2)


def _name(document: Path, line: int) -> str:
    return f"{document.relative_to(ROOT)}:{line}"


# What a reader of a guide has at hand: a model and its tokenizer, a text, and the folders that the guides speak of.
AT_HAND = """
import pathlib, numpy, zstandard
from statescan.data import ByteTokenizer
from statescan.models import CausalLM, preset
text = "There she blows! A hump like a snow-hill! It is Moby Dick!"
for folder in ("notes", "logs"):
    pathlib.Path(folder).mkdir()
pathlib.Path("notes/one.txt").write_text(200 * text)
pathlib.Path("logs/one.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "There she blows!"}'))
model, tokenizer = CausalLM(preset("tiny", n_layer=2, d_model=32)), ByteTokenizer()
tokens = tokenizer.encode(20 * text)
"""
# A run that a guide shows at its full length is shortened here.
SHORTER = {"TrainConfig(steps=2000)": "TrainConfig(steps=2, batch_size=2, length=64)"}

PYTHON_FILES = sorted({document for document, _, _ in _blocks("python")})
COMMANDS = [
    pytest.param(command, id=f"{_name(document, line)} {command[:60]}")
    for kind in ("sh", "bash", "console")
    for document, line, code in _blocks(kind)
    for command in (part.partition("#")[0].strip().removeprefix("$ ") for part in code.splitlines())
    if command.startswith("statescan ")
]


def test_the_documents_hold_what_these_tests_read() -> None:
    assert ROOT / "README.md" in PYTHON_FILES
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("document", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_of_a_document_runs(document: Path, tmp_path: Path) -> None:
    # The blocks of a document run one after another in one process, as a reader would paste them. The line numbers of a
    # traceback are the document's.
    parts, at = [], 1
    for found, line, code in _blocks("python"):
        if found == document:
            parts.append("\n" * (line - at) + code)
            at = line + code.count("\n")
    code = "".join(parts)
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    (tmp_path / "document.py").write_text(code, encoding="utf-8")
    (tmp_path / "at_hand.py").write_text(AT_HAND, encoding="utf-8")
    runner = "exec(open('at_hand.py').read()); exec(compile(open('document.py').read(), 'document.py', 'exec'))"
    done = subprocess.run(
        [sys.executable, "-c", runner],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "STATESCAN_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, f"{document.relative_to(ROOT)}:\n{done.stderr}"


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_a_document_parses(line: str) -> None:
    import typer.main

    from statescan.cli.app import app

    # Three dots stand for the texts and the folder.
    arguments = shlex.split(line.replace(" ... ", " --data texts --out run "))[1:]
    group: Any = typer.main.get_command(app)
    context = group.make_context("statescan", list(arguments), resilient_parsing=False)
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    parsed = command.make_context(name, rest, parent=context)  # a usage error raises
    overrides = parsed.params.get("overrides") or []
    if name == "train":
        from statescan.models import preset
        from statescan.recipes.sequence_classification import classification
        from statescan.train import RunConfig

        if parsed.params["modality"] == "audio":
            from statescan.models import WaveformConfig
            from statescan.train import apply_overrides
            from statescan.train.waveform import AudioData, AudioRun, WaveformTraining

            apply_overrides(AudioRun(WaveformConfig(), AudioData(), WaveformTraining()), overrides)
            return
        if parsed.params["task"]:
            classification(parsed.params["task"], parsed.params["mixer"] or "s4", overrides=overrides)
            return
        RunConfig(preset(parsed.params["preset"] or "tiny")).apply_overrides(overrides)


def test_a_wrong_command_would_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        test_a_command_of_a_document_parses("statescan train --out x --no-such-option 3")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def test_the_file_tree_of_the_readme_is_the_trees() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme[readme.index("src/statescan/\n") :].partition("```")[0]
    rooms = {line.split()[0].strip("/") for line in tree.splitlines()[1:] if line.startswith("  ")}
    there = {path.parent.name for path in (ROOT / "src" / "statescan").glob("*/__init__.py")}
    assert rooms == there


RESULTS = ROOT / "benchmarks" / "results"


def _record(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _bullet(start: str) -> str:
    (line,) = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith(start)]
    return line


def _seeds() -> tuple[list[float], list[float]]:
    """How far Mamba is below Transformer++ at each size, with seed 0 and with seed 1."""
    rows = _record("reproduce/language-scaling.json")["rows"]
    of_mamba = [rows[f"mamba-{size}"] for size in ("0.3m", "1m", "4m", "16m")]
    return (
        [-row["beside_transformer++"][0] for row in of_mamba],
        [-row["other_seeds_beside_transformer++"]["1"][0] for row in of_mamba],
    )


def test_the_readme_tells_of_language_scaling_what_is_on_record() -> None:
    bullet = _bullet("- Language scaling, ")
    rows, by_bpe = (_record(f"reproduce/language-scaling{kind}.json")["rows"] for kind in ("", "-bpe"))
    sizes = ("0.3m", "1m", "4m", "16m")
    first, second = _seeds()
    bpe = [-by_bpe[f"mamba-{size}"]["beside_transformer++"][0] for size in sizes]
    wanted = [
        *(min(first + second), max(first + second)),
        *(rows[f"{family}-{size}"]["bits_per_byte"] for family in ("mamba", "transformer++") for size in sizes),
        *(min(bpe), max(bpe)),
        *(by_bpe[f"{family}-16m"]["bits_per_byte"] for family in ("mamba", "transformer++")),
        *(rows[name]["bits_per_byte"] for name in ("lstm-1m", "s4-1m")),
    ]
    # Every figure of three digits, in its order: whatever the sentence around it says.
    assert re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", bullet) == [f"{bits:.3f}" for bits in wanted]
    rises = {
        name: 100 * row["rise"]
        for name, row in _record("reproduce/context-growth.json")["rows"].items()
        if "mamba" in name
    }
    worst, others = rises.pop("mamba-2k"), max(rises.values())
    assert f"within {others:.1f} % of its best (trained on 2k alone: {worst:.0f} %)" in bullet
    copies = _record("reproduce/context-growth-4m.json")["same_bytes"]["mamba-2k-names"]
    last = copies[f"{1 << 14}:{1 << 18}"]
    assert last["mean"] + 2 * last["standard_error"] < 0
    assert f"to 512k, by {-last['mean']:.4f} bits on the same bytes" in bullet


def test_the_readme_tells_of_the_packaged_mamba_what_is_on_record() -> None:
    bullet = _bullet("- The packaged Mamba ")
    held = _record("reproduce/builtin-model.json")
    packaged, twin, tuned = (one["scores"]["novels_test"] for one in held["runs"][:3])
    wanted = [packaged["carried"], twin["overlapping"], packaged["overlapping"], tuned["carried"], packaged["windows"]]
    assert re.findall(r"(?<![\d.])1\.\d{3}(?!\d)", bullet) == [f"{bits:.3f}" for bits in wanted]
    assert f"{twin['windows']:.3f}" == f"{packaged['windows']:.3f}"
    moved = max(abs(one - two) for one, two in zip(*_seeds(), strict=True))
    assert f"a seed can move {moved:.3f}." in bullet
    same = _record("reproduce/context-growth-4m.json")["last_stages"]["packaged"]["base"]["same_bytes"]
    most = max(same[f"{1 << 14}:{1 << power}"]["mean"] for power in range(15, 20))
    assert f"costs {most:.4f} bits at most" in bullet
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    seconds = held["runs"][0]["seconds"]
    assert f"in {seconds:.0f} seconds of one H200: {packaged['carried']:.3f} bits per byte of novels" in readme


def test_the_pace_of_fifteen_million_parameters_is_on_record() -> None:
    zeros, carried = _record("h100-train-bytes.json")
    assert (zeros["carried"], carried["carried"]) == (False, True)
    pace, slower = (f"{one['bytes_per_second'] / 1e6:.2f}" for one in (zeros, carried))
    parameters = re.escape(f"{zeros['parameters'] / 1e6:.1f}")
    found: list[str] = []
    for document in DOCUMENTS:
        words = " ".join(document.read_text(encoding="utf-8").split())
        found += re.findall(rf"{parameters} (?:M|million) parameters.{{0,80}}? (\d+\.\d+) MB/s", words)
    assert len(found) >= 2
    assert set(found) == {pace}
    used = " and ".join(f"{100 * one['model_flop_utilization']:.1f}" for one in (zeros, carried))
    memory = " and ".join(f"{one['peak_gib']:.1f}" for one in (zeros, carried))
    words = " ".join((ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8").split())
    assert f" and {slower} with carried states, {used} % of the peak, {memory} GiB" in words
