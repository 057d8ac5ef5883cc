"""The commands do what they say, in this process: figures to standard output, everything else to standard error."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from statescan.cli import main
from statescan.data import ByteTokenizer
from statescan.models import CausalLM, MambaConfig, parameter_count, preset

TEXT = "The whale swam. The men rowed after it, and the sea was cold and wide. " * 60
COMMANDS = ("doctor", "train", "generate", "evaluate", "inspect", "bench", "info", "convert", "demo")


Run = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    CausalLM(MambaConfig(d_model=16, n_layer=2, vocab_size=256, d_state=4)).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "whale.txt"
    path.write_text(TEXT)
    return path


def one_line(ran: Any, code: int = 1) -> str:
    """The error of a command that ended as it should: one line on standard error, nothing on standard output."""
    assert ran.code == code, ran
    assert ran.out == ""
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert "Traceback" not in ran.err
    return ran.err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(run: Run, name: str) -> None:
    ran = run(name, "--help")
    assert ran.code == 0
    assert f"Example: statescan {name}" in ran.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_all_that_was_written_for_it(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Square brackets in a help text are markup, and vanish without a word: defaults are typer's to show.
    import typer

    from statescan.cli.app import app

    monkeypatch.setenv("COLUMNS", "400")
    shown = run(name, "--help").out
    parameters = [one for one in typer.main.get_command(app).commands[name].params if one.name != "help"]
    assert parameters
    for parameter in parameters:
        default = parameter.show_default
        written = [parameter.help] + ([f"[default: ({default})]"] if isinstance(default, str) else [])
        assert all(written), f"{parameter.name} has no help"
        assert [text for text in written if text not in shown] == []


def test_help_lists_every_command(run: Run) -> None:
    shown = run("--help").out
    assert [name for name in COMMANDS if name not in shown] == []


def test_usage_errors_exit_with_2(run: Run) -> None:
    assert run("train").code == 2
    assert run("no-such-command").code == 2
    assert run("evaluate", "--model", "x", "--data", "y", "--context", "0").code == 2
    # A seed that readers of JSON would round is not taken, since --json prints it.
    assert run("generate", "--model", "x", "--prompt", "y", "--seed", 2**53).code == 2


def test_doctor_says_what_runs_and_why_the_rest_does_not(run: Run) -> None:
    facts = json.loads(run("doctor", "--json").out)
    assert facts["torch"]["version"] == torch.__version__
    library = facts["cpu_library"]
    assert (library["path"] is None) != (library["problem"] is None)
    scan = facts["backends"]["cpu"]["selective_scan"]
    assert scan["runs"] == ("torch" if library["problem"] else "cpu")
    assert set(scan["others"]) >= {"reference"}
    shown = run("doctor")
    assert shown.code == 0
    for piece in ("C++ kernels", "GPU", "selective_scan", "packed_linear", "threads"):
        assert piece in shown.out


def test_doctor_names_the_cure_where_the_library_is_broken(run: Run, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    done = subprocess.run(
        [sys.executable, "-m", "statescan", "doctor", "--json"],
        env={**os.environ, "STATESCAN_CPU_LIBRARY": str(broken)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert "does not load" in facts["cpu_library"]["problem"]
    assert "pip install" in facts["cpu_library"]["problem"]
    assert facts["backends"]["cpu"]["selective_scan"]["runs"] == "torch"


def test_doctor_names_the_extra_of_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from statescan.cli import doctor

    monkeypatch.setitem(doctor.EXTRAS, "plot", ("PNG pictures", ("no_such_package_here",)))
    extra = doctor.examine()["extras"]["plot"]
    assert extra["missing"] == ["no_such_package_here"]
    assert extra["install"] == "pip install 'statescan[plot]'"


def test_info_of_a_preset_and_of_a_folder(run: Run, model: Path) -> None:
    facts = json.loads(run("info", "130m", "--set", "d_state=32", "--json").out)
    assert facts["parameters"] == parameter_count(preset("130m", d_state=32))
    assert facts["config"]["d_state"] == 32
    shown = run("info", model).out
    assert f"{parameter_count(MambaConfig(d_model=16, n_layer=2, vocab_size=256, d_state=4)):,}" in shown
    assert "d_state = 4" in shown


def test_evaluate_prints_bits_per_byte(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ran = run("evaluate", "--model", model, "--data", text, "--context", 64, "--png", tmp_path / "curve.png")
    assert ran.code == 0, ran.err
    figure = float(ran.out.split("bits per byte")[1].split()[0])
    facts = json.loads(run("evaluate", "--model", model, "--data", text, "--context", 64, "--json").out)
    assert figure == pytest.approx(facts["bits_per_byte"], abs=1e-4)
    assert facts["tokens"] == len(TEXT) - 1
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    last = json.loads(run("evaluate", "--model", model, "--data", text, "--last", 0.1, "--json").out)
    assert last["tokens"] == round(len(TEXT) * 0.1) - 1
    most = json.loads(run("evaluate", "--model", model, "--data", text, "--max-tokens", 33, "--json").out)
    assert most["tokens"] == 32


def test_generate_writes_the_same_text_streamed_and_as_json(run: Run, model: Path) -> None:
    options = ("--model", model, "--max-new-tokens", 20, "--seed", 3, "--temperature", 0.8)
    streamed = run("generate", *options, "--prompt", "Call me")
    assert streamed.code == 0, streamed.err
    assert "tokens/s" in streamed.err
    (row,) = json.loads(run("generate", *options, "--prompt", "Call me", "--json").out)
    assert streamed.out == f"Call me{row['text']}\n"
    assert len(row["tokens"]) == 20
    assert run("generate", *options, "--prompt", "Call me", "--no-echo").out == f"{row['text']}\n"
    assert run("generate", *options, "--prompt", "Call me").out == streamed.out


def test_a_fresh_seed_as_json_draws_the_same_text_again(run: Run, model: Path) -> None:
    options = ("--model", model, "--max-new-tokens", 12, "--prompt", "A", "--json")
    (row,) = json.loads(run("generate", *options).out, parse_int=float)  # as a reader that keeps float64 does
    assert json.loads(run("generate", *options, "--seed", int(row["seed"])).out)[0]["text"] == row["text"]


def test_generate_takes_several_prompts_and_keeps_them_apart(run: Run, model: Path) -> None:
    options = ("--model", model, "--max-new-tokens", 12, "--seed", 3)
    prompts = ("Call me", "The whale swam in the sea", "A")
    alone = [json.loads(run("generate", *options, "--prompt", prompt, "--json").out)[0]["text"] for prompt in prompts]
    together = run("generate", *options, *(part for prompt in prompts for part in ("--prompt", prompt)))
    wanted = "".join(
        f"== {i} ==\n{prompt}{text}\n" for i, (prompt, text) in enumerate(zip(prompts, alone, strict=True), 1)
    )
    assert together.out == wanted


def test_generate_reads_standard_input_and_stops(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Call me"))
    options = ("--model", model, "--max-new-tokens", 40, "--seed", 3, "--json")
    (from_stdin,) = json.loads(run("generate", *options, "--prompt", "-").out)
    (given,) = json.loads(run("generate", *options, "--prompt", "Call me").out)
    assert from_stdin["tokens"] == given["tokens"]
    letter = given["text"][3]
    (stopped,) = json.loads(run("generate", *options, "--prompt", "Call me", "--stop", letter).out)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == given["text"].partition(letter)[0]


def test_generate_ends_where_the_model_ends_a_text(run: Run, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    known = {"<|endoftext|>": 0, "<|im_end|>": 1, "call": 2, "me": 3}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="me")).save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    CausalLM(MambaConfig(d_model=16, n_layer=1, vocab_size=4, d_state=4)).save_pretrained(tmp_path)
    options = ("generate", "--model", tmp_path, "--prompt", "call", "--seed", 3, "--max-new-tokens", 60, "--json")
    for named, end in (("<|im_end|>", 1), ("<|endoftext|>", 0)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        (row,) = json.loads(run(*options).out)
        assert (row["finish_reason"], row["stop"], row["tokens"].index(end)) == ("stop", end, len(row["tokens"]) - 1)


def test_inspect_writes_a_page_and_a_picture(run: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    ran = run("inspect", "It was the whale.", "-o", page, "--png", "--model", model)
    assert ran.code == 0, ran.err
    assert "<html" in page.read_text().lower()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads(run("inspect", "It was the whale.", "-o", page, "--model", model, "--json").out)
    assert "".join(facts["pieces"]) == "It was the whale."
    assert [layer["layer"] for layer in facts["layers"]] == [0, 1]


def test_train_then_resume_then_use_the_run(run: Run, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    out = tmp_path / "run"
    small = [
        *("model.d_model=16", "model.n_layer=1", "model.d_state=4", "train.batch_size=2", "train.length=32"),
        *("train.checkpoint_every=4", "train.evaluate_every=4", "train.log_every=2", "train.accelerator=cpu"),
        f"data.cache={tmp_path}",
    ]
    options = [part for override in small for part in ("--set", override)]
    ran = run("train", "--data", text, "--out", out, *options, "--set", "train.steps=6", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["steps"] == 6
    assert facts["evaluations"][-1]["step"] == 6
    assert 0 < facts["bits_per_byte"] == facts["evaluations"][-1]["bits_per_byte"]

    refused = one_line(run("train", "--data", text, "--out", out, *options, "--set", "train.steps=6"))
    assert "--resume" in refused
    on = json.loads(run("train", "--out", out, "--resume", "--set", "train.steps=8", "--json").out)
    assert on["steps"] == 8
    assert [entry["step"] for entry in on["evaluations"]] == [0, 4, 6, 8]
    assert run("generate", "--model", out, "--prompt", "The", "--max-new-tokens", 3).code == 0
    again = run("train", "--config", out / "run.json", "--out", tmp_path / "again", "--set", "train.steps=2", "--json")
    assert json.loads(again.out)["steps"] == 2


@pytest.mark.parametrize(("step", "status"), [(1, "interrupted"), (2, "finished")])
def test_train_that_gets_a_signal_exits_with_130(
    run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, status: str
) -> None:
    """With its last update, too: what comes after it in a script does not begin."""
    pytest.importorskip("lightning_fabric")
    from statescan.train import loop

    update = loop._Trainer._update

    def with_a_signal(self: loop._Trainer) -> None:
        update(self)
        if self.done == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop._Trainer, "_update", with_a_signal)
    small = ("model.d_model=16", "model.n_layer=1", "train.batch_size=2", "train.length=32", "train.steps=2")
    options = [part for one in (*small, "train.accelerator=cpu", f"data.cache={tmp_path}") for part in ("--set", one)]
    ran = run("train", "--data", text, "--out", tmp_path / "run", *options, "--json")
    assert ran.code == 130, ran.err
    assert json.loads(ran.out)["interrupted"] == (status == "interrupted")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == status


def test_train_refuses_a_preset_or_tokenizer_that_the_run_does_not_have(run: Run, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models

    words = tmp_path / "words.json"
    Tokenizer(models.WordLevel({"whale": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(words))
    out = tmp_path / "run"
    shape = ("--set", "model.n_layer=1", "--set", "model.d_model=16")
    small = ("--set", "train.length=32", "--set", "train.batch_size=2", "--set", f"data.cache={tmp_path}")
    line = ("train", "--data", text, "--out", out, "--preset", "tiny", "--tokenizer", "bytes", *shape, *small)
    assert run(*line, "--set", "train.steps=1").code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for source in (("--resume",), ("--config", out / "run.json", "--set", f"data.cache={tmp_path}")):
        place = out if source[0] == "--resume" else tmp_path / "other"
        refused = one_line(run("train", "--out", place, *source, "--preset", "small"))
        assert "wanted a --preset with d_model = 16" in refused
        assert "got 'small' with" in refused
        assert "leave it out" in refused
        # The run was begun with the preset and fields of its own: the preset alone is another model.
        assert "got 'tiny'" in one_line(run("train", "--out", place, *source, "--preset", "tiny"))
        refused = one_line(run("train", "--out", place, *source, "--tokenizer", words))
        assert "wanted --tokenizer bytes" in refused
        assert "words.json; leave it out" in refused
        assert not (tmp_path / "other").exists()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # The line that started it, as an interrupted run prints it, goes on; so does a run from its own file.
    again = run(*line, "--set", "train.steps=2", "--resume", "--json")
    assert json.loads(again.out)["steps"] == 2, again.err
    agreeing = ("--config", out / "run.json", "--preset", "tiny", *shape, "--tokenizer", "bytes")
    assert run("train", "--out", tmp_path / "other", *agreeing).code == 0
    # A configuration given with --resume is heard too.
    other = tmp_path / "other.json"
    other.write_text((out / "run.json").read_text().replace('"seed": 0', '"seed": 1'))
    assert "train.seed = 0" in one_line(run("train", "--out", out, "--config", other, "--resume"))


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (("info", "tinny"), ("tinny", "tiny")),
        (("info", "tiny", "--set", "d_stat=3"), ("d_stat", "d_state")),
        (("info", "tiny", "--set", "d_state=many"), ("d_state", "many")),
        (("train", "--out", "{tmp}/o"), ("--data",)),
        (("train", "--out", "{tmp}/o", "--data", "{tmp}/nothing.txt"), ("nothing.txt",)),
        (("train", "--out", "{tmp}/o", "--data", "{tmp}/empty.txt"), ("empty",)),
        (("train", "--out", "{tmp}/o", "--data", "{text}", "--preset", "huge"), ("huge", "tiny")),
        (("train", "--out", "{tmp}/o", "--data", "{text}", "--set", "train.stps=1"), ("train.stps", "train.steps")),
        (("train", "--out", "{tmp}/o", "--data", "{text}", "--set", "train.lr=fast"), ("train.lr", "fast")),
        (("train", "--out", "{tmp}/o", "--resume"), ("run.json",)),
        (("generate", "--model", "{tmp}/nowhere", "--prompt", "x"), ("nowhere", "does not exist")),
        (("generate", "--model", "{text}", "--prompt", "x"), ("is a file",)),
        (("generate", "--model", "{model}", "--prompt", "x", "--temperature", "-1"), ("temperature", "-1")),
        (("generate", "--model", "{model}", "--prompt", "x", "--top-p", "2"), ("top_p", "2")),
        (("generate", "--model", "{model}", "--prompt", "x", "--device", "warp9"), ("--device", "warp9")),
        (("generate", "--model", "{cut}", "--prompt", "x"), ("model.safetensors",)),
        (("generate", "--model", "{other}", "--prompt", "x"), ("got",)),
        (("evaluate", "--model", "{model}", "--data", "{tmp}/empty.txt"), ("empty",)),
        (("evaluate", "--model", "{model}", "--data", "{text}", "--max-tokens", "1"), ("at least 2",)),
        (("evaluate", "--model", "{model}", "--data", "{text}", "--last", "0"), ("--last", "above 0", "got 0.0")),
        (("evaluate", "--model", "{model}", "--data", "{text}", "--last", "1.5"), ("--last", "at most 1", "got 1.5")),
        (("evaluate", "--model", "{model}", "--data", "{text}", "--last", "nan"), ("--last", "got nan")),
        (("evaluate", "--model", "{model}", "--data", "{text}", "--last", "1e-4"), ("--last", "leaves 0 of")),
        (("inspect", "", "--model", "{model}", "-o", "{tmp}/r.html"), ("text",)),
        (("inspect", "x", "--model", "{model}", "-o", "{tmp}/no/such/r.html"), ("no/such/r.html:", "make it first")),
        (("inspect", "x", "--model", "{model}", "-o", "{tmp}/taken"), ("/taken: Is a directory", "name a file")),
        (("inspect", "x", "--model", "{model}", "-o", "/proc/x"), ("/proc/x:", "; ")),
        (
            ("evaluate", "--model", "{model}", "--data", "{text}", "--png", "{tmp}/no/such/c.png"),
            ("no/such/c.png:", "make it first"),
        ),
        (
            ("train", "--out", "/proc/x", "--data", "{text}"),
            ("/proc/x:", "choose a folder"),
        ),
        (("train", "--out", "{tmp}/taken", "--data", "{text}"), ("taken", "thesis.txt", "name another")),
        (("bench", "speed"), ("speed", "scan")),
        (("demo", "--out", "{tmp}/taken"), ("--out", "taken")),
    ],
)
def test_bad_input_gives_one_clear_line(
    run: Run, model: Path, text: Path, tmp_path: Path, arguments: tuple[str, ...], pieces: tuple[str, ...]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    cut, other = tmp_path / "cut", tmp_path / "other"
    for folder in (cut, other):
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "d_model": 24}))
    places = {"tmp": tmp_path, "model": model, "text": text, "cut": cut, "other": other}
    line = one_line(run(*(argument.format(**places) for argument in arguments)))
    assert line.startswith("statescan: ")
    assert [piece for piece in pieces if piece not in line] == []
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "precious"


def test_a_defect_is_named_and_debug_shows_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from statescan.cli import info, terminal

    def broken(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(info, "describe", broken)
    monkeypatch.setattr(terminal, "_debug", False)
    assert "--debug" in one_line(run("info", "tiny"))
    with pytest.raises(KeyError, match="surprise"):
        main(["--debug", "info", "tiny"])


def test_an_interrupted_command_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from statescan.cli import info

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "describe", interrupted)
    assert "interrupted" in one_line(run("info", "tiny"), code=130)


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    from statescan.cli.terminal import emit_json

    emit_json({"loss": float("nan"), "all": (1, float("inf")), "at": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "all": [1, None], "at": "x"}


def test_bench_table_shows_figures_and_failures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from statescan import bench

    row = {
        "bench": "scan",
        "case": "1 x 8 x 4",
        "implementation": "statescan",
        "dtype": "float32",
        "failure": None,
        "milliseconds": 1.25,
        "best": 1.0,
        "tokens_per_second": None,
        "ratio": 2.0,
        "relative_error": 1e-7,
    }
    failed = {**row, "implementation": "peer", "failure": "peer is not installed"}
    asked: dict[str, object] = {}

    def run_bench(names: list[str], **options: object) -> dict[str, object]:
        asked.update(options, names=names)
        return {"machine": {"threads": 2}, "ceilings": {}, "rows": [row, failed]}

    monkeypatch.setattr(bench, "run", run_bench)
    ran = run("bench", "scan", "--threads", 2, "--quick", "--no-peers")
    assert ran.code == 0, ran.err
    assert (asked["names"], asked["threads"], asked["quick"], asked["peers"]) == (["scan"], 2, True, False)
    assert "1.25" in ran.out
    assert "peer is not installed" in ran.out
