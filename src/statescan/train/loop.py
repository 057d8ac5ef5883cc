"""The training loop: one device or many, replicated or sharded, interrupted and resumed to the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from statescan import __version__
from statescan.data import (
    DnaTokenizer,
    Genome,
    GenomeSampler,
    LaneSampler,
    MixedLengthSampler,
    PackedSampler,
    TokenFile,
    Tokenizer,
    WindowSampler,
    build_token_file,
    find_sources,
    load_tokenizer,
    read_bed,
    split_regions,
)
from statescan.data.aligned import holds_blocks, read_blocks
from statescan.data.dna import check_apart, outside, refuse_repeats, without_gaps
from statescan.errors import CheckpointError, ConfigError, DataError, MissingExtraError, TrainingError
from statescan.evaluate import evaluate_tokens
from statescan.files import is_leftover, make_folder, write_json
from statescan.models import CausalLM, ModelConfig
from statescan.train.adapters import add_adapters, merged_weights, save_adapters
from statescan.train.capture import CapturedStep
from statescan.train.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
)
from statescan.train.config import DataConfig, RunConfig, TrainConfig
from statescan.train.initial_state import InitialState
from statescan.train.logs import CsvLog, Progress, TensorBoardLog, draw_curve, read_csv
from statescan.train.optim import GuardedAdamW, learning_rate
from statescan.train.utilization import utilization

__all__ = ["Callback", "TrainResult", "load_run", "train"]

RUN_FILE = "run.json"
_LOG_COLUMNS = ("step", "epoch", "tokens", "loss", "learning_rate", "gradient_norm", "skipped")
_EVALUATION_COLUMNS = ("step", "tokens", "bits_per_byte")
# What a resumed run must share with the one it goes on from: the rest may change, and is named when it does.
_FIXED = ("seed", "batch_size", "length", "first_length", "stage_steps", "shortest_length", "initial_state", "lora")


@dataclass(frozen=True)
class TrainResult:
    """What came out of `train`.

    Args:
        out: the run's folder: config.json, model.safetensors and the tokenizer of the last model, ``best/`` with those
            of the best one, run.json, log.csv, evaluations.csv, loss.png, tensorboard/, checkpoints/.
        steps: updates done, those before a resume too.
        train_loss: mean loss in nats per token over the last row of log.csv; NaN where there is none.
        evaluations: (step, held-out bits per byte), in order.
        tokens_per_second: of all devices together, in this call, without evaluations and checkpoints.
        interrupted: a signal ended it early.
        resume_command: what goes on from here, where it was interrupted.
        first_process: this process is the one that reports; every process of a distributed run gets a result.
        utilization: model FLOP utilisation, the part of the devices' peak that went into the model's own operations;
            None where the peak isn't known.
        signalled: a signal came. With the last update, or after it, the run is finished all the same: who has more to
            do stops here.
    """

    out: Path
    steps: int
    train_loss: float
    evaluations: list[tuple[int, float]]
    tokens_per_second: float
    interrupted: bool
    resume_command: str = ""
    first_process: bool = True
    utilization: float | None = None
    signalled: bool = False


class Callback:
    """Hooks for code that watches a run; override what you need. Called on the first process alone."""

    def on_log(self, row: dict[str, float]) -> None:
        """A row went into log.csv."""

    def on_evaluation(self, step: int, bits_per_byte: float) -> None:
        """The held-out text was judged."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is on the disk."""


@dataclass
class Corpus:
    """The ids of a run: for training, and held out."""

    tokenizer: Tokenizer
    file: TokenFile
    train: NDArray[Any]
    documents: NDArray[np.int64]
    valid: NDArray[Any]
    facts: dict[str, Any]
    # Of a genome: what of `train` may be read, (spans, 2), where the stretches of `valid` begin, and what they are of
    # the genome that they come from, (stretches, 2).
    spans: NDArray[np.int64] | None = None
    valid_documents: NDArray[np.int64] | None = None
    valid_spans: NDArray[np.int64] | None = None


def load_run(out: str | os.PathLike[str]) -> RunConfig:
    """The configuration of the run in a folder, from its run.json.

    Raises:
        CheckpointError: no run stands there.
    """
    path = Path(out) / RUN_FILE
    if not path.exists():
        raise CheckpointError(
            f"train: wanted a run in '{out}', got no {RUN_FILE} there; name a folder that train wrote"
        )
    return RunConfig.from_json(path)


