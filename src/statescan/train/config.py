"""What a training run is: the model, the data and the schedule, as frozen dataclasses that come from and go to JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from statescan.data import Tokenizer
from statescan.errors import ConfigError
from statescan.models import MambaConfig, ModelConfig
from statescan.models.baseline_config import FAMILIES

__all__ = ["DataConfig", "RunConfig", "TrainConfig", "apply_overrides", "build_config", "check_as_train_config"]

Config = TypeVar("Config")


@dataclass(frozen=True)
class DataConfig:
    """What is read.

    Args:
        paths: files, folders, globs or packaged names (see `statescan.data.find_sources`).
        valid_paths: the held-out text; where empty, the end of `paths` is held out.
        valid_fraction: how much of `paths` is held out where `valid_paths` is empty; 0 for nothing.
        tokenizer: "bytes", a `tokenizers` JSON file, or a folder that holds one.
        field: the field of each JSON line that holds the text.
        invalid_utf8: what a tokenizer of characters does with bytes that are no UTF-8.
        modality: "text", or "dna": `paths` are FASTA or FASTQ, and the fields from `regions` on are for it.
        packing: fill windows with documents (files, JSON lines) of which none sees another, instead of cutting through
            the text as one stream.
        regions: of DNA, a BED file with what is trained on; where empty, all that is not held out.
        valid_regions: of DNA, a BED file with what is held out; where empty, blocks that `valid_fraction` of all bases
            lie in, by an order of their own.
        valid_block: of DNA, bases of a block that is held out where `valid_regions` names none; 0 for two windows, and
            65,536 at least.
        aligned: of DNA, the files are species whose i-th records are orthologous, as a .npz of aligned blocks always
            is: the first 85 % of the blocks of all of them are trained on and the next 5 % held out; the last 10 %,
            the test of `reproduce great-apes`, are not read.
        both_strands: of DNA, every second window is read from the other strand.
        soft_masked: of DNA, what lower-case bases are: "base", or "n", unknown.
        gaps: of DNA, what an alignment's gaps are: "error", "n" (unknown), "drop".
        cache: folder of the token files; None for the user's cache folder.
    """

    paths: tuple[str, ...] = ()
    valid_paths: tuple[str, ...] = ()
    valid_fraction: float = 0.05
    tokenizer: str = "bytes"
    field: str = "text"
    invalid_utf8: Literal["error", "replace"] = "error"
    packing: bool = False
    modality: Literal["text", "dna"] = "text"
    regions: str = ""
    valid_regions: str = ""
    valid_block: int = 0
    aligned: bool = False
    both_strands: bool = True
    soft_masked: Literal["base", "n"] = "base"
    gaps: Literal["error", "n", "drop"] = "error"
    cache: str | None = None

    def __post_init__(self) -> None:
        _check(0.0 <= self.valid_fraction < 1.0, "data.valid_fraction", "in [0, 1)", self.valid_fraction)
        _check(self.valid_block >= 0, "data.valid_block", ">= 0", self.valid_block)


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. The defaults are the published recipe's where it states one.

    Args:
        steps: updates of the weights.
        batch_size: windows per update, over all devices and all of `accumulate` together: the run's course does not
            depend on how many devices share it (but for rounding).
        length: ids per window.
        first_length: of DNA, length warm-up: ids of the first updates' windows, `length` divided by a power of two, and
            as many more windows as make up for it; 0 for none.
        stage_steps: of the length warm-up, updates after which the length doubles.
        shortest_length: mixed lengths: every update's windows are of `length` or one of its halves down to this,
            `length` divided by a power of two, and as many more of them as make up for it; each length has an equal
            share of the updates. 0: all windows are of `length`. Not with `data.packing`, DNA, or carried or drawn
            states.
        accumulate: passes whose gradients make one update; batch_size must divide by it times the devices.
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine; `lr` itself keeps it constant.
        warmup: updates over which the learning rate rises from 0 in a line.
        weight_decay: AdamW's, on matrices (A_log, D, norms and biases have none).
        betas: AdamW's.
        eps: AdamW's.
        clip: the largest global norm of a gradient; 0 for no clipping.
        precision: "float32", or "bf16" for autocast with float32 weights.
        initial_state: where each window starts, for models whose state has a fixed size: "zero"; "carry", the state
            after the text before it, as batches then read the text lane by lane (truncated backpropagation through
            time); "noise", a draw with the root mean square that the last windows' final states had. Both teach a
            model states that no window of `length` ids from zeros ever comes to.
        from_zero: with "carry" and "noise", the share of windows that start from zeros all the same, drawn each time.
        weights: folder of a model of the same shape whose weights the run starts with; empty: they are drawn.
        lora: rank of the low-rank adapters that are trained in place of the weights (`statescan.train.adapters`), which
            the run's model has merged; 0: all weights are trained.
        seed: of the initial weights and of the order of the data.
        max_nonfinite: updates in a row with a gradient that is not finite, each of them left out, that end the run.
        evaluate_every: updates between two evaluations of the held-out text; 0 for none but the last.
        evaluate_tokens: how much of the held-out text is judged; 0 for all of it.
        checkpoint_every: updates between two checkpoints; 0 for none but the last.
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: updates between two rows of log.csv.
        devices: processes per node, "auto" for every GPU there is.
        num_nodes: machines.
        strategy: "auto" (one device, or "ddp" on several), "ddp" (replicated), "fsdp" (sharded).
        accelerator: "auto", "cpu", "cuda" or "mps".
        recompute: activation recomputation, "none", "cheap" or "block"; None leaves it to the model's own config.
        threads: CPU threads per process; 0 leaves it to torch.
        compile: compile the model with torch.compile.
        capture: run the whole update as one CUDA graph (see `CapturedStep`): "auto" where that can be, which is on one
            CUDA device without `compile` (with data.packing where the layers are S6's); True insists on it, False never
            does.
    """

    steps: int = 1000
    batch_size: int = 8
    length: int = 512
    first_length: int = 0
    stage_steps: int = 0
    shortest_length: int = 0
    accumulate: int = 1
    lr: float = 3e-3
    min_lr: float = 1e-5
    warmup: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    precision: Literal["float32", "bf16"] = "float32"
    initial_state: Literal["zero", "carry", "noise"] = "zero"
    from_zero: float = 0.015625
    weights: str = ""
    lora: int = 0
    seed: int = 0
    max_nonfinite: int = 20
    evaluate_every: int = 100
    evaluate_tokens: int = 16384
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    devices: int | Literal["auto"] = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    recompute: Literal["none", "cheap", "block"] | None = None
    threads: int = 0
    compile: bool = False
    capture: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "accumulate", "keep_checkpoints", "log_every", "num_nodes"):
            _check(getattr(self, name) >= 1, f"train.{name}", ">= 1", getattr(self, name))
        for name in ("warmup", "evaluate_every", "evaluate_tokens", "checkpoint_every", "threads", "lora"):
            _check(getattr(self, name) >= 0, f"train.{name}", ">= 0", getattr(self, name))
        for name in ("first_length", "stage_steps", "shortest_length"):
            _check(getattr(self, name) >= 0, f"train.{name}", ">= 0", getattr(self, name))
        for name in ("min_lr", "weight_decay", "eps", "clip"):
            _check(0 <= getattr(self, name) < float("inf"), f"train.{name}", ">= 0 and finite", getattr(self, name))
        _check(0 < self.lr < float("inf"), "train.lr", "> 0 and finite", self.lr)
        _check(all(0 <= beta < 1 for beta in self.betas), "train.betas", "two numbers in [0, 1)", self.betas)
        _check(0 <= self.from_zero <= 1, "train.from_zero", "in [0, 1]", self.from_zero)
        _check(
            self.initial_state == "zero" or self.accumulate == 1,
            "train.accumulate",
            f"1 with train.initial_state={self.initial_state}",
            self.accumulate,
        )
        _check(
            (self.first_length > 0) == (self.stage_steps > 0),
            "train.stage_steps",
            "> 0 just where train.first_length is",
            self.stage_steps,
        )
        shorter, rest = divmod(self.length, self.shortest_length or self.length)
        _check(
            not rest and shorter > 0 and shorter & (shorter - 1) == 0,
            "train.shortest_length",
            f"train.length = {self.length} divided by a power of two",
            self.shortest_length,
        )
        _check(
            not self.shortest_length or self.initial_state == "zero",
            "train.shortest_length",
            f"0 with train.initial_state={self.initial_state}",
            self.shortest_length,
        )
        _check(not self.lora or self.strategy != "fsdp", "train.lora", "0 with train.strategy=fsdp", self.lora)
        _check(self.max_nonfinite >= 1, "train.max_nonfinite", ">= 1", self.max_nonfinite)
        _check(self.devices == "auto" or self.devices >= 1, "train.devices", ">= 1 or auto", self.devices)
        _check(self.batch_size % self.accumulate == 0, "train.batch_size", "a multiple of accumulate", self.batch_size)
        _check(0 <= self.seed < 2**63, "train.seed", "in [0, 2**63)", self.seed)


