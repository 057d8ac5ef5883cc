"""How well a waveform model foretells samples, and how well a classifier knows what it made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from statescan.data.recordings import Recordings
from statescan.errors import ConfigError, DataError
from statescan.evaluate.ratios import ratio_of_sums
from statescan.models.waveform import WaveformModel

__all__ = [
    "BitsPerSample",
    "SoundScores",
    "bits_per_sample",
    "frechet_distance",
    "paired_difference",
    "sound_scores",
]


class BitsPerSample(NamedTuple):
    """Mean negative log-likelihood of a sample, to base 2.

    bits: of all samples.
    samples: how many were judged.
    by_context: (bits, samples, pieces) of those that had so many samples before them, by where that range begins, and
        of how many recordings or pieces of such they are; without the ranges in which there was none.
    each: (recordings, 2) float64, the bits that each recording cost in all, and how many samples of it were judged.
    """

    bits: float
    samples: int
    by_context: dict[int, tuple[float, int, int]]
    each: NDArray[np.float64]


@torch.no_grad()
def bits_per_sample(
    model: WaveformModel,
    recordings: Recordings,
    *,
    longest: int | None = None,
    contexts: Sequence[int] = (),
    at_once: int = 1 << 18,
    limit: int = 0,
    autocast: torch.dtype | None = None,
) -> BitsPerSample:
    """The bits that each sample of some recordings costs a model that has heard its recording from the beginning on.

    Of silence that pads a batch nothing counts.

    Args:
        model: on the device where it shall run.
        recordings: what is judged; with labels where the model is conditioned.
        longest: cut recordings into pieces of so many samples, each heard as if it were one of its own, with nothing
            before it. Default: they stay whole.
        contexts: where ranges of the number of samples before the judged one begin, rising; the last has no end.
        at_once: samples of a batch.
        limit: judge so many recordings or pieces at most, evenly taken; 0 for all.
        autocast: dtype of `torch.autocast`; None for none.

    Raises:
        ConfigError: longest below 1, or contexts that don't rise from 0 or more.
        DataError: no labels where the model wants some.
    """
    if longest is not None and longest < 1:
        raise ConfigError(f"bits_per_sample: longest must be at least 1, got {longest}")
    if any(one >= other for one, other in itertools.pairwise((-1, *contexts))):
        raise ConfigError(f"bits_per_sample: contexts must rise from 0 or more, got {tuple(contexts)}")
    if model.config.classes and recordings.labels is None:
        raise DataError("bits_per_sample: a conditioned model wants recordings with labels, got none")
    length = int(recordings.lengths.max()) if longest is None else longest
    pieces = [
        (number, int(start), int(min(length, end - start)))
        for number, (begin, end) in enumerate(zip(recordings.offsets[:-1], recordings.offsets[1:], strict=True))
        for start in range(int(begin), int(end), length)
    ]
    if limit and len(pieces) > limit:
        pieces = [pieces[int(i)] for i in np.linspace(0, len(pieces) - 1, limit)]
    pieces.sort(key=lambda piece: piece[2])
    device, silence, at = model.head.weight.device, model.config.silence, 0
    # By the place in the piece, which is the number of samples before.
    nats = torch.zeros(pieces[-1][2], dtype=torch.float64)
    per_recording = np.zeros((len(recordings), 2))
    was_training = model.training
    model.eval()
    try:
        while at < len(pieces):
            # The next ones are longer: as many as fit at the length of the last.
            rows = 1
            while at + rows < len(pieces) and (rows + 1) * pieces[at + rows][2] <= at_once:
                rows += 1
            chosen = pieces[at : at + rows]
            length = chosen[-1][2]
            codes = np.full((rows, length), silence, np.uint8)
            for row, (_, start, real) in enumerate(chosen):
                codes[row, :real] = recordings.codes[start : start + real]
            heard = torch.from_numpy(codes).to(device).long()
            inputs = F.pad(heard[:, :-1], (1, 0), value=silence)
            labels = None
            if model.config.classes and recordings.labels is not None:
                labels = torch.from_numpy(recordings.labels[[piece[0] for piece in chosen]]).to(device)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                logits = model(inputs, labels).logits
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            each = F.cross_entropy(wide.transpose(1, 2), heard, reduction="none")
            real = torch.tensor([piece[2] for piece in chosen], device=device)
            counted = torch.arange(length, device=device) < real.unsqueeze(1)
            each = each * counted
            nats[:length] += each.sum(0).cpu().double()
            numbers = [piece[0] for piece in chosen]
            # A recording may have several pieces among these.
            np.add.at(per_recording, (numbers, 0), each.double().sum(1).cpu().numpy() / math.log(2))
            np.add.at(per_recording, (numbers, 1), [piece[2] for piece in chosen])
            at += rows
    finally:
        model.train(was_training)
    bits = nats.numpy() / math.log(2)
    # How many pieces reach each place.
    lengths = np.array([piece[2] for piece in pieces])
    there = np.cumsum(np.bincount(lengths)[:0:-1])[::-1]
    ranges = itertools.pairwise((*contexts, len(bits))) if contexts else ()
    by_context = {
        low: (float(bits[low:high].sum() / there[low:high].sum()), int(there[low:high].sum()), int(there[low]))
        for low, high in ranges
        if low < min(high, len(bits))
    }
    return BitsPerSample(float(bits.sum() / there.sum()), int(there.sum()), by_context, per_recording)


def paired_difference(one: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """How many bits a sample one model needs more than another one on the same recordings, and its standard error.

    `ratio_of_sums` of the differences, each recording counting as drawn on its own. Of another seed's models it says
    nothing.

    Args:
        one, other: (recordings, 2) bits and samples of each recording, as `bits_per_sample` tells them.

    Raises:
        DataError: fewer than two recordings, or other ones.
    """
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if first.shape != second.shape or len(first) < 2 or (first[:, 1] != second[:, 1]).any():
        raise DataError(
            f"paired_difference: wanted at least two recordings, the same for both, got {first.shape} and "
            f"{second.shape}; judge both on one set"
        )
    return ratio_of_sums(first[:, 0] - second[:, 0], first[:, 1])


class SoundScores(NamedTuple):
    """What a classifier says of made sounds.

    accuracy: the part that it takes for the label that was asked for; None where none was.
    inception: exp of the mean divergence of an answer from the mean answer: 1 to the number of classes.
    modified_inception: exp of the mean divergence of one answer from another's, which variety inside a class raises.
    activation_maximization: divergence of the training labels' distribution from the mean answer, plus the answers'
        mean entropy; lower is better.
    frechet: Fréchet distance between the features of made and real sounds; lower is better, 0 for the same ones.
    sounds: how many were judged.
    """

    accuracy: float | None
    inception: float
    modified_inception: float
    activation_maximization: float
    frechet: float
    sounds: int


def frechet_distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of the normal distributions fitted to two sets of features.

    Args:
        one, other: (count, features), at least 2 of each.

    Source: Heusel et al. (2017), arXiv:1706.08500, equation 6. The trace of the root is the sum of the roots of the
    eigenvalues of ``C1^(1/2) C2 C1^(1/2)``, which is symmetric.
    """
    if min(len(one), len(other)) < 2:
        raise DataError(f"frechet_distance: wanted at least 2 of each, got {len(one)} and {len(other)}")
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    C1, C2 = np.atleast_2d(np.cov(first, rowvar=False)), np.atleast_2d(np.cov(second, rowvar=False))
    values, vectors = np.linalg.eigh(C1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ C2 @ root).clip(0)).sum()
    distance = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(C1) + np.trace(C2) - 2 * trace
    return max(0.0, float(distance))


