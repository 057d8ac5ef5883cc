"""The curve over positions: every octave's mean is what the model's own bits give, and no text favours one of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from statescan.errors import ConfigError, DataError
from statescan.evaluate import row_bits
from statescan.models import CausalLM, MambaConfig, TransformerConfig
from statescan.recipes import context_growth as recipe
from statescan.recipes import language_scaling

VOCABULARY = 11


def _model(config) -> CausalLM:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = CausalLM(config).double().eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(40)  # sure enough of itself that positions differ
    return model


def _books() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCABULARY, size) for size in (301, 100, 163)]


@pytest.mark.parametrize(
    "config",
    [MambaConfig(8, 2, VOCABULARY, d_state=4), TransformerConfig(8, 2, VOCABULARY, n_head=1, d_intermediate=8)],
)
def test_octaves_are_the_means_of_the_bits_read_one_by_one(config, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(recipe, "_LOGITS", 2 * 64 * 16)  # several batches of windows, and of places
    model, books = _model(config), _books()
    longest, span, stride, window = 64, 128, 32, 16
    bins = recipe.judge_positions(model, books, longest=longest, span=span, stride=stride, window=window)
    assert [(one.first, one.last) for one in bins] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]

    def bits(book: np.ndarray, start: int, length: int) -> np.ndarray:
        return next(row_bits(model, book, [start], length, length, torch.device("cpu")))[1][0]

    windows, more = [], []
    for book in books:
        for place in range(0, len(book) - span, stride):
            here = [bits(book, place + start, window) for start in range(0, span, window)]
            windows += here
            more.append(bits(book, place, longest) - np.concatenate(here)[:longest])
    assert len(more) == 6 + 2
    level = np.mean(windows)
    for one in bins:
        part = slice(one.first - 1, one.last)
        if one.first < window:
            values = np.array([row[part].mean() for row in windows])
            counted, wanted = span / stride, values.mean()
        else:
            values = np.array([row[part].mean() for row in more])
            counted, wanted = max(1.0, one.first / stride), level + values.mean()
        assert one.places == len(values)
        assert one.bits_per_byte == pytest.approx(wanted, rel=1e-9)
        error = values.std(ddof=1) / math.sqrt(len(values)) * math.sqrt(counted)
        assert one.standard_error == pytest.approx(error, rel=1e-9)


class _Forgetful(nn.Module):
    """Knows one byte back and no more, so that no position is better than another; text is harder by parts."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(1, 1)
        self.config = MambaConfig(8, 1, VOCABULARY)

    def init_state(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows)

    def forward(self, ids, state=None):  # type: ignore[no-untyped-def]
        from statescan.models.causal_lm import CausalLMOutput

        surely = ids.double().unsqueeze(-1) * torch.linspace(0, 1, VOCABULARY, dtype=torch.float64)
        return CausalLMOutput(surely, None, state)


def test_no_octave_has_the_easier_text() -> None:
    book = np.concatenate([np.arange(600) % 2, np.arange(600) * 7 % VOCABULARY])
    bins = recipe.judge_positions(_Forgetful(), [book], longest=1024, span=1024, stride=64, window=16)  # type: ignore[arg-type]
    beyond = [one.bits_per_byte for one in bins if one.first >= 16]
    assert max(beyond) - min(beyond) < 1e-12
    # Read naively the second half of the book is another matter.
    plain = next(row_bits(_Forgetful(), book, [0], 1024, 1024, torch.device("cpu")))[1][0]
    assert abs(plain[512:].mean() - plain[:512].mean()) > 0.5


def test_what_does_not_fit_is_refused() -> None:
    model, books = _model(MambaConfig(8, 1, VOCABULARY, d_state=2)), _books()
    for fields in ({"longest": 96}, {"longest": 16}, {"span": 40}, {"stride": 24}, {"window": 12}, {"longest": 256}):
        sizes = {"longest": 64, "span": 128, "stride": 32, "window": 16} | fields
        with pytest.raises(ConfigError, match="window < longest <= span; got"):
            recipe.judge_positions(model, books, **sizes)
    with pytest.raises(DataError, match="a book of more than 512 bytes, got 301 at most"):
        recipe.judge_positions(model, books, longest=64, span=512, stride=32, window=16)


def test_rows_share_bytes_and_schedule_with_the_scaling_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATESCAN_CACHE", str(tmp_path / "cache"))
    for part in ("train", "valid"):
        (tmp_path / f"novels_{part}.txt").write_text("x" * 1_000_000)
    plain = language_scaling.scaling_run("mamba-1m", tmp_path)
    read = plain.train.steps * plain.train.batch_size * plain.train.length
    assert recipe.growth_run("mamba-2k", tmp_path) == plain
    for row, entry in recipe.ROWS.items():
        run = recipe.growth_run(row, tmp_path)
        settings = run.train
        assert all(getattr(settings, name) == value for name, value in entry.train.items())
        assert abs(settings.steps * settings.batch_size * settings.length / read - 1) < 0.05
        assert (settings.lr, run.data) == (language_scaling.learning_rate_of(f"{entry.family}-1m"), plain.data)
        assert abs(settings.warmup / settings.steps - 0.1) < 0.04
    with pytest.raises(ConfigError, match="got 'mamba-3k' and '1m'"):
        recipe.growth_run("mamba-3k", tmp_path)
    with pytest.raises(ConfigError, match="got 'mamba-2k' and '5m'"):
        recipe.growth_run("mamba-2k", tmp_path, size="5m")


def test_the_summary_tells_the_least_the_rise_and_the_gain() -> None:
    def curve(values: dict[int, float]) -> list[recipe.PositionBin]:
        return [recipe.PositionBin(first, 2 * first - 1, bits, None, 1) for first, bits in values.items()]

    told = recipe.summary(curve({1 << 14: 1.6, 1 << 15: 1.5, 1 << 16: 1.52, 1 << 17: 1.53, 1 << 18: 1.51}))
    assert told["least"] == 1 << 15
    assert told["rise"] == pytest.approx(0.02)
    assert told["from_16k_to_256k"] == pytest.approx(-0.07)
    assert recipe.summary(curve({1: 5.0, 2: 4.0})) == {"least": 2, "rise": 0.0, "from_16k_to_256k": None}
