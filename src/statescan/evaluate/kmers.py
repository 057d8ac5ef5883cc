"""The yardstick of DNA classifiers: a logistic regression on how often each word of k bases occurs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from statescan.data.dna import UNKNOWN
from statescan.data.windows import LabelledWindows
from statescan.errors import ConfigError

__all__ = ["kmer_frequencies", "kmer_regression", "word_codes"]


def word_codes(tokens: NDArray[np.uint8], k: int) -> NDArray[np.int64]:
    """The number of the word of k bases that begins at each base: its bases' ids as digits to base 4.

    Args:
        tokens: (bases,) ids, A C G T N as 0 to 4.
        k: bases of a word, at most as many as there are.

    Returns:
        (bases - k + 1,) int64, 4^k where one of the word's bases is unknown.
    """
    count = len(tokens) - k + 1
    codes, known = np.zeros(count, np.int64), np.ones(count, bool)
    for offset in range(k):
        bases = tokens[offset : offset + count]
        codes = 4 * codes + np.minimum(bases, 3)
        known &= bases < UNKNOWN
    return np.where(known, codes, 4**k)


def kmer_frequencies(windows: NDArray[np.uint8], k: int) -> NDArray[np.float32]:
    """How often each word of k bases occurs in windows, words with an unknown base left out.

    Args:
        windows: (count, length) ids, A C G T N as 0 to 4.
        k: bases of a word, 1 to 8.

    Returns:
        (count, 4^k), rows that add up to 1 (to 0 where there is no word).

    Raises:
        ConfigError: k out of range.
    """
    if not 1 <= k <= 8 or windows.shape[1] < k:
        raise ConfigError(f"k-mers: k must be within 1 .. 8 and the length, got {k} for {windows.shape[1]} bases")
    found = np.zeros((len(windows), 4**k), np.float32)
    for row, window in enumerate(windows):
        known = np.bincount(word_codes(window, k), minlength=4**k + 1)[:-1]
        found[row] = known / max(1, known.sum())
    return found


def kmer_regression(
    train: LabelledWindows, test: LabelledWindows, k: int, *, penalty: float = 1e-4, most: int = 32_768
) -> NDArray[np.int64]:
    """Fits multinomial logistic regression to k-mer frequencies and judges it.

    Frequencies are scaled to mean 0 and deviation 1 over the training windows, then the mean cross entropy plus
    ``penalty / 2 |W|^2`` is minimised by L-BFGS, whose result depends on no seed.

    Args:
        train: windows to fit.
        test: windows to judge.
        k: bases of a word.
        penalty: of the weights.
        most: training windows that are looked at, at even distances; neighbours that belong together all or none.

    Returns:
        (count,) int64: the label that it gives each window of the test.
    """
    # Whole groups of homologues, so that no label is passed over.
    step = -(-len(train) // most)
    groups = np.arange(len(train)).reshape(-1, train.together)[::step]
    train = replace(train, together=1).take(groups.ravel())
    x, y = kmer_frequencies(train.values, k), torch.from_numpy(train.labels).long()
    mean, deviation = x.mean(0), x.std(0) + 1e-8
    inputs = torch.from_numpy((x - mean) / deviation)
    weight = torch.zeros(train.classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(train.classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), y) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    judged = torch.from_numpy((kmer_frequencies(test.values, k) - mean) / deviation)
    with torch.no_grad():
        return F.linear(judged, weight, bias).argmax(-1).numpy()