@dataclass(frozen=True)
class RunConfig:
    """A whole run: what ``run.json`` holds, and all that `statescan.train.train` needs besides a folder.

    Args:
        model: the model's shape.
        data: what is read.
        train: how it is trained.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def apply_overrides(self, overrides: Iterable[str]) -> RunConfig:
        """This run with fields set, e.g. ``["train.steps=200", "model.d_state=8"]``; see `apply_overrides`."""
        return apply_overrides(self, overrides)

    def fit_vocabulary(self, tokenizer: Tokenizer) -> RunConfig:
        """This run with the model's vocabulary of the tokenizer's size."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=tokenizer.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as JSON takes them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The run that `to_dict` gave.

        Raises:
            ConfigError: an unknown field, or a value of another type.
        """
        return _build(cls, values, "")

    def to_json(self) -> str:
        """The run as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> RunConfig:
        """The run in a JSON file: one that holds `to_json`'s text, or a run.json with it under "config".

        Raises:
            ConfigError: the file can't be read, is no JSON, or holds something else.
        """
        try:
            values = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise ConfigError(
                f"config: '{source}' can't be read as JSON ({problem}); name a run.json or a RunConfig as JSON"
            ) from None
        if not isinstance(values, dict):
            raise ConfigError(f"config: wanted a JSON object in '{source}', got {type(values).__name__}")
        return cls.from_dict(values.get("config", values))


