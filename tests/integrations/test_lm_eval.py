"""lm-eval on statescan's models, beside its own `hf` model of the same weights, question by question."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from statescan.errors import ConfigError, DataError

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'statescan[eval]'")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from statescan.evaluate import TASKS, evaluate_tasks  # noqa: E402
from statescan.generate import Engine  # noqa: E402
from statescan.integrations.language_models import open_judged  # noqa: E402
from statescan.integrations.lm_eval import JudgedLM, StatescanLM, evaluate_online  # noqa: E402

VOCAB = 300
TEXT = (
    "the whale ship sea captain old white harpoon sailor night wind deck boat sun water man eye hand great little "
    "said saw went came could would upon again never through before after round long dark"
)
WORDS = TEXT.split()


def _sentence(draw: random.Random, length: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(length))


def _byte_level_bpe(*special_tokens: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    draw = random.Random(0)
    texts = [_sentence(draw, 12) for _ in range(300)]
    tokenizer.train_from_iterator(texts, VOCAB, min_frequency=2, special_tokens=list(special_tokens))
    return tokenizer._tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Mamba in transformers' layout, with a byte-level BPE tokenizer of its own."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe("<|endoftext|>"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=0, eos_token_id=0
        )
    )
    with torch.no_grad():
        # Wide enough that the tokens differ, and that greedy decoding says more than one thing.
        model.backbone.embeddings.weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


QUESTIONS = 24


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of every form, as JSON lines."""
    folder = tmp_path_factory.mktemp("questions")
    draw = random.Random(1)
    lines: dict[str, list[dict[str, Any]]] = {"hellaswag": [], "winogrande": [], "lambada_test": [], "blimp": []}
    for number in range(QUESTIONS):
        context = _sentence(draw, draw.randint(5, 20))
        shared = _sentence(draw, 3)
        choices = [f" {_sentence(draw, draw.randint(1, 8))}" for _ in range(2)]
        choices += [f" {shared} {_sentence(draw, draw.randint(1, 4))}" for _ in range(2)]
        lines["hellaswag"].append({"context": context, "choices": choices, "gold": number % 4})
        lines["winogrande"].append(
            {
                "contexts": [f"{context} {name}" for name in ("Ahab", "Starbuck")],
                "continuation": f" {_sentence(draw, 4)}.",
                "gold": number % 2,
            }
        )
        lines["lambada_test"].append({"context": context, "target": f" {draw.choice(WORDS)}"})
        lines["blimp"].append(
            {"task": "ab"[number % 2], "good": _sentence(draw, 6) + ".", "bad": _sentence(draw, 6) + "."}
        )
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