def train(
    run: RunConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a model as `run` says, and leave all of it in the folder `out`.

    Interrupted by SIGINT or SIGTERM the run finishes its update, writes a checkpoint and the model, and returns; killed
    at any moment it loses what came since the last checkpoint. A resumed run goes on to the same bits as one that was
    never interrupted, on the same number of devices: weights, moments, random states, order of the data, log.csv.

    Args:
        run: model, data and schedule.
        out: the run's folder; made where it is missing. Several nodes must share it.
        resume: go on with the run in `out` (from its start where it has no checkpoint yet).
        progress: a line of progress on standard error, where that is a terminal.
        callbacks: told of rows, evaluations and checkpoints.

    Returns:
        The `TrainResult`.

    Raises:
        MissingExtraError: lightning-fabric is not installed.
        ConfigError: settings that don't go together, or `out` holds anything and `resume` is False.
        CheckpointError: nothing to resume, a damaged checkpoint, one of another model or data, or a full disk.
        DataError: the corpus can't be read, is empty, or is shorter than a window.
        TrainingError: `max_nonfinite` gradients in a row were not finite.
    """
    out = Path(out)
    config = run.train
    first_here = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0
    corpus = None
    if first_here:
        # Before any process is launched: what is wrong with the settings, the folder or the texts shows at once, and
        # the other processes find the token files built.
        previous = check_folder(out, resume)
        corpus = _read_corpus(run)
        _check_resumable(run, corpus, previous)
    if config.threads:
        torch.set_num_threads(config.threads)
    fabric = _fabric(config)
    if first_here:
        make_folder(out)
    fabric.launch()
    fabric.barrier()
    if corpus is None:
        corpus = _read_corpus(run)
    with Interruption(fabric.world_size) as interruption:
        result = _Trainer(run, out, corpus, fabric, resume, progress, callbacks, interruption).run()
    return dataclasses.replace(result, signalled=interruption.wished())


def check_folder(out: Path, resume: bool) -> dict[str, Any] | None:
    """The run.json that stands in the folder; refuses what would harm it."""
    path = out / RUN_FILE
    if path.exists():
        if not resume:
            raise ConfigError(
                f"train: wanted a folder without a run, got '{out}', which holds one; go on with it by --resume "
                "(resume=True), or name another folder"
            )
        try:
            previous = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise CheckpointError(f"resume: '{path}' can't be read ({problem})") from None
        if not isinstance(previous, dict) or not {"config", "data", "status"} <= previous.keys():
            raise CheckpointError(f"resume: wanted a run in '{out}', got a {RUN_FILE} there that train did not write")
        return previous
    if resume:
        raise CheckpointError(
            f"resume: wanted a run in '{out}', got no {RUN_FILE} there; leave --resume out to start one"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"train: wanted a folder, got the file '{out}'; name another path")
    # Whatever it is, it isn't this run's: log.csv, loss.png and the like would be written over.
    foreign = sorted(entry.name for entry in out.iterdir() if not is_leftover(entry.name)) if out.exists() else []
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ConfigError(
            f"train: wanted a new or empty folder, got '{out}', which holds {foreign[0]}{others}; name another one"
        )
    return None


def read_genome(run: RunConfig) -> Corpus:
    """The bases of a run, and which of them are trained on and held out."""
    data, config = run.data, run.train
    if data.packing or config.initial_state == "carry":
        name = "data.packing=false" if data.packing else "train.initial_state=zero or noise"
        raise ConfigError(f"train: wanted {name} with data.modality=dna, whose windows lie within records")
    if config.first_length and config.initial_state != "zero":
        raise ConfigError("train: wanted train.first_length=0 with train.initial_state=noise; leave one of them out")
    if config.shortest_length:
        raise ConfigError(
            "train: wanted train.shortest_length=0 with data.modality=dna; train.first_length warms the length up"
        )
    tokenizer = DnaTokenizer(data.soft_masked, data.gaps)
    genome = Genome(data.paths, tokenizer, cache=data.cache)
    held_out = genome
    facts = {"digest": genome.file.digest, "tokens": len(genome.tokens), "bytes_per_token": genome.file.bytes_per_token}
    if data.aligned or holds_blocks(data.paths):
        if data.regions or data.valid_regions or data.valid_paths:
            named = next(name for name in ("regions", "valid_regions", "valid_paths") if getattr(data, name))
            raise ConfigError(
                f"train: wanted no data.{named} with aligned species, whose blocks part them, got one; leave it out"
            )
        blocks = read_blocks(data.paths, tokenizer, cache=data.cache)
        spans, valid = (without_gaps(genome.tokens, blocks.spans(part)) for part in ("train", "valid"))
        # By which `reproduce great-apes` knows that its test was not read.
        facts["aligned"] = blocks.facts()
    else:
        spans, valid, held_out = _parted(run, genome, tokenizer)
    if data.valid_paths:
        facts["valid_digest"] = held_out.file.digest
    for part, what in ((spans, "to train on"), (valid, "to judge on")):
        if not len(part) and (part is spans or data.valid_paths or data.valid_regions):
            lower = ", as lower case is with data.soft_masked=n" if data.soft_masked == "n" else ""
            raise DataError(
                f"dna: wanted known bases {what}, got runs of unknown ones alone{lower}; name other regions"
            )
    # Before any process is launched: it says where the records are too short.
    _genome_sampler(run, genome.tokens, spans)
    parts = [held_out.tokens[start:end] for start, end in valid.tolist()]
    facts |= {
        "train_tokens": int((spans[:, 1] - spans[:, 0]).sum()),
        "valid_tokens": sum(map(len, parts)),
        "tokenizer": tokenizer.name,
        "records": len(genome),
    }
    return Corpus(
        tokenizer,
        genome.file,
        genome.tokens,
        genome.offsets,
        np.concatenate([*parts, np.empty(0, np.uint8)]),
        facts,
        spans,
        np.cumsum([0, *map(len, parts)]),
        valid,
    )


def _parted(
    run: RunConfig, genome: Genome, tokenizer: DnaTokenizer
) -> tuple[NDArray[np.int64], NDArray[np.int64], Genome]:
    """What of a genome is trained on, what is held out, and of which genome that is."""
    data, config = run.data, run.train
    # Gaps go before anything is held out: a part of one would be read as bases, or be all that is judged.
    spans = without_gaps(genome.tokens, genome.spans(read_bed(data.regions) if data.regions else None))
    if data.valid_paths:
        held_out = Genome(data.valid_paths, tokenizer, cache=data.cache)
        _refuse_shared(data, genome.file, held_out.file)
        refuse_repeats([genome, held_out], within=False)
        valid = held_out.spans(read_bed(data.valid_regions) if data.valid_regions else None)
        return spans, without_gaps(held_out.tokens, valid), held_out
    if data.valid_regions:
        refuse_repeats([genome])
        valid = without_gaps(genome.tokens, genome.spans(read_bed(data.valid_regions)))
        spans = spans if data.regions else outside(spans, valid)
        check_apart(spans, valid)
        return spans, valid, genome
    if data.valid_fraction:
        refuse_repeats([genome])
        # Blocks of two windows at least, unless the genome is too short to be parted so.
        total = int((spans[:, 1] - spans[:, 0]).sum())
        block = data.valid_block or max(2 * config.length, 1 << 16)
        block = max(1, min(block, int(total * data.valid_fraction)))
        spans, valid = split_regions(spans, [1 - data.valid_fraction], block=block)
        return spans, valid, genome
    return spans, np.empty((0, 2), np.int64), genome


def _refuse_shared(data: DataConfig, file: TokenFile, held_out: TokenFile) -> None:
    """Refuses files that are trained on and held out, by their paths and by what is in them.

    Raises:
        DataError: one is both.
    """
    read = {os.path.realpath(source.path) for source in find_sources(data.paths)}
    shared = [source.label for source in find_sources(data.valid_paths) if os.path.realpath(source.path) in read]
    if shared or file.digest == held_out.digest:
        got = f"'{shared[0]}' in both" if shared else "the same content in both"
        raise DataError(
            f"train: wanted held-out data that is not trained on, got {got}; name other files with --valid "
            "(data.valid_paths), or leave it out to hold a part back"
        )


def _genome_sampler(
    run: RunConfig, tokens: NDArray[np.uint8], spans: NDArray[np.int64], rank: int = 0, world: int = 1
) -> GenomeSampler:
    config = run.train
    return GenomeSampler(
        tokens,
        spans,
        config.length,
        config.seed,
        both_strands=run.data.both_strands,
        first_length=config.first_length,
        stage_steps=config.stage_steps,
        rank=rank,
        world=world,
    )


def _read_corpus(run: RunConfig) -> Corpus:
    if run.data.modality == "dna":
        return read_genome(run)
    data, length = run.data, run.train.length
    if run.train.first_length:
        raise ConfigError("train: wanted train.first_length=0 but for data.modality=dna; leave it out")
    tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"train: wanted model.vocab_size of at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {run.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size}"
        )

    def build(paths: tuple[str, ...]) -> TokenFile:
        return build_token_file(paths, tokenizer, field=data.field, invalid_utf8=data.invalid_utf8, cache=data.cache)

    file = build(data.paths)
    facts = {"digest": file.digest, "tokens": len(file), "bytes_per_token": file.bytes_per_token}
    if data.valid_paths:
        held_out = build(data.valid_paths)
        _refuse_shared(data, file, held_out)
        train_ids, valid_ids = file.tokens, held_out.tokens
        facts["valid_digest"] = held_out.digest
    else:
        train_ids, valid_ids = file.split(data.valid_fraction)
    # The cut between training and held-out ids may go through a document.
    offsets = np.asarray(file.document_offsets)
    documents = np.append(offsets[offsets < len(train_ids)], len(train_ids))
    if run.train.initial_state != "zero" and data.packing:
        raise ConfigError(
            f"train: wanted data.packing=false with train.initial_state={run.train.initial_state}, got true; a packed "
            "window starts in the middle of documents of its own"
        )
    if run.train.shortest_length and data.packing:
        raise ConfigError(
            "train: wanted data.packing=false with train.shortest_length, got true; packed documents have lengths of "
            "their own"
        )
    # Before any process is launched: they say where the text is too short.
    if data.packing:
        PackedSampler(train_ids, documents, length, run.train.seed)
    elif run.train.initial_state == "carry":
        LaneSampler(train_ids, length, run.train.batch_size, run.train.seed)
    elif run.train.shortest_length:
        MixedLengthSampler(train_ids, length, run.train.shortest_length, run.train.batch_size, run.train.seed)
    elif len(train_ids) < length + 1:
        raise DataError(
            f"train: wanted a training text of at least train.length + 1 = {length + 1} ids, got {len(train_ids)}; "
            "take a longer text or a smaller train.length"
        )
    facts |= {"train_tokens": len(train_ids), "valid_tokens": len(valid_ids), "tokenizer": tokenizer.name}
    return Corpus(tokenizer, file, train_ids, documents, valid_ids, facts)


def _check_resumable(run: RunConfig, corpus: Corpus, previous: dict[str, Any] | None) -> None:
    """A run may go on with another schedule or on other devices, not with another model, data or order of the data."""
    if previous is None:
        return
    before, now = RunConfig.from_dict(previous["config"]), run
    _want_same("a model of", type(before.model).__name__, type(now.model).__name__)
    for entry in dataclasses.fields(now.model):
        if entry.name != "recompute":
            _want_same(f"model.{entry.name}", getattr(before.model, entry.name), getattr(now.model, entry.name))
    _want_same("data.packing", before.data.packing, now.data.packing)
    for name in _FIXED:
        _want_same(f"train.{name}", getattr(before.train, name), getattr(now.train, name))
    for name in ("digest", "valid_digest", "train_tokens"):
        if previous["data"].get(name) != corpus.facts.get(name):
            raise CheckpointError(
                f"resume: wanted the texts, tokenizer and held-out part that the run began with, got others ({name} "
                "differs); name the same data, or start a new run in another folder"
            )


def _want_same(name: str, before: Any, now: Any) -> None:
    if before != now:
        raise CheckpointError(
            f"resume: wanted {name} = {before}, with which the run began, got {now}; leave it as it was, or start a "
            "new run in another folder"
        )


def _fabric(config: TrainConfig) -> Any:
    """A Fabric for the devices, the strategy and the precision of `config`."""
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
    except ImportError:
        raise MissingExtraError("training", "lightning_fabric", "train") from None
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    devices = config.devices
    if devices == "auto":
        devices = max(1, torch.cuda.device_count()) if config.accelerator in ("auto", "cuda") else 1
    processes = devices * config.num_nodes
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"train: wanted train.batch_size to be a multiple of devices x accumulate = {parts}, "
            f"got {config.batch_size}; set train.batch_size={parts}"
        )
    strategy: Any = config.strategy
    if strategy == "auto":
        strategy = "ddp" if processes > 1 else "auto"
    elif strategy == "fsdp":
        strategy = ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)
    try:
        return Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        )
    except (ValueError, RuntimeError, TypeError) as problem:
        raise ConfigError(f"train: these devices can't be used: {' '.join(str(problem).split())}") from problem


def _shard(model: Any, mesh: Any) -> nn.Module:
    """FSDP2: every block is a unit that is gathered when it runs; the embedding, last norm and head are one more."""
    from torch.distributed.fsdp import fully_shard

    # A block's output is a view, and nothing adds to it in place: the next op makes a new residual.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    # Its parameters are new ones; what the optimiser must know of S4's stays with their names.
    for name, parameter in model.named_parameters():
        for mark, value in marks[name].items():
            setattr(parameter, mark, value)
    return model


def _reshard(model: nn.Module) -> None:
    """Give the gathered parameters back: after a forward pass without a backward one, FSDP2 keeps the outermost."""
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def _initial_weights(folder: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights that a run starts with."""
    model = CausalLM.from_pretrained(folder)
    for entry in dataclasses.fields(config):
        found = getattr(model.config, entry.name, "no such field")
        if entry.name not in ("recompute", "dropout", "embedding_dropout") and found != getattr(config, entry.name):
            raise ConfigError(
                f"train: train.weights wanted a model with {entry.name} = {getattr(config, entry.name)}, as model.* "
                f"says, got '{folder}' with {found}; leave model.* as that model has it"
            )
    return model.state_dict()


class Interruption:
    """SIGINT and SIGTERM as a wish to stop, which all processes learn of at the same update.

    Ask once more after the `with`, where signals do again what they did before: a wish that came too late to end
    anything early is one to do nothing else.
    """

    def __init__(self, world_size: int = 1) -> None:
        self._wished = False
        self._before: dict[int, Any] = {}
        self._group = None
        if world_size > 1:
            # By way of the CPUs, so that asking never waits for the devices.
            self._group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._wish)
        return self

    def _wish(self, number: int, frame: Any) -> None:
        self._wished = True
        # A second signal of the kind does what it did before: there is a way out of an update that hangs.
        signal.signal(number, self._before[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wished(self) -> bool:
        """Whether any process was asked to stop; all of them must ask together."""
        if self._group is None:
            return self._wished
        flag = torch.tensor(int(self._wished))
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)


@dataclass
class _Clock:
    """Time spent on updates, without evaluations and checkpoints."""

    spent: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        return self.spent + time.perf_counter() - self.started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.spent = self.now()
        try:
            yield
        finally:
            self.started = time.perf_counter()


class _Trainer:
    """One call of `train` after its processes are launched."""

    def __init__(
        self,
        run: RunConfig,
        out: Path,
        corpus: Corpus,
        fabric: Any,
        resume: bool,
        progress: bool,
        callbacks: Sequence[Callback],
        interruption: Interruption,
    ) -> None:
        self.run_config = run
        self.config = run.train
        self.out = out
        self.corpus = corpus
        self.fabric = fabric
        self.interruption = interruption
        self.first = fabric.global_rank == 0
        self.callbacks = list(callbacks) if self.first else []
        self.model_config: ModelConfig = run.model
        if self.config.recompute is not None:
            self.model_config = dataclasses.replace(run.model, recompute=self.config.recompute)

        fabric.seed_everything(self.config.seed % 2**32, verbose=False)
        # Every process draws the same initial weights, so that sharding or replicating starts from the same model.
        self.raw = CausalLM(self.model_config)
        checkpoint = self._agreed_checkpoint() if resume else None
        if self.config.weights and checkpoint is None:
            self.raw.load_state_dict(_initial_weights(self.config.weights, self.model_config))
        if self.config.lora:
            add_adapters(self.raw, self.config.lora)
        self.raw.train()
        compiled = torch.compile(self.raw) if self.config.compile else self.raw
        self.model = fabric.setup_module(compiled)
        self.guarded = GuardedAdamW(self.raw, self.config)
        order: dict[str, int] = {
            "length": self.config.length,
            "seed": self.config.seed,
            "rank": fabric.global_rank,
            "world": fabric.world_size,
        }
        self.sampler: WindowSampler | MixedLengthSampler | PackedSampler | LaneSampler | GenomeSampler
        if corpus.spans is not None:
            self.sampler = _genome_sampler(run, corpus.train, corpus.spans, order["rank"], order["world"])
        elif run.data.packing:
            self.sampler = PackedSampler(corpus.train, corpus.documents, **order)
        elif self.config.initial_state == "carry":
            self.sampler = LaneSampler(corpus.train, rows=self.config.batch_size, **order)
        elif self.config.shortest_length:
            self.sampler = MixedLengthSampler(
                corpus.train, shortest=self.config.shortest_length, rows=self.config.batch_size, **order
            )
        else:
            self.sampler = WindowSampler(corpus.train, **order)
        self.device = fabric.device
        self.initial: InitialState | None = None
        if self.config.initial_state != "zero":
            rows = self.config.batch_size // fabric.world_size
            self.initial = InitialState(self.raw, rows, self.config.initial_state, self.config.from_zero)
        self.done = 0
        self.loss_sum = torch.zeros((), device=self.device)
        self.in_window = 0
        self.norm = torch.zeros((), device=self.device)
        self.train_loss = math.nan
        self.evaluations: list[tuple[int, float]] = []
        self.saved_at = -1
        # Each process goes its own way from here: what it draws must not be what its neighbour draws.
        torch.manual_seed(self.config.seed + fabric.global_rank)

        if checkpoint is not None:
            if checkpoint.step > self.config.steps:
                raise ConfigError(
                    f"resume: wanted train.steps of at least {checkpoint.step}, which are done in '{out}', got "
                    f"{self.config.steps}; raise train.steps to go on"
                )
            self._restore(checkpoint)
        self.captures = self._captures()
        self.captured: dict[int, CapturedStep] = {}
        self.started_at = self.done
        self.progress = Progress(self.config.steps, self.done, progress and self.first)
        if self.first:
            self._open_logs(resume, checkpoint)
        fabric.barrier()

    def _capture_lacks(self) -> str | None:
        """What the update lacks to be one CUDA graph; None where it lacks nothing."""
        config = self.config
        if self.device.type != "cuda":
            return f"a CUDA device, it runs on '{self.device.type}'"
        if self.fabric.world_size > 1:
            return f"one process, there are {self.fabric.world_size}"
        if config.compile:
            return "train.compile=false, it is true"
        if isinstance(self.sampler, PackedSampler) and not getattr(self.model_config, "packs_on_device", False):
            # A graph stays right for documents of other lengths only where the host doesn't look at them.
            return "data.packing=false, or layers that take packed documents without the host's help (S6)"
        return None

    def _captures(self) -> bool:
        """Whether an update is one CUDA graph."""
        lacking = self._capture_lacks()
        if self.config.capture is True and lacking is not None:
            raise ConfigError(f"train: train.capture=true wants {lacking}; set train.capture=auto")
        return self.config.capture is not False and lacking is None

    def _captured_for(self, room: int) -> CapturedStep:
        """The captured update for batches with room for so many offsets of packed documents; 0 for plain windows, minus
        their length where it changes."""
        if room in self.captured:
            return self.captured[room]

        def loss(inputs: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
            # Without Fabric's wrapper, which does nothing on one device but the autocast.
            if not packed:
                return self._loss(self.raw, {"input_ids": inputs[:, :-1], "labels": inputs})
            targets, offsets = packed
            return self.raw(inputs, targets=targets, cu_seqlens=offsets[0]).loss

        step = self.captured[room] = CapturedStep(
            self.guarded.optimizer,
            loss,
            parameters=self.guarded.parameters,
            clip=self.config.clip,
            accumulate=self.config.accumulate,
            autocast=torch.bfloat16 if self.config.precision == "bf16" else None,
            beside=next(iter(self.captured.values()), None),
        )
        step.skipped, step.skipped_in_row = self.guarded.skipped, self.guarded.skipped_in_row
        return step

    # -- starting and going on ------------------------------------------------------------------------------------

    def _agreed_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint, as the first process sees it."""
        found = latest_checkpoint(self.out) if self.first else None
        place = self.fabric.broadcast(None if found is None else (str(found.path), found.step), src=0)
        return None if place is None else Checkpoint(Path(place[0]), place[1])

    def _restore(self, checkpoint: Checkpoint) -> None:
        mine = load_checkpoint(checkpoint, self.raw, self.guarded.optimizer)
        state = checkpoint.trainer_state()
        self.done = state["step"]
        self.sampler.load_state_dict(state["sampler"])
        self.evaluations = [(step, value) for step, value in state["evaluations"]]
        self.train_loss = state["train_loss"]
        self.in_window = state["in_window"]
        self.guarded.skipped.fill_(state["skipped"])
        self.guarded.skipped_in_row.fill_(state["skipped_in_row"])
        self.norm = torch.tensor(state["norm"], device=self.device)
        self.saved_at = self.done
        same_world = mine is not None and state["world_size"] == self.fabric.world_size
        self.loss_sum.fill_(mine["loss_sum"] if mine is not None and same_world else state["mean_loss_sum"])
        if mine is not None and same_world:
            set_random_states(mine["random"])
            if self.initial is not None:
                self.initial.load_state_dict(mine["initial_state"])

    def _open_logs(self, resume: bool, checkpoint: Checkpoint | None) -> None:
        # Where there is no checkpoint the run starts over, and judges the untrained model again.
        keep = None if checkpoint is None else self.done
        if resume:
            self._note_changes(checkpoint)
        self._write_run("running")
        self.log = CsvLog(self.out / "log.csv", _LOG_COLUMNS, keep)
        self.evaluation_log = CsvLog(self.out / "evaluations.csv", _EVALUATION_COLUMNS, keep)
        self.board = TensorBoardLog(self.out / "tensorboard", self.done)
        if not self.board.available:
            self.progress.note("note: no TensorBoard events, since tensorboard is not installed (statescan[train])")

    def _note_changes(self, checkpoint: Checkpoint | None) -> None:
        before, now = load_run(self.out), self.run_config
        changed = [
            f"train.{entry.name} = {getattr(now.train, entry.name)} (was {getattr(before.train, entry.name)})"
            for entry in dataclasses.fields(now.train)
            if getattr(now.train, entry.name) != getattr(before.train, entry.name)
        ]
        origin = "from the start, since it has no checkpoint" if checkpoint is None else f"from step {self.done}"
        self.progress.note(f"resuming {self.out} {origin}" + (f" with {', '.join(changed)}" if changed else ""))

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train to the end or to an interruption."""
        config = self.config
        interrupted = False
        try:
            if self.done == 0 and config.evaluate_every:
                self._evaluate()
            self.clock = _Clock()
            self.logged_time, self.logged_step = 0.0, self.done
            while self.done < config.steps:
                self._update()
                self.progress.step(self.done)
                last = self.done == config.steps
                if self.done % config.log_every == 0 or last:
                    self._log()
                if last or (config.evaluate_every and self.done % config.evaluate_every == 0):
                    with self.clock.paused():
                        self._evaluate()
                interrupted = self.interruption.wished() and not last
                if last or interrupted or (config.checkpoint_every and self.done % config.checkpoint_every == 0):
                    with self.clock.paused():
                        self._save()
                if interrupted:
                    break
            seconds = self.clock.now()
            return self._finish(interrupted, seconds)
        finally:
            self.progress.close()
            if self.first:
                self.board.close()

    def _update(self) -> None:
        """One update: `accumulate` passes forward and backward, then a guarded step."""
        config = self.config
        if self.captures:
            self.loss_sum += self._captured_update()
            self.in_window += 1
            self.done += 1
            return
        passes = self._passes()
        loss_sum = torch.zeros((), device=self.device)
        for number, inputs in enumerate(passes):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(passes) - 1):
                loss = self._loss(self.model, inputs) / len(passes)
                self.fabric.backward(loss)
            loss_sum += loss.detach().float()
        self.norm = self.guarded.step(learning_rate(self.done, config))
        self.loss_sum += loss_sum
        self.in_window += 1
        self.done += 1

    def _loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a pass, from the state that its windows start from."""
        unjudged = getattr(self.corpus.tokenizer, "unjudged", None)
        if unjudged is not None:
            # Unknown bases are read, and not predicted.
            inputs = inputs | {"labels": inputs["labels"].masked_fill(inputs["labels"] == unjudged, -100)}
        if self.initial is None:
            return model(**inputs).loss
        start = self.initial.before()
        # Not as an argument, all of which Fabric rounds to the autocast's dtype: a scan's state is float32.
        given = self.raw.register_forward_pre_hook(
            lambda _, args, fields: (args, fields | {"state": start}), with_kwargs=True
        )
        try:
            output = model(**inputs)
        finally:
            given.remove()
        self.initial.after(output.state)
        return output.loss

    def _captured_update(self) -> torch.Tensor:
        """The same as one graph; returns the loss."""
        config, room = self.config, 0
        if isinstance(self.sampler, PackedSampler):
            packed = self.sampler.next_batch(config.batch_size, config.accumulate)
            # Every graph has room for a power of two of offsets, so that there are few; empty sequences fill it.
            room = 1 << (max(len(part.cu_seqlens) for part in packed) - 1).bit_length()
            offsets = [np.pad(part.cu_seqlens, (0, room - len(part.cu_seqlens)), mode="edge") for part in packed]
            inputs, targets = (np.concatenate(ids) for ids in zip(*(part[:2] for part in packed), strict=True))
            batch = [inputs, targets, np.stack(offsets)]
        else:
            batch = [self.sampler.next_batch(config.batch_size)]
            # Where lengths change a graph for each; another key than any room for offsets.
            room = -batch[0].shape[1] if config.first_length or config.shortest_length else 0
        step = self._captured_for(room)
        step.set_lr(learning_rate(self.done, config))
        loss = step.step(*(self._pinned(array) for array in batch))
        self.norm = step.norm
        return loss

    def _passes(self) -> list[dict[str, torch.Tensor]]:
        """What the model is given in each pass of an update, on the device; all of them judge as many tokens."""
        batch_size, parts = self.config.batch_size // self.fabric.world_size, self.config.accumulate
        if isinstance(self.sampler, PackedSampler):
            packed = self.sampler.next_batch(batch_size, parts)
            return [
                {
                    "input_ids": self._moved(part.inputs),
                    "targets": self._moved(part.targets),
                    "cu_seqlens": self._moved(part.cu_seqlens),
                }
                for part in packed
            ]
        windows = self._moved(self.sampler.next_batch(batch_size))
        return [{"input_ids": part[:, :-1], "labels": part} for part in windows.chunk(parts)]

    def _pinned(self, array: NDArray[Any]) -> torch.Tensor:
        """An array where a GPU can fetch it while the host goes on."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _moved(self, array: NDArray[Any]) -> torch.Tensor:
        """An array on the device."""
        return self._pinned(array).to(self.device, non_blocking=True)

    @property
    def _tokens(self) -> int:
        return self.done * self.config.batch_size * self.config.length

    def _log(self) -> None:
        """One row; the only place at which the host waits for the device."""
        total = self.fabric.all_reduce(self.loss_sum, reduce_op="mean")
        loss = float(total) / self.in_window
        in_row, skipped, norm = int(self.guarded.skipped_in_row), int(self.guarded.skipped), float(self.norm)
        self.loss_sum = torch.zeros((), device=self.device)
        self.in_window = 0
        self.train_loss = loss
        now = self.clock.now()
        per_step = self.config.batch_size * self.config.length
        speed = (self.done - self.logged_step) * per_step / max(now - self.logged_time, 1e-9)
        self.logged_time, self.logged_step = now, self.done
        if self.first:
            row = {
                "step": self.done,
                "epoch": self.sampler.epoch,
                "tokens": self._tokens,
                "loss": loss,
                "learning_rate": learning_rate(self.done - 1, self.config),
                "gradient_norm": norm,
                "skipped": skipped,
            }
            self.log.append(**row)
            used = self._utilization(speed)
            self.board.add(
                self.done,
                train__loss=loss,
                train__learning_rate=row["learning_rate"],
                train__gradient_norm=norm,
                train__tokens_per_second=speed,
                **({} if used is None else {"train__model_flop_utilization": used}),
            )
            shown = "" if used is None else f" ({100 * used:.0f} % of the peak)"
            self.progress.show(loss=f"{loss:.3f}", speed=f"{speed:,.0f}{shown}")
            for callback in self.callbacks:
                callback.on_log(row)
        if in_row >= self.config.max_nonfinite:
            raise TrainingError(
                f"train: the last {in_row} gradients up to step {self.done} were infinite or no numbers, and were left "
                "out; lower train.lr, lengthen train.warmup, or look at the data, then go on with resume"
            )

    def _utilization(self, tokens_per_second: float) -> float | None:
        config, length = self.config, self.config.length
        if isinstance(self.sampler, MixedLengthSampler):
            # As many ids are read at each.
            length = sum(self.sampler.lengths) // len(self.sampler.lengths)
        return utilization(
            self.model_config, length, tokens_per_second, self.device, config.precision, self.fabric.world_size
        )

    def _evaluate(self) -> None:
        """Judge the held-out text; every process does, since a sharded model needs all of them."""
        if len(self.corpus.valid) < 2:
            return
        count = self.config.evaluate_tokens
        ids = self.corpus.valid[: count + 1] if count else self.corpus.valid
        documents = self.corpus.valid_documents
        if documents is not None:
            documents = np.unique(np.minimum(documents, len(ids)))
        with self.fabric.autocast():
            evaluation = evaluate_tokens(
                self.raw,
                np.asarray(ids),
                tokenizer=self.corpus.tokenizer,
                context=self.config.length,
                documents=documents,
            )
        _reshard(self.raw)
        bits = evaluation.bits_per_byte
        # Of what was trained here: where it began may have been better than all of it.
        best = min((value for step, value in self.evaluations if step), default=math.inf)
        self.evaluations.append((self.done, bits))
        if self.done and bits < best:
            self._export(self.out / "best")
        if self.first:
            self.evaluation_log.append(step=self.done, tokens=self._tokens, bits_per_byte=bits)
            self.board.add(self.done, held_out__bits_per_byte=bits)
            self.progress.show(held_out=f"{bits:.3f}")
            for callback in self.callbacks:
                callback.on_evaluation(self.done, bits)

    # -- what stays -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.saved_at == self.done:
            return
        state = {
            "step": self.done,
            "sampler": self.sampler.state_dict(),
            "evaluations": self.evaluations,
            "train_loss": self.train_loss,
            "in_window": self.in_window,
            "mean_loss_sum": float(self.fabric.all_reduce(self.loss_sum.clone(), reduce_op="mean")),
            "norm": float(self.norm),
            "skipped": float(self.guarded.skipped),
            "skipped_in_row": float(self.guarded.skipped_in_row),
            "world_size": self.fabric.world_size,
        }
        path = save_checkpoint(
            self.out,
            self.done,
            self.raw,
            self.guarded.optimizer,
            trainer=state,
            rank_state={
                "random": random_states(),
                "loss_sum": float(self.loss_sum),
                "initial_state": [] if self.initial is None else self.initial.state_dict(),
            },
            keep=self.config.keep_checkpoints,
        )
        self.saved_at = self.done
        for callback in self.callbacks:
            callback.on_checkpoint(self.done, path)

    def _export(self, folder: Path) -> None:
        """Write config.json, model.safetensors and the tokenizer; a sharded model is put together first."""
        sharded = any(hasattr(parameter, "full_tensor") for parameter in self.raw.parameters())
        model = self.raw
        if sharded:
            whole = {name: parameter.full_tensor().cpu() for name, parameter in self.raw.named_parameters()}  # type: ignore[operator]
            if not self.first:
                return
            model = CausalLM(self.model_config, device="meta")
            model.load_state_dict(whole, strict=False, assign=True)
            model.tie_weights()
        if self.config.lora:
            model = CausalLM(self.model_config)
            model.load_state_dict(merged_weights(self.raw))
            if self.first:
                save_adapters(self.raw, folder / "adapter")
        if self.first:
            model.save_pretrained(folder)
            self.corpus.tokenizer.save(folder)

    def _finish(self, interrupted: bool, seconds: float) -> TrainResult:
        updates = self.done - self.started_at
        speed = updates * self.config.batch_size * self.config.length / seconds if updates else 0.0
        self._export(self.out)
        command = _resume_command(self.out) if interrupted else ""
        if self.first:
            self._write_run(
                "interrupted" if interrupted else "finished",
                tokens_per_second=speed,
                model_flop_utilization=self._utilization(speed),
            )
            rows = read_csv(self.out / "log.csv")
            if not draw_curve(self.out / "loss.png", rows, self.evaluations, self.corpus.file.bytes_per_token):
                self.progress.note("note: no loss.png, since matplotlib is not installed (statescan[plot])")
            if interrupted:
                self.progress.note(f"interrupted after step {self.done}, which is saved; go on with: {command}")
        self.fabric.barrier()
        return TrainResult(
            self.out,
            self.done,
            self.train_loss,
            list(self.evaluations),
            speed,
            interrupted,
            command,
            self.first,
            self._utilization(speed),
        )

    def _write_run(self, status: str, **results: Any) -> None:
        best = min(self.evaluations[1:] or self.evaluations, key=lambda entry: entry[1], default=None)
        facts = {
            "status": status,
            "steps": self.done,
            "config": self.run_config.to_dict(),
            "data": self.corpus.facts,
            "parameters": self.raw.parameter_count(),
            "train_loss": self.train_loss if math.isfinite(self.train_loss) else None,
            "evaluations": self.evaluations,
            "best": best,
            "devices": self.fabric.world_size,
            "device": self.device.type,
            "versions": {"statescan": __version__, "torch": torch.__version__, "python": platform.python_version()},
            **results,
        }
        write_json(self.out / RUN_FILE, facts, indent=2)


def _resume_command(out: Path) -> str:
    """The line that goes on with this run: the one it was started with, and --resume where that is `train`'s."""
    program = Path(sys.argv[0])
    as_module = program.name == "__main__.py" and program.parent.name == "statescan"
    if program.stem == "statescan" or as_module:
        start = f"{Path(sys.executable).name} -m statescan" if as_module else "statescan"
        arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
        # Other commands that train (demo) go on by themselves.
        return f"{start} {shlex.join(arguments)}" + (" --resume" if "train" in arguments else "")
    return f"statescan.train.train(run, {str(out)!r}, resume=True)"
