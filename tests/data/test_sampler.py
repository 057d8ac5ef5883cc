from itertools import pairwise

import numpy as np
import pytest

from statescan.data import LaneSampler, MixedLengthSampler, PackedSampler, WindowSampler, permute
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


SIZES = [1, 5, 40, 2, 3, 17, 1, 90, 8, 2, 31]


def documents(sizes=SIZES):
    """Ids that count up through the corpus, so that an id names its place; and where each document starts."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return np.arange(offsets[-1], dtype=np.uint16), offsets


@pytest.mark.parametrize("length", [1, 4, 16, 60, 187])
def test_a_packed_epoch_makes_every_prediction_once_and_none_between_documents(length):
    tokens, offsets = documents()
    owner = np.repeat(np.arange(len(SIZES)), SIZES)
    sampler = PackedSampler(tokens, offsets, length, seed=5)
    whole = sum(size - 1 for size in SIZES)
    left_out = []
    for epoch in range(4):
        (batch,) = sampler.next_batch(sampler.windows_per_epoch)
        assert batch.inputs.shape == batch.targets.shape == (1, sampler.windows_per_epoch * length)
        inputs, targets = batch.inputs[0], batch.targets[0]
        assert (targets == inputs + 1).all()
        assert (owner[targets] == owner[inputs]).all(), "no document predicts the next"
        assert len(set(targets.tolist())) == targets.size
        assert whole - targets.size < length
        left_out.append(frozenset(range(len(tokens))) - set(targets.tolist()))
        assert batch.cu_seqlens.dtype == np.int32
        assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, inputs.size)
        for start, end in pairwise(batch.cu_seqlens):
            assert end > start
            assert (inputs[start:end] == inputs[start] + np.arange(end - start)).all(), "a piece is consecutive"
            assert start // length == (end - 1) // length, "a piece lies in one window"
        # Pieces are cut where a document or a window ends, nowhere else.
        cuts = set(range(0, inputs.size, length)) | {
            i for i in range(1, inputs.size) if owner[inputs[i]] != owner[inputs[i - 1]]
        }
        assert set(batch.cu_seqlens[:-1].tolist()) == cuts
        assert sampler.epoch == epoch + 1
    if whole % length:
        assert len(set(left_out)) > 1, "each epoch leaves out something else"


def test_packed_epochs_have_orders_of_their_own():
    sampler = PackedSampler(*documents([9] * 50), 16, seed=1)
    orders = [sampler.next_batch(sampler.windows_per_epoch)[0].inputs.tobytes() for _ in range(6)]
    assert len(set(orders)) == 6
    assert PackedSampler(*documents([9] * 50), 16, seed=2).next_batch(25)[0].inputs.tobytes() not in orders
    # Documents are shuffled, and so are the windows of one that is longer than they.
    (first,) = PackedSampler(*documents([9] * 50), 16, seed=1).next_batch(25)
    assert (np.diff(first.inputs[0, first.cu_seqlens[:-1]]) < 0).any()
    (long,) = PackedSampler(*documents([400]), 16, seed=1).next_batch(24)
    assert (np.diff(long.inputs[0, ::16]) < 0).any()


def test_documents_and_windows_are_shuffled_by_orders_of_their_own():
    """Documents as long as a window, and as many: under one key both orders would be the same one, taken twice."""
    length, count = 8, 64
    sampler = PackedSampler(*documents([length + 1] * count), length, seed=3)
    (batch,) = sampler.next_batch(sampler.windows_per_epoch)
    documents_in_order = (batch.inputs[0, ::length] // (length + 1)).tolist()
    order = permute(np.arange(count), count, 3, 0)
    twice = order[order].tolist()
    assert documents_in_order != twice
    assert documents_in_order != sorted(documents_in_order)


@pytest.mark.parametrize(("world", "parts"), [(1, 4), (2, 2), (4, 1)])
def test_packed_batches_are_shared_by_ranks_and_passes(world, parts):
    alone = PackedSampler(*documents(), 8, seed=2)
    ranks = [PackedSampler(*documents(), 8, seed=2, rank=rank, world=world) for rank in range(world)]
    for _ in range(40):
        together = [part for rank in ranks for part in rank.next_batch(4 // world, parts)]
        (whole,) = alone.next_batch(4)
        assert len(together) == 4
        assert (np.concatenate([part.inputs for part in together], 1) == whole.inputs).all()
        assert (np.concatenate([part.targets for part in together], 1) == whole.targets).all()
        starts = [part.cu_seqlens[:-1] + 8 * number for number, part in enumerate(together)]
        assert (np.concatenate(starts) == whole.cu_seqlens[:-1]).all()


def test_a_packed_state_goes_on_exactly():
    sampler = PackedSampler(*documents(), 8, seed=2)
    for _ in range(13):
        sampler.next_batch(6)
    state = sampler.state_dict()
    expected = [sampler.next_batch(6)[0] for _ in range(30)]
    other = PackedSampler(*documents(), 8, seed=2)
    other.load_state_dict(state)
    for batch in expected:
        (again,) = other.next_batch(6)
        assert all((one == two).all() for one, two in zip(batch, again, strict=True))


def test_wrong_documents_and_states_are_named():
    tokens, offsets = documents()
    with pytest.raises(
        DataError, match=r"at least length = 190 predictions, got 189 in 11 of them; take a longer text"
    ):
        PackedSampler(tokens, offsets, 190, seed=0)
    with pytest.raises(ConfigError, match="wanted length >= 1, got 0"):
        PackedSampler(tokens, offsets, 0, seed=0)
    for wrong in (offsets[:-1], offsets[1:], offsets[::-1], [0]):
        with pytest.raises(DataError, match="wanted offsets that rise from 0 to the number of ids, 200"):
            PackedSampler(tokens, wrong, 8, seed=0)
    packed, plain = PackedSampler(tokens, offsets, 8, seed=0), WindowSampler(tokens, 8, seed=0)
    with pytest.raises(DataError, match=r"predictions = 189, got None; resume with the same data, data.packing"):
        packed.load_state_dict(plain.state_dict())
    with pytest.raises(DataError, match=r"predictions = None, got 189"):
        plain.load_state_dict(packed.state_dict())
    with pytest.raises(DataError, match=r"predictions = 189, got 190"):
        packed.load_state_dict(PackedSampler(tokens, [0, *offsets[2:]], 8, seed=0).state_dict())


def test_rows_of_lanes_go_on_where_they_ended():
    count, length, rows = 1000, 7, 4
    sampler = LaneSampler(np.arange(count, dtype=np.uint16), length, rows, seed=3)
    assert sampler.windows_per_epoch == 999 // 28 * 4
    batches = [sampler.next_batch(rows) for _ in range(sampler.windows_per_epoch)]  # so many passes as there are rows
    assert sampler.epoch == rows
    for row in range(rows):
        firsts = np.array([batch[row, 0] for batch in batches])
        assert ((np.diff(firsts) == length) | (np.diff(firsts) < 0)).all()
        assert (np.diff(firsts) < 0).sum() <= 1, "one break in a pass through the whole"
    epoch = np.concatenate([batch[:, 1:].ravel() for batch in batches[: sampler.windows_per_epoch // rows]])
    assert len(set(epoch.tolist())) == epoch.size == sampler.windows_per_epoch * length


def test_ranks_share_lanes_and_a_saved_place_goes_on():
    ids = np.arange(500)
    one = LaneSampler(ids, 9, 6, seed=1)
    halves = [LaneSampler(ids, 9, 6, seed=1, rank=rank, world=2) for rank in range(2)]
    for _ in range(4):
        whole = one.next_batch(6)
        assert (np.concatenate([half.next_batch(3) for half in halves]) == whole).all()
    again = LaneSampler(ids, 9, 6, seed=1)
    again.load_state_dict(one.state_dict())
    assert (again.next_batch(6) == one.next_batch(6)).all()
    assert {int(LaneSampler(ids, 9, 6, seed=seed).next_batch(6)[0, 0]) for seed in range(20)} > {0}
    with pytest.raises(DataError, match="saved with rows = 5"):
        LaneSampler(ids, 9, 5, seed=1).load_state_dict(one.state_dict())
    with pytest.raises(ConfigError, match="wanted batches of 6 / 1 rows, got 4"):
        one.next_batch(4)
    with pytest.raises(DataError, match="at least 6 rows x length 100"):
        LaneSampler(ids, 100, 6, seed=1)
    with pytest.raises(ConfigError, match="length and rows >= 1"):
        LaneSampler(ids, 9, 0, seed=1)


def test_mixed_lengths_predict_an_id_once_an_epoch_and_each_length_as_many():
    count, length, rows = 1700, 16, 3
    sampler = MixedLengthSampler(np.arange(count, dtype=np.uint16), length, 4, rows, seed=3)
    assert sampler.lengths == [4, 8, 16]
    updates = sampler.windows_per_epoch // rows
    assert updates == ((count - 1) // length - 1) // rows == 35
    epochs, orders = [], []
    for _ in range(3):
        batches = [sampler.next_batch(rows) for _ in range(updates)]
        assert all(batch.shape == (rows * length // (batch.shape[1] - 1), batch.shape[1]) for batch in batches)
        assert all((np.diff(batch) == 1).all() for batch in batches), "a window is a piece of the text"
        targets = np.concatenate([batch[:, 1:].ravel() for batch in batches])
        assert len(set(targets.tolist())) == targets.size == updates * rows * length
        orders.append([len(batch[0]) - 1 for batch in batches])
        shares = [orders[-1].count(size) for size in sampler.lengths]
        assert sum(shares) == updates
        assert max(shares) - min(shares) <= 1
        epochs.append(batches)
    assert sampler.epoch == 3
    assert orders[0] != orders[1], "each epoch has an order of its own"
    assert orders[0] != sorted(orders[0])
    # Short windows of a batch are from all over the text, not the pieces of a few long ones.
    firsts = [batch[:, 0] for batch in epochs[0] if batch.shape[1] == 5]
    assert np.mean([np.isin(first + 4, first).mean() for first in firsts]) < 0.25
    assert np.median([np.ptp(first) for first in firsts]) > count / 2
    starts = [{int(row[0]) for batch in batches for row in batch if len(row) == 5} for batches in epochs]
    assert len(starts[0] & starts[1]) < len(starts[0]) / 2


def test_ranks_share_mixed_lengths_and_a_saved_place_goes_on():
    ids = np.arange(500)
    one = MixedLengthSampler(ids, 8, 2, 4, seed=1)
    halves = [MixedLengthSampler(ids, 8, 2, 4, seed=1, rank=rank, world=2) for rank in range(2)]
    for _ in range(20):
        again = MixedLengthSampler(ids, 8, 2, 4, seed=1)
        again.load_state_dict(one.state_dict())
        whole = one.next_batch(4)
        assert (np.concatenate([half.next_batch(2) for half in halves]) == whole).all()
        assert (again.next_batch(4) == whole).all()
    other = MixedLengthSampler(ids, 8, 2, 4, seed=2)
    other.position = one.position
    assert not np.array_equal(other.next_batch(4), one.next_batch(4))
    with pytest.raises(DataError, match="saved with shortest_length = 4, got 2"):
        MixedLengthSampler(ids, 8, 4, 4, seed=1).load_state_dict(one.state_dict())
    with pytest.raises(DataError, match="saved with rows = 3, got 4"):
        MixedLengthSampler(ids, 8, 2, 3, seed=1).load_state_dict(one.state_dict())
    with pytest.raises(DataError, match="saved with shortest_length = None"):
        WindowSampler(ids, 8, seed=1).load_state_dict(one.state_dict())
    with pytest.raises(ConfigError, match="wanted batches of 4 / 1 windows, got 2"):
        one.next_batch(2)
    for shortest, rows in ((3, 4), (0, 4), (16, 4), (2, 0)):
        with pytest.raises(ConfigError, match=rf"doubles up to length = 8, got {rows} and {shortest}; e.g. 2"):
            MixedLengthSampler(ids, 8, shortest, rows, seed=1)
    with pytest.raises(DataError, match=r"of 25 x 8 ids for each of the lengths \[2, 4, 8\], got 500 ids"):
        MixedLengthSampler(ids, 8, 2, 25, seed=1)