def sound_scores(
    logits: NDArray[Any],
    features: NDArray[Any],
    real_features: NDArray[Any],
    train_labels: NDArray[Any],
    asked: NDArray[Any] | None = None,
) -> SoundScores:
    """The scores by which generated sounds are compared, all by one classifier.

    Args:
        logits: (count, classes) of made sounds.
        features: (count, features) of made sounds, what the classifier's last layer reads.
        real_features: the same of real sounds that were not learnt from, or that were: say which.
        train_labels: labels of the training sounds, for their distribution.
        asked: (count,) labels that were asked for.

    Source: Kong et al., DiffWave (2021), arXiv:2009.09761, appendix; Gu and Dao (2023), table 4. Theirs come from a
    classifier of SC09, so only numbers of one classifier can be compared.
    """
    wide = np.asarray(logits, np.float64)
    log_p = wide - wide.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(0).clip(1e-300)
    entropy = -(p * log_p).sum(1)
    # The mean over all pairs of sum p (log p - log q), without making the pairs.
    cross = -(p.mean(0) * log_p.mean(0)).sum()
    frequency = np.bincount(np.asarray(train_labels, np.int64), minlength=p.shape[1]) / len(train_labels)
    there = frequency > 0
    return SoundScores(
        None if asked is None else float((wide.argmax(1) == np.asarray(asked)).mean()),
        float(np.exp((p * (log_p - np.log(mean))).sum(1).mean())),
        float(np.exp(cross - entropy.mean())),
        float((frequency[there] * np.log(frequency[there] / mean[there])).sum() + entropy.mean()),
        frechet_distance(features, real_features),
        len(p),
    )