TEMPLATES = {
    "hellaswag": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices | map('trim') | list}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "winogrande": """
output_type: multiple_choice
doc_to_text: gold
doc_to_choice: contexts
doc_to_target: continuation
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "lambada_openai": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    # As lm-eval's own: the default target_delimiter, a space, stands before each sentence.
    "blimp": """
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: [" the", "."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
FILES = {"lambada_openai": "lambada_test", "rolling": "lambada_test", "writing": "lambada_test"}


@pytest.fixture(scope="module")
def manager(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's tasks over the same files."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TEMPLATES.items():
        file = questions / f"{FILES.get(name, name)}.jsonl"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
            f"test_split: test\nnum_fewshot: 0\n{text}",
            encoding="utf-8",
        )
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def _run(model: Any, arguments: dict[str, Any] | None, manager: Any, tasks: list[str], **options: Any) -> Any:
    return simple_evaluate(
        model=model, model_args=arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
    )


def _answers(found: Any, task: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in sorted(found["samples"][task], key=lambda one: one["doc_id"])]


@pytest.fixture(scope="module")
def both(folder: Path, manager: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        tasks = list(TEMPLATES)
        theirs = _run("hf", {"pretrained": str(folder), "dtype": "float32"}, manager, tasks, device="cpu")
        ours = _run("statescan", {"pretrained": str(folder)}, manager, tasks, device="cpu")
    return ours, theirs


@pytest.mark.parametrize("task", ["hellaswag", "winogrande", "lambada_openai", "blimp"])
def test_every_question_scores_as_through_lm_evals_own_model(both: tuple[Any, Any], task: str) -> None:
    ours, theirs = both
    assert len(ours["samples"][task]) == QUESTIONS
    for mine, its in zip(_answers(ours, task), _answers(theirs, task), strict=True):
        for (logprob, greedy), (wanted, wanted_greedy) in zip(mine, its, strict=True):
            assert greedy == wanted_greedy
            assert logprob == pytest.approx(wanted, rel=1e-5)
    for name, value in theirs["results"][task].items():
        if name.endswith(",none") and "perplexity" not in name and "stderr" not in name:
            assert ours["results"][task][name] == value, name


def test_whole_texts_have_the_same_likelihood(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    for mine, its in zip(_answers(ours, "rolling"), _answers(theirs, "rolling"), strict=True):
        assert mine[0] == pytest.approx(its[0], rel=1e-5)


def test_the_same_texts_are_written(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    mine, its = _answers(ours, "writing"), _answers(theirs, "writing")
    assert mine == its
    # The comparison means something: texts differ, some end at a stop string, some at the most tokens.
    assert len({text for (text,) in its}) > 5
    assert len({len(text) for (text,) in its}) > 3


def test_the_same_questions_from_files_score_the_same(both: tuple[Any, Any], folder: Path, questions: Path) -> None:
    ours, _ = both
    judged = open_judged(folder)
    for name in ("hellaswag", "winogrande", "blimp", "lambada"):
        theirs = TASKS[name].lm_eval
        (result,) = evaluate_tasks(judged.reader, judged.tokenizer, [name], questions)
        samples = sorted(ours["samples"][theirs], key=lambda one: one["doc_id"])
        for item, sample in zip(result.items, samples, strict=True):
            assert item["logprobs"] == pytest.approx([answer[0] for answer in sample["filtered_resps"]], rel=1e-5)
            for metric in ("acc", "acc_norm"):
                assert item.get(metric) == (bool(sample[metric]) if metric in sample else None), metric
        assert result.metrics["acc"].value == pytest.approx(ours["results"][theirs]["acc,none"])
    assert result.metrics["perplexity"].value == pytest.approx(ours["results"]["lambada_openai"]["perplexity,none"])


def test_contexts_are_read_once(folder: Path, manager: Any) -> None:
    sharing, reading = (StatescanLM(str(folder), device="cpu", share=share) for share in (True, False))
    results = [_run(model, None, manager, ["hellaswag"]) for model in (sharing, reading)]
    for mine, its in zip(_answers(results[0], "hellaswag"), _answers(results[1], "hellaswag"), strict=True):
        assert [logprob for logprob, _ in mine] == pytest.approx([logprob for logprob, _ in its], rel=1e-5)
    assert sharing.judged.reader.tokens_read < 0.6 * reading.judged.reader.tokens_read


def test_windows_of_whole_texts(folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    text = _sentence(random.Random(2), 60)
    ask = [Instance("loglikelihood_rolling", {}, (given,), 0) for given in (text, "the", "")]
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=16)
    mine = StatescanLM(str(folder), device="cpu", max_length=16)
    assert mine.loglikelihood_rolling(ask, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(ask, disable_tqdm=True), rel=1e-5
    )
    whole = StatescanLM(str(folder), device="cpu", max_length="none", batch_tokens=7)
    long = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=4096)
    assert whole.loglikelihood_rolling(ask, disable_tqdm=True) == pytest.approx(
        long.loglikelihood_rolling(ask, disable_tqdm=True), rel=1e-5
    )


def test_texts_are_cut_into_tokens_as_the_harness_cuts_them(folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=12)
    mine = StatescanLM(str(folder), device="cpu", max_length=12)
    pairs = [
        ("the whale ", "ship"),  # the space goes to the continuation
        ("the whale", " ship"),
        ("the wha", "le ship"),  # cut inside a token
        ("", "the whale"),
        ("", "<|endoftext|>the whale"),
        (_sentence(random.Random(3), 40), " sea captain"),  # longer than what is read
    ]
    ask = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    # One by one: among requests of the same tokens that are cut at different places the harness takes the wrong logits.
    its = [theirs.loglikelihood([one], disable_tqdm=True)[0] for one in ask]
    for (logprob, greedy), (wanted, wanted_greedy) in zip(mine.loglikelihood(ask, True), its, strict=True):
        assert logprob == pytest.approx(wanted, rel=1e-5)
        assert greedy == wanted_greedy


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama whose tokenizer puts <s> in front of a text, and ends one with </s>."""
    folder = tmp_path_factory.mktemp("begun") / "model"
    inner = _byte_level_bpe("<unk>", "<s>", "</s>")
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def test_a_tokenizer_that_begins_every_text_is_used_as_the_harness_uses_it(begun: Path, questions: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(begun), device="cpu", dtype="float32")
    mine = StatescanLM(str(begun), device="cpu")
    other = JudgedLM(open_judged(begun, runs_on="transformers"))
    assert (mine.judged.runs_on, other.judged.runs_on) == ("statescan", "transformers")
    assert mine.prefix_token_id == other.prefix_token_id == theirs.prefix_token_id == 1
    pairs = [
        ("the whale", " ship"),
        ("the whale ", "ship"),
        ("the whale", "s"),
        (" ", "the whale"),
        ("", " the whale"),
        # Of a text that holds it already there is no second one.
        ("<s>the whale", " ship"),
        ("", "<s>the whale"),
        ("</s>the whale", " ship"),
    ]
    ask = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    its = [theirs.loglikelihood([one], disable_tqdm=True)[0] for one in ask]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("the whale ship", "<s>the whale", "")]
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    for model in (mine, other):
        for pair, (logprob, greedy), (wanted, wanted_greedy) in zip(
            pairs, model.loglikelihood(ask, True), its, strict=True
        ):
            assert logprob == pytest.approx(wanted, rel=1e-5), pair
            assert greedy == wanted_greedy
        assert model.loglikelihood_rolling(texts, True) == pytest.approx(rolling, rel=1e-5)
    write = [
        Instance("generate_until", {}, (text, {"until": ["."], "max_gen_toks": 10}), 0)
        for text in ("the whale", "<s>the whale", "sea captain old")
    ]
    # The harness shows a last character that is not whole as U+FFFD, this package leaves it out.
    wanted_texts = [theirs.generate_until([one], True)[0].rstrip("\ufffd") for one in write]
    assert [text.rstrip("\ufffd") for text in mine.generate_until(write, True)] == wanted_texts


def test_sampling_and_repeated_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StatescanLM(str(folder), device="cpu")
    written: list[int] = []
    stream = Engine.stream
    monkeypatch.setattr(
        Engine, "stream", lambda self, prompts, *rest: written.append(len(prompts)) or stream(self, prompts, *rest)
    )
    greedy = {"until": [], "max_gen_toks": 8}
    sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 20.0, "top_p": 0.95}
    # Without do_sample a temperature says nothing.
    still = {**sampled, "do_sample": False}
    ask = [Instance("generate_until", {}, ("the whale", kind), 0) for kind in (greedy, sampled, sampled, greedy)]
    first, one, other, again = model.generate_until(ask, disable_tqdm=True)
    assert model.generate_until([Instance("generate_until", {}, ("the whale", still), 0)], True) == [first]
    assert first == again
    assert one != other
    # The greedy request was answered once; what is drawn, twice.
    assert written == [3, 1]
    assert model.generate_until(ask, disable_tqdm=True) == [first, one, other, again]
    with pytest.raises(ConfigError, match=r"generation takes until, .*got num_beams"):
        model.generate_until([Instance("generate_until", {}, ("the", {"num_beams": 4}), 0)], disable_tqdm=True)
    with pytest.raises(ConfigError, match="max_gen_toks must be below max_length = 2048"):
        model.generate_until([Instance("generate_until", {}, ("the", {"max_gen_toks": 2048}), 0)], disable_tqdm=True)


def test_a_model_of_transformers_is_judged_too(folder: Path, manager: Any, both: tuple[Any, Any]) -> None:
    judged = open_judged(folder, runs_on="transformers")
    assert judged.runs_on == "transformers"
    found = _run(JudgedLM(judged), None, manager, ["hellaswag"])
    for mine, its in zip(_answers(found, "hellaswag"), _answers(both[1], "hellaswag"), strict=True):
        assert [logprob for logprob, _ in mine] == pytest.approx([logprob for logprob, _ in its], rel=1e-5)
    with pytest.raises(ConfigError, match="judged by likelihoods alone"):
        JudgedLM(judged).generate_until([])


def test_tasks_that_the_harness_fetches_are_told_alike(folder: Path, manager: Any, questions: Path) -> None:
    judged = open_judged(folder)
    online = evaluate_online(judged, ["hellaswag", "lambada"], manager=manager)
    local = evaluate_tasks(judged.reader, judged.tokenizer, ["hellaswag", "lambada"], questions)
    for mine, its in zip(online, local, strict=True):
        assert mine.metrics["acc"].value == its.metrics["acc"].value
        assert mine.metrics["acc"].standard_error == pytest.approx(its.metrics["acc"].standard_error)
        assert (mine.task, mine.metric, mine.questions) == (its.task, its.metric, its.questions)
        assert [item["acc"] for item in mine.items] == [item["acc"] for item in its.items]


def test_arguments_out_of_range(folder: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size must be 'auto' or a number of rows, got 'many'"):
        StatescanLM(str(folder), device="cpu", batch_size="many")
    with pytest.raises(ConfigError, match="max_length must be a number or 'none', got 'long'"):
        StatescanLM(str(folder), device="cpu", max_length="long")
    model = StatescanLM(str(folder), device="cpu", batch_size="auto", max_batch_size=3)
    assert model.batch_size == 3
    with pytest.raises(DataError, match="a continuation must hold a token of its own"):
        model.loglikelihood([Instance("loglikelihood", {}, ("the", ""), 0)], disable_tqdm=True)


@pytest.mark.slow
def test_the_command_of_the_harness_with_the_model_registered(folder: Path, manager: Any, tmp_path: Path) -> None:
    include = Path(next(iter(manager.task_index.values())).yaml_path).parent
    arguments = f"--model statescan --device cpu --model_args pretrained={folder},dtype=float32 --tasks hellaswag"
    command = [sys.executable, "-m", "statescan.integrations.lm_eval", *arguments.split()]
    done = subprocess.run(
        [*command, "--include_path", str(include), "--output_path", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hellaswag" in done.stdout
    assert "acc_norm" in done.stdout


def test_the_entry_point_names_the_model_that_is_registered() -> None:
    from importlib.metadata import EntryPoint

    from lm_eval.api.model import LM
    from lm_eval.api.registry import Registry, get_model

    import statescan

    project = Path(statescan.__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"]["lm_eval.models"]
    # As lm-eval after 0.4.13 finds it, in a registry where nobody has imported the module.
    fresh: Any = Registry("model", base_cls=LM)
    for name, value in declared.items():
        fresh.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert fresh.get("statescan") is StatescanLM is get_model("statescan")
