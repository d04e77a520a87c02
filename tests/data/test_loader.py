from itertools import chain

import pytest
import torch

from calib_lightning.data import Compose, CropFlip, InMemorySet, Normalize, ResumableLoader, loader
from calib_lightning.types import Batch


def make_set(rows, transform=None):
    image = torch.randint(0, 256, (rows, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    return InMemorySet(image, torch.arange(rows) % 3, 10 * torch.arange(rows), transform)


def indices(batches):
    return [batch.index.tolist() for batch in batches]


def flat(batches):
    return list(chain.from_iterable(batches))


@pytest.fixture
def as_rank(monkeypatch):
    """Pretend to be one of several processes."""

    def pretend(rank, world):
        monkeypatch.setattr(loader, "_world", lambda: (rank, world))

    return pretend


def test_fetch_reads_and_transforms_the_rows():
    data = make_set(9, Normalize((0.5,), (0.25,)))
    batch = data.fetch(torch.tensor([4, 2]), epoch=0)
    assert isinstance(batch, Batch)
    assert batch.index.tolist() == [4, 2]
    assert batch.label.tolist() == [1, 2]
    torch.testing.assert_close(batch.image, (data.image[[4, 2]].float() / 255 - 0.5) / 0.25)
    assert data.rows[batch.index].tolist() == [40, 20]
    assert torch.equal(make_set(9).fetch(torch.tensor([4]), 0).image, data.image[4:5])


def test_without_shuffling_rows_come_in_order():
    assert indices(ResumableLoader(make_set(5), 2, shuffle=False, seed=0)) == [[0, 1], [2, 3], [4]]
    dropped = ResumableLoader(make_set(5), 2, shuffle=False, seed=0, drop_last=True)
    assert indices(dropped) == [[0, 1], [2, 3]]
    assert len(dropped) == 2


def test_order_depends_on_seed_and_epoch_only():
    one = ResumableLoader(make_set(30), 7, shuffle=True, seed=1)
    first = indices(one)
    assert indices(one) == first
    one.set_epoch(1)
    second = indices(one)
    assert second != first
    assert sorted(flat(second)) == list(range(30))
    other = ResumableLoader(make_set(30), 7, shuffle=True, seed=1)
    other.set_epoch(1)
    assert indices(other) == second
    assert indices(ResumableLoader(make_set(30), 7, shuffle=True, seed=2)) != first


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_and_equally_many_batches(as_rank, world, shuffle):
    for rows in range(1, 41):
        for batch_size in range(1, 7):
            ranks = []
            for rank in range(world):
                as_rank(rank, world)
                one = ResumableLoader(make_set(rows), batch_size, shuffle=shuffle, seed=3)
                ranks.append(indices(one))
                assert len(one) == len(ranks[-1])
            case = f"{rows} rows, batch {batch_size}, world {world}"
            assert sorted(flat(map(flat, ranks))) == list(range(rows)), case
            assert len({len(batches) for batches in ranks}) == 1, case
            sizes = [[len(batch) for batch in step] for step in zip(*ranks, strict=True)]
            assert all(step == [batch_size] * world for step in sizes[:-1]), case
            assert max(sizes[-1]) - min(sizes[-1]) <= 1, case
            assert max(sizes[-1]) <= batch_size + (2 if shuffle else 1), case
            assert min(sizes[-1]) >= 1 or rows < world, case
            if shuffle and batch_size > 1 and rows >= 2 * world:
                assert min(min(step) for step in sizes) >= 2, case


def test_fewer_rows_than_processes_gives_an_empty_batch_of_the_right_shape(as_rank):
    as_rank(2, 3)
    data = make_set(2, Compose(CropFlip(), Normalize((0.5,), (0.5,))))
    (batch,) = ResumableLoader(data, 4, shuffle=True, seed=0)
    assert batch.image.shape == (0, 1, 6, 6)
    assert batch.image.dtype == torch.float32
    assert batch.label.shape == batch.index.shape == (0,)


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_step_sees_the_same_rows_on_any_number_of_processes(as_rank, drop_last):
    steps = {}
    for world in (1, 2, 3, 4):
        ranks = []
        for rank in range(world):
            as_rank(rank, world)
            ranks.append(indices(ResumableLoader(make_set(44), 12 // world, shuffle=True, seed=5, drop_last=drop_last)))
        steps[world] = [sorted(flat(step)) for step in zip(*ranks, strict=True)]
    assert len(steps[1]) == (3 if drop_last else 4)
    assert steps[1] == steps[2] == steps[3] == steps[4]


def test_real_process_group_is_asked_when_batches_are_read(monkeypatch):
    one = ResumableLoader(make_set(8), 2, shuffle=False, seed=0)
    batches = iter(one)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert indices(batches) == [[1, 3], [5, 7]]
    assert len(one) == 2


def test_stop_and_go_on_sees_64_of_64_rows():
    whole = ResumableLoader(make_set(64), 4, shuffle=True, seed=7)
    whole.set_epoch(3)
    expected = indices(whole)
    for stop in range(1, 16):
        before = ResumableLoader(make_set(64), 4, shuffle=True, seed=7)
        before.set_epoch(3)
        batches = iter(before)
        seen = indices(next(batches) for _ in range(stop))
        state = before.state_dict()
        assert state == {"epoch": 3, "position": stop, "global_batch": 4}
        assert all(type(value) is int for value in state.values())
        after = ResumableLoader(make_set(64), 4, shuffle=True, seed=7)
        after.load_state_dict(state)
        after.set_epoch(3)
        assert after.state_dict() == state
        assert len(after) == 16
        seen += indices(after)
        assert seen == expected
        assert len(set(flat(seen))) == 64
        # only the pass after the load starts late
        assert indices(after) == expected


def test_going_on_under_several_processes(as_rank):
    seen = []
    for rank in range(3):
        as_rank(rank, 3)
        before = ResumableLoader(make_set(40), 4, shuffle=True, seed=7)
        seen += next(iter(before)).index.tolist()
        after = ResumableLoader(make_set(40), 4, shuffle=True, seed=7)
        after.load_state_dict({"epoch": 0, "position": 1})
        seen += flat(indices(after))
    assert sorted(seen) == list(range(40))


def test_epoch_and_state_count_even_if_they_come_after_iter():
    expected = ResumableLoader(make_set(20), 4, shuffle=True, seed=7)
    expected.set_epoch(2)
    late = ResumableLoader(make_set(20), 4, shuffle=True, seed=7)
    batches = iter(late)
    late.load_state_dict({"epoch": 2, "position": 3})
    late.set_epoch(2)
    assert indices(batches) == indices(expected)[3:]


@pytest.mark.parametrize("set_first", [True, False])
def test_position_of_another_epoch_is_ignored(set_first):
    one = ResumableLoader(make_set(20), 4, shuffle=True, seed=7)
    state = {"epoch": 2, "position": 3}
    if set_first:
        one.set_epoch(5)
        one.load_state_dict(state)
    else:
        one.load_state_dict(state)
        one.set_epoch(5)
    assert one.state_dict() == {"epoch": 5, "position": 0, "global_batch": one.batch_size}
    fresh = ResumableLoader(make_set(20), 4, shuffle=True, seed=7)
    fresh.set_epoch(5)
    assert indices(one) == indices(fresh)


def test_state_is_enough_where_nobody_sets_the_epoch():
    expected = ResumableLoader(make_set(20), 4, shuffle=True, seed=7)
    expected.set_epoch(2)
    one = ResumableLoader(make_set(20), 4, shuffle=True, seed=7)
    one.load_state_dict({"epoch": 2, "position": 3})
    assert indices(one) == indices(expected)[3:]
    assert one.state_dict() == {"epoch": 2, "position": 5, "global_batch": one.batch_size}


@pytest.mark.parametrize("epoch", [0, 1])
def test_state_of_a_finished_epoch_starts_from_the_first_batch(epoch):
    done = ResumableLoader(make_set(20), 4, shuffle=True, seed=7)
    assert len(list(done)) == 5
    state = done.state_dict()
    assert state == {"epoch": 0, "position": 5, "global_batch": 4}
    after = ResumableLoader(make_set(20), 4, shuffle=True, seed=7)
    after.load_state_dict(state)
    after.set_epoch(epoch)
    assert len(list(after)) == 5
    done.set_epoch(1)
    assert done.state_dict() == {"epoch": 1, "position": 0, "global_batch": done.batch_size}


def test_a_pass_that_was_broken_off_is_not_continued():
    one = ResumableLoader(make_set(20), 4, shuffle=True, seed=7)
    expected = indices(one)
    next(iter(one))
    assert indices(one) == expected


@pytest.mark.parametrize("stop", [0, 2])
def test_workers_change_no_bit(stop):
    transform = Compose(CropFlip(seed=1), Normalize((0.45,), (0.23,)))
    passes = []
    for num_workers in (0, 2):
        one = ResumableLoader(make_set(23, transform), 4, shuffle=True, seed=7, num_workers=num_workers)
        one.load_state_dict({"epoch": 4, "position": stop})
        batches = iter(one)
        head = next(batches)
        # workers fetch ahead; only what was handed out counts
        assert one.state_dict() == {"epoch": 4, "position": stop + 1, "global_batch": one.batch_size}
        passes.append([head, *batches])
    assert len(passes[0]) == 6 - stop
    for here, there in zip(*passes, strict=True):
        assert isinstance(there, Batch)
        for a, b in zip(here, there, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_augmentation_follows_row_and_epoch():
    transform = CropFlip(seed=1)
    data = make_set(23, transform)
    one = ResumableLoader(data, 4, shuffle=True, seed=7)
    one.set_epoch(6)
    for batch in one:
        assert torch.equal(batch.image, transform(data.image[batch.index], batch.index, 6))


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        list(ResumableLoader(make_set(9, CropFlip()), 4, shuffle=True, seed=7, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_lightning_finds_the_sampler():
    one = ResumableLoader(make_set(9), 4, shuffle=True, seed=7)
    assert one.sampler is one
    assert one.batch_sampler is None
    assert not hasattr(one, "dataset")


@pytest.mark.parametrize(
    ("rows", "changed", "message"),
    [
        (3, {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (3, {"num_workers": -1}, "num_workers is -1; it must be at least 0"),
        (0, {}, "The set has 0 rows"),
    ],
)
def test_bad_arguments(rows, changed, message):
    with pytest.raises(ValueError, match=message):
        ResumableLoader(make_set(rows), **({"batch_size": 2, "shuffle": True, "seed": 0} | changed))


def test_going_on_with_another_global_batch_is_refused(as_rank):
    as_rank(0, 1)
    state = {"epoch": 0, "position": 5, "global_batch": 16}
    other = ResumableLoader(make_set(300), 32, shuffle=True, seed=0)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"global batch size is 32 .* 5 batches of 16 rows"):
        next(iter(other))
    as_rank(1, 2)  # half the batch on twice as many processes is the same step
    same = ResumableLoader(make_set(300), 8, shuffle=True, seed=0)
    same.load_state_dict(state)
    assert len(indices(same)) == len(same) - 5