def check_as_train_config(config: Any) -> None:
    """Checks the fields of another training's configuration that `TrainConfig` has too, as those of one.

    Raises:
        ConfigError: a value out of its range.
    """
    shared = {entry.name for entry in dataclasses.fields(TrainConfig)}
    TrainConfig(**{e.name: getattr(config, e.name) for e in dataclasses.fields(config) if e.name in shared})


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A frozen dataclass with fields set by strings, each checked against the field's type.

    Args:
        config: a dataclass, with dataclasses inside or not.
        overrides: "field=value" or "part.field=value"; tuples as "0.9,0.95"; None as "none"; booleans as "true" or
            "false". Later ones win.

    Returns:
        A new dataclass.

    Raises:
        ConfigError: no such field (the text names the nearest one), a value of another type, or out of range.
    """
    changes: dict[tuple[str, ...], str] = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"config: wanted field=value, got '{override}'; e.g. train.steps=200")
        changes[tuple(name.strip().split("."))] = value.strip()
    return _replace(config, config, changes, "")


def build_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A frozen dataclass, with dataclasses inside or not, from the plain values that JSON holds, each checked.

    Raises:
        ConfigError: an unknown field, a value of another type, or out of range.
    """
    return _build(kind, values, "")


def _replace(root: Any, config: Any, changes: dict[tuple[str, ...], str], prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    new: dict[str, Any] = {}
    inner: dict[str, dict[tuple[str, ...], str]] = {}
    for path, value in changes.items():
        name = prefix + ".".join(path)
        head = path[0]
        if head not in hints:
            raise ConfigError(_unknown(name, _names(root)))
        if dataclasses.is_dataclass(getattr(config, head)):
            if len(path) == 1:
                raise ConfigError(f"config: {name} has fields of its own; set one of them, e.g. {_example(root, name)}")
            inner.setdefault(head, {})[path[1:]] = value
        elif len(path) > 1:
            raise ConfigError(_unknown(name, _names(root)))
        else:
            new[head] = _parse(value, hints[head], name)
    for head, parts in inner.items():
        new[head] = _replace(root, getattr(config, head), parts, f"{prefix}{head}.")
    return _make(lambda: dataclasses.replace(config, **new))


def _make(make: Any) -> Any:
    try:
        return make()
    except (TypeError, ValueError) as problem:
        raise problem if isinstance(problem, ConfigError) else ConfigError(f"config: {problem}") from problem


def _names(config: Any, prefix: str = "") -> Iterator[str]:
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _names(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def _example(config: Any, part: str) -> str:
    return next(f"{name}=..." for name in _names(config) if name.startswith(part + "."))


def _unknown(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, 1, 0.0)
    # A field given without its part, or with the wrong one, is nearest to the field of that name.
    same = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = (same or near or ["none"])[0]
    return f"config: wanted a known field, got '{name}'; the nearest is '{nearest}'"


def _check(good: bool, name: str, wanted: str, got: Any) -> None:
    if not good:
        raise ConfigError(f"config: {name}: wanted {wanted}, got {got}")


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_describe(argument) for argument in arguments)
    if origin is tuple:
        inner = [argument for argument in arguments if argument is not Ellipsis]
        if Ellipsis in arguments:
            return f"{_describe(inner[0])},{_describe(inner[0])},..."
        return ",".join(_describe(argument) for argument in inner)
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _parse(text: str, hint: Any, name: str) -> Any:
    """A string as a value of the type `hint`."""
    try:
        return _parse_as(text, hint)
    except ValueError:
        raise ConfigError(f"config: {name}: wanted {_describe(hint)}, got '{text}'") from None


def _parse_as(text: str, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        for argument in arguments:
            if text == str(argument):
                return argument
        raise ValueError
    if origin in (Union, types.UnionType):
        # The loosest kind, a string, is tried last.
        for argument in sorted(arguments, key=lambda kind: kind is str):
            try:
                return _parse_as(text, argument)
            except ValueError:
                continue
        raise ValueError
    if origin is tuple:
        parts = [part.strip() for part in text.split(",")] if text else []
        kinds = [arguments[0]] * len(parts) if Ellipsis in arguments else list(arguments)
        if len(parts) != len(kinds):
            raise ValueError
        return tuple(_parse_as(part, kind) for part, kind in zip(parts, kinds, strict=True))
    if hint is type(None):
        if text.lower() in ("none", "null"):
            return None
        raise ValueError
    if hint is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise ValueError
    if hint is int:
        # 1e6 and 100_000 are whole numbers too.
        try:
            return int(text)
        except ValueError:
            number = float(text)
            if number != number or number in (float("inf"), float("-inf")) or number != int(number):
                raise ValueError from None
            return int(number)
    if hint is float:
        number = float(text)
        if number != number:
            raise ValueError
        return number
    if hint is str:
        return text
    raise ConfigError(f"config: a field of type {hint} can't be set by a string")


def _build(kind: Any, values: Any, prefix: str) -> Any:
    """A dataclass from plain JSON values, checked."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"config: {prefix.rstrip('.') or 'run'}: wanted an object, got {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    made = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(_unknown(prefix + name, [prefix + known for known in hints]))
        if hints[name] == ModelConfig:
            made[name] = _build(_model_kind(value), value, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(hints[name]):
            made[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            made[name] = _coerce(value, hints[name], prefix + name)
    return _make(lambda: kind(**made))


def _model_kind(values: Any) -> type[Any]:
    """The class of a model's configuration, which its field "family" names; Mamba's has none."""
    family = values.get("family") if isinstance(values, Mapping) else None
    if family is None:
        return MambaConfig
    if family not in FAMILIES:
        raise ConfigError(f"config: model.family: wanted {' | '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family]


def _coerce(value: Any, hint: Any, name: str) -> Any:
    try:
        return _coerce_as(value, hint)
    except ValueError:
        raise ConfigError(f"config: {name}: wanted {_describe(hint)}, got {value!r}") from None


def _coerce_as(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError
    if origin in (Union, types.UnionType):
        for argument in arguments:
            try:
                return _coerce_as(value, argument)
            except ValueError:
                continue
        raise ValueError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments else list(arguments)
        if len(kinds) != len(value):
            raise ValueError
        return tuple(_coerce_as(part, kind) for part, kind in zip(value, kinds, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ValueError
