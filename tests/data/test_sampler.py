import numpy as np
import pytest

from statescan.data import WindowSampler, permute
from statescan.errors import ConfigError, DataError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 4097])
def test_permute_is_a_bijection_and_computed_index_by_index(size):
    whole = permute(np.arange(size), size, seed=3, epoch=1)
    assert sorted(whole) == list(range(size))
    assert [int(permute(np.array([i]), size, 3, 1)[0]) for i in range(min(size, 20))] == whole[:20].tolist()


def test_permute_differs_by_seed_and_epoch_and_looks_shuffled():
    size = 20_000
    index = np.arange(size)
    shuffles = [permute(index, size, seed, epoch) for seed in (0, 1, 2**63) for epoch in (0, 1, 2)]
    for number, one in enumerate(shuffles):
        # The rank correlation of a random shuffle is normal with deviation 1/sqrt(size - 1): five of them.
        bound = 5 / np.sqrt(size - 1)
        assert abs(np.corrcoef(index, one)[0, 1]) < bound
        assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < bound
        for other in shuffles[number + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < bound
    # A fixed place is uniform over many epochs: chi-square with 15 degrees of freedom, p about 1e-6 at 58.
    places = [int(permute(np.array([5]), 16, 0, epoch)[0]) for epoch in range(3200)]
    counts = np.bincount(places, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 58


@pytest.mark.parametrize(("count", "length"), [(1000, 7), (1000, 100), (101, 100), (202, 100), (200, 100), (250, 1)])
def test_an_epoch_visits_every_window_once(count, length):
    sampler = WindowSampler(np.arange(count, dtype=np.uint16), length, seed=5)
    for _ in range(3):
        batch = sampler.next_batch(sampler.windows_per_epoch)
        assert (batch == batch[:, :1] + np.arange(length + 1)).all(), "a window is consecutive"
        assert batch.min() >= 0
        assert batch.max() < count
        targets = batch[:, 1:].ravel()
        assert len(set(targets.tolist())) == targets.size, "no position is a target twice"
        assert targets.size >= count - 1 - 2 * length
    assert sampler.epoch == 3.0


def test_epochs_have_their_own_order_and_phase():
    sampler = WindowSampler(np.arange(1000), 10, seed=1)
    firsts = [sampler.next_batch(sampler.windows_per_epoch)[:, 0] for _ in range(8)]
    assert len({tuple(first) for first in firsts}) == 8
    assert len({int(first.min()) for first in firsts}) > 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_batches_of_one_process(world):
    tokens = np.arange(500)
    alone = WindowSampler(tokens, 7, seed=2)
    ranks = [WindowSampler(tokens, 7, seed=2, rank=rank, world=world) for rank in range(world)]
    for _ in range(40):
        together = np.concatenate([rank.next_batch(2) for rank in ranks])
        assert (together == alone.next_batch(2 * world)).all()


def test_state_goes_on_exactly_and_on_another_number_of_ranks():
    tokens = np.arange(500)
    sampler = WindowSampler(tokens, 7, seed=2)
    for _ in range(13):
        sampler.next_batch(6)
    state = sampler.state_dict()
    expected = [sampler.next_batch(6) for _ in range(30)]
    for world in (1, 2):
        ranks = [WindowSampler(tokens, 7, seed=2, rank=rank, world=world) for rank in range(world)]
        for rank in ranks:
            rank.load_state_dict(state)
        for batch in expected:
            assert (np.concatenate([rank.next_batch(6 // world) for rank in ranks]) == batch).all()


def test_bad_arguments_and_states_are_named():
    with pytest.raises(DataError, match=r"wanted at least length \+ 1 = 11 ids, got 10; take a longer text"):
        WindowSampler(np.arange(10), 10, seed=0)
    with pytest.raises(ConfigError, match="wanted length >= 1, got 0"):
        WindowSampler(np.arange(10), 0, seed=0)
    state = WindowSampler(np.arange(100), 10, seed=0).state_dict()
    for other, name in [
        (WindowSampler(np.arange(100), 11, seed=0), "length = 11, got 10"),
        (WindowSampler(np.arange(100), 10, seed=1), "seed = 1, got 0"),
        (WindowSampler(np.arange(101), 10, seed=0), "tokens = 101, got 100"),
    ]:
        with pytest.raises(DataError, match=name):
            other.load_state_dict(state)
