"""The scores of generated sounds, against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest

from statescan.errors import DataError
from statescan.evaluate.waveforms import frechet_distance, paired_difference, sound_scores


def test_scores_of_a_sure_and_balanced_classifier():
    classes = 4
    labels = np.arange(classes).repeat(25)
    logits = 100.0 * np.eye(classes)[labels]
    features = np.random.default_rng(0).normal(size=(100, 3))
    scores = sound_scores(logits, features, features, labels, labels)
    assert scores.accuracy == 1
    assert scores.inception == pytest.approx(classes)
    assert scores.activation_maximization == pytest.approx(0, abs=1e-12)
    assert scores.frechet == pytest.approx(0, abs=1e-9)
    assert scores.sounds == 100
    # All the same answer: one class, no variety, and far from the training's labels.
    same = sound_scores(np.tile([5.0, 0, 0, 0], (100, 1)), features, features, labels)
    assert same.accuracy is None
    assert same.inception == pytest.approx(1)
    assert same.modified_inception == pytest.approx(1)
    assert same.activation_maximization > 1


def test_modified_inception_is_the_mean_over_pairs():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(30, 5))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    pairs = np.mean([[(a * np.log(a / b)).sum() for b in p] for a in p])
    mean = p.mean(0)
    inception = np.mean([(a * np.log(a / mean)).sum() for a in p])
    labels = rng.integers(0, 5, 50)
    made = sound_scores(logits, rng.normal(size=(30, 2)), rng.normal(size=(40, 2)), labels)
    assert made.modified_inception == pytest.approx(np.exp(pairs))
    assert made.inception == pytest.approx(np.exp(inception))
    share = np.bincount(labels, minlength=5) / 50
    wanted = (share * np.log(share / mean)).sum() - np.mean((p * np.log(p)).sum(1))
    assert made.activation_maximization == pytest.approx(wanted)


def test_paired_differences_and_how_sure_they_are():
    rng = np.random.default_rng(3)
    samples = rng.integers(2000, 6000, 300).astype(float)
    hard = rng.normal(5, 1, 300) * samples  # what a recording costs any model
    one = np.stack([hard + rng.normal(0.1, 0.2, 300) * samples, samples], 1)
    other = np.stack([hard, samples], 1)
    difference, error = paired_difference(one, other)
    more = one[:, 0] - other[:, 0]
    assert difference == pytest.approx(more.sum() / samples.sum())
    assert paired_difference(other, one) == (pytest.approx(-difference), pytest.approx(error))
    rows = rng.integers(300, size=(20_000, 300))
    again = (more[rows].sum(1) / samples[rows].sum(1)).std()
    assert error == pytest.approx(again, rel=0.03), "as drawing recordings anew has it"
    assert paired_difference(other, other) == (0, 0)
    for wrong in (other[:1], other + 1):
        with pytest.raises(DataError, match="at least two recordings, the same for both"):
            paired_difference(one[: len(wrong)], wrong)


def test_frechet_of_known_normals():
    rng = np.random.default_rng(2)
    one = rng.normal(size=(200_000, 2))
    other = one * [2.0, 1.0] + [3.0, 0.0]
    # |m|^2 = 9, and (2 - 1)^2 for the doubled spread.
    assert frechet_distance(one, other) == pytest.approx(10, rel=0.02)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="at least 2"):
        frechet_distance(one[:1], other)
