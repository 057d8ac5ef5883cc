"""statescan's models in lm-eval: `import statescan.integrations.lm_eval` registers the model "statescan".

lm-eval's own command up to 0.4.13 finds no plugins, and so not the model; later ones shall find it by this package's
entry point. ``python -m statescan.integrations.lm_eval`` is the command with the model registered::

    python -m statescan.integrations.lm_eval --model statescan --model_args pretrained=FOLDER --tasks lambada_openai
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from statescan.data.tokenizer import encode_texts, prefix_token
from statescan.errors import ConfigError, MissingExtraError
from statescan.evaluate import StateReader, TaskResult, encode_pairs
from statescan.evaluate.continuations import Request
from statescan.evaluate.tasks import Metric, named_tasks
from statescan.generate import Engine, SamplingParams
from statescan.integrations.language_models import JudgedModel, open_judged

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as problem:
    raise MissingExtraError("statescan.integrations.lm_eval", problem.name or "lm_eval", "eval") from None

__all__ = ["JudgedLM", "StatescanLM", "evaluate_online"]

# What generation takes of the harness's arguments: theirs -> ours.
_SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
_ROWS = 16


class JudgedLM(LM):
    """A model of `statescan.integrations.language_models.open_judged` as lm-eval's: likelihoods.

    Args:
        judged: the model.
    """

    def __init__(self, judged: JudgedModel) -> None:
        super().__init__()
        self.judged = judged
        self._device = getattr(judged.reader, "device", None)

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text, as context where there is none."""
        token = prefix_token(self.judged.tokenizer)
        if token is None:
            raise ConfigError(
                "lm_eval: the task has texts without context, and the tokenizer has no token that begins a text; name "
                "another tokenizer"
            )
        return token

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        return str(getattr(self.judged.tokenizer, "fingerprint", self.judged.name))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it."""
        pairs = [request.args for request in requests]
        asked = encode_pairs(self.judged.tokenizer, pairs, prefix_token(self.judged.tokenizer))
        with _bar("likelihoods", disable_tqdm) as report:
            answers = [(score.logprob, score.greedy) for score in self.judged.reader.score(asked, progress=report)]
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's `max_length` that don't overlap in what they judge;
        where it is None a text is one window, however long."""
        texts = [request.args[0] for request in requests]
        limit = getattr(self.judged.reader, "max_length", None)
        asked, owners = [], []
        for owner, ids in enumerate(encode_texts(self.judged.tokenizer, texts, self.prefix_token_id)):
            windows = get_rolling_token_windows(
                token_list=ids.tolist(),
                prefix_token=self.prefix_token_id,
                max_seq_len=limit or max(len(ids), 1),
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                asked.append(Request(context, continuation))
                owners.append(owner)
        totals = [0.0] * len(texts)
        with _bar("rolling likelihoods", disable_tqdm) as report:
            for owner, score in zip(owners, self.judged.reader.score(asked, progress=report), strict=True):
                totals[owner] += score.logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Not here: `StatescanLM` writes."""
        raise ConfigError(
            f"lm_eval: {self.judged.name} runs on {self.judged.runs_on} and is judged by likelihoods alone here; for "
            "generation take --model statescan, or --model hf"
        )


@register_model("statescan")
class StatescanLM(JudgedLM):
    """A statescan model in lm-eval (``--model statescan``).

    Requests are packed by length, and a beginning that several have in common is read once.

    Args:
        pretrained: a folder, a file of weights or "owner/name" on the hub, in any layout; see
            `statescan.models.CausalLM.from_pretrained`.
        device: Default: "cuda" where there is one.
        dtype: "float32", "bfloat16" or "float16". Default "float32".
        tokenizer: "bytes", a `tokenizers` JSON file or its folder. Default: the model's own.
        revision, offline: of a hub id.
        max_length: an input's last so many tokens are read. Default 2048; "none": all.
        batch_tokens: tokens read at once. Default 4096; on a GPU 32768, with more than 40 GB 65536.
        batch_size: rows that write together. lm-eval's default, 1, and "auto" mean 16: likelihoods are batched by
            `batch_tokens`, and a row that writes gives the same text in any batch.
        max_batch_size: the most rows that write together. Default: none set.
        max_gen_toks: tokens written where a task does not say. Default 256.
        share: read shared beginnings once. Default True.

    Raises:
        ConfigError, CheckpointError, DataError: as `open_judged` raises.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "float32",
        tokenizer: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        max_length: int | str | None = 2048,
        batch_tokens: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        share: bool = True,
    ) -> None:
        limit = None if isinstance(max_length, str) and max_length.lower() == "none" else max_length
        if isinstance(limit, str):
            raise ConfigError(f"lm_eval: max_length must be a number or 'none', got {limit!r}")
        super().__init__(
            open_judged(
                pretrained,
                device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                dtype=dtype,
                tokenizer=tokenizer,
                runs_on="statescan",
                revision=revision,
                offline=offline,
                max_length=limit,
                batch_tokens=batch_tokens,
                share=share,
            )
        )
        rows = str(batch_size)
        if rows.partition(":")[0] != "auto" and not (rows.isdigit() and int(rows) >= 1):
            raise ConfigError(f"lm_eval: batch_size must be 'auto' or a number of rows, got {batch_size!r}")
        self.batch_size = int(rows) if rows.isdigit() and int(rows) > 1 else _ROWS
        if max_batch_size is not None:
            self.batch_size = min(self.batch_size, int(max_batch_size))
        self.max_gen_toks = max_gen_toks
        self._dtype = dtype
        self._engine: Engine | None = None

    @property
    def max_length(self) -> int | None:
        """Tokens of an input that are read, None for all."""
        assert isinstance(self.judged.reader, StateReader)
        return self.judged.reader.max_length

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Writes on from each context until a stop string, the end-of-text token or the most tokens.

        Greedy unless a task samples; the same greedy request is answered once.
        """
        if self._engine is None:
            assert isinstance(self.judged.reader, StateReader)
            self._engine = Engine(
                self.judged.reader.model, self.judged.tokenizer, self._dtype, max_batch=self.batch_size
            )
        end = self.judged.tokenizer.end_of_text
        end_text = None if end is None else self.judged.tokenizer.decode([end])
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        stops: list[list[str]] = []
        answered: dict[Any, int] = {}
        places = []
        for number, request in enumerate(requests):
            context, arguments = request.args
            until, own = self._params(arguments, end, end_text, number)
            key = (context, own) if own.greedy else number
            if key not in answered:
                answered[key] = len(prompts)
                prompts.append(self._prompt(context, own.max_new_tokens))
                params.append(own)
                stops.append(until)
            places.append(answered[key])
        # Rows of one length begin together.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        texts = [""] * len(prompts)
        with _bar("texts", disable_tqdm) as report:
            written = 0
            for piece in self._engine.stream([prompts[i] for i in order], [params[i] for i in order]):
                if piece.generation is not None:
                    index = order[piece.row]
                    # Whatever order stop strings end in, the text stops before the first of them.
                    texts[index] = postprocess_generated_text(piece.generation.text, stops[index], None)
                    written += 1
                    report(written, len(prompts))
        answers = [texts[place] for place in places]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        tokenizer = self.judged.tokenizer
        ids = encode_texts(tokenizer, [context], prefix_token(tokenizer))[0].tolist() or [self.prefix_token_id]
        if self.max_length is not None:
            room = self.max_length - new_tokens
            if room < 1:
                raise ConfigError(
                    f"lm_eval: max_gen_toks must be below max_length = {self.max_length}, got {new_tokens}; raise "
                    "max_length"
                )
            ids = ids[-room:]
        return ids

    def _params(
        self, arguments: Mapping[str, Any], end: int | None, end_text: str | None, number: int
    ) -> tuple[list[str], SamplingParams]:
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        until = handle_stop_sequences(given.pop("until", None), eos=end_text)
        most = given.pop("max_gen_toks")
        sample = given.pop("do_sample", False)
        ours = {name: kind(given.pop(name)) for name, kind in _SAMPLING.items() if name in given}
        if unknown := sorted(name for name, value in given.items() if value is not None):
            raise ConfigError(
                f"lm_eval: generation takes {', '.join(('until', 'max_gen_toks', 'do_sample', *_SAMPLING))}, got "
                f"{', '.join(unknown)}; leave it out"
            )
        if not sample:
            ours["temperature"] = 0.0
        elif not ours.get("temperature"):
            ours["temperature"] = 1.0
        return until, SamplingParams(
            **ours,
            # Drawn numbers differ from request to request; where none are drawn, equal requests are one.
            stream=number if sample else 0,
            max_new_tokens=most,
            stop=tuple(text for text in until if text and text != end_text),
            stop_token_ids=() if end is None else (end,),
        )


@contextlib.contextmanager
def _bar(what: str, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, as lm-eval's own models show one; yields a function of (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=what, disable=hidden) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def evaluate_online(
    judged: JudgedModel, names: Sequence[str], *, limit: int | None = None, manager: Any = None
) -> list[TaskResult]:
    """Judges a model on tasks whose questions lm-eval fetches from the hub.

    Args:
        judged: the model.
        names: of `statescan.evaluate.TASKS`.
        limit: judge only the first so many questions of a task. Default: all.
        manager: lm-eval's TaskManager, for tasks of one's own. Default: lm-eval's tasks.

    Returns:
        One result a task, as `statescan.evaluate.evaluate_tasks` gives them, with lm-eval's standard errors.

    Raises:
        ConfigError: an unknown name, or lm-eval could not get a task's questions.
    """
    from lm_eval.evaluator import simple_evaluate

    tasks = named_tasks(names)
    try:
        found: Any = simple_evaluate(
            JudgedLM(judged),
            tasks=[task.lm_eval for task in tasks],
            limit=limit,
            bootstrap_iters=1000,
            task_manager=manager,
        )
    except (OSError, ConnectionError, ValueError) as problem:
        reason = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise ConfigError(
            f"evaluate: lm-eval could not get the tasks' questions ({type(problem).__name__}: {reason}); check the "
            "connection, or name a folder of files (--data-dir)"
        ) from problem
    results = []
    for task in tasks:
        parts = [name for name in found["results"] if name.startswith(f"{task.lm_eval}_") and name in found["samples"]]
        own = parts if task.lm_eval not in found["samples"] else [task.lm_eval]
        items = tuple(_item(sample) for name in own for sample in found["samples"][name])
        results.append(
            TaskResult(
                task.name,
                task.metric,
                len(items),
                _metrics(found.get("groups", {}).get(task.lm_eval, found["results"].get(task.lm_eval, {}))),
                {name.removeprefix(f"{task.lm_eval}_"): _metrics(found["results"][name])["acc"] for name in parts},
                items,
            )
        )
    return results


def _metrics(fields: Mapping[str, Any]) -> dict[str, Metric]:
    metrics = {}
    for name in ("acc", "acc_norm", "perplexity"):
        if f"{name},none" in fields:
            error = fields.get(f"{name}_stderr,none")
            metrics[name] = Metric(float(fields[f"{name},none"]), error if isinstance(error, float) else None)
    return metrics


def _item(sample: Mapping[str, Any]) -> dict[str, Any]:
    item: dict[str, Any] = {"logprobs": [float(answer[0]) for answer in sample["filtered_resps"]]}
    return item | {name: bool(sample[name]) for name in ("acc", "acc_norm") if name in sample}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
