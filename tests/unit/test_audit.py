"""The parts of an audit by themselves: checksums that add up, and whose fault a difference is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_circles import checksums
from ddp_circles.checksums import ENDINGS, OUT_OF_RANGE, Checksums, Layout, Published, checksum, judge, majority

NUMBERS = st.integers(-(2**63), 2**63 - 1)
GOOD, BAD, WORSE = 11, 12, 13
IN_RANGE = torch.tensor(True)


@settings(deadline=None)
@given(
    rows=st.integers(1, 40).flatmap(
        lambda width: st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1, max_size=5)
    ),
    first=st.integers(0, 2**40),
    data=st.data(),
)
def test_checksums_add_up_and_no_change_of_one_number_goes_unseen(
    rows: list[list[int]], first: int, data: st.DataObject
) -> None:
    numbers = torch.tensor(rows)
    each = checksum(numbers, first)
    assert checksum(numbers.sum(0), first) == each.sum()
    cut = data.draw(st.integers(0, numbers.shape[1]))
    assert torch.equal(checksum(numbers[:, :cut], first) + checksum(numbers[:, cut:], first + cut), each)
    row, column = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, numbers.shape[1] - 1))
    numbers[row, column] ^= data.draw(st.sampled_from([1 << bit for bit in range(63)]))
    assert ((checksum(numbers, first) != each).nonzero().view(-1) == row).all()
    assert checksum(numbers[row], first) != each[row]


def test_a_checksum_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randint(-(2**60), 2**60, (3, 1000), generator=torch.Generator().manual_seed(1))
    whole = checksum(numbers)
    monkeypatch.setattr(checksums, "BLOCK", 7)
    assert torch.equal(checksum(numbers), whole)
    assert torch.equal(checksum(numbers[:, :5].int()), checksum(numbers[:, :5].int().long()))


def test_neighbours_that_change_places_are_seen() -> None:
    numbers = torch.arange(100)
    for at in range(99):
        other = numbers.clone()
        other[at], other[at + 1] = numbers[at + 1], numbers[at]
        assert checksum(other) != checksum(numbers)


def rows_of(rows: dict[int, list[int]], layout: Layout) -> list[int]:
    """The sum of the rows that all ranks publish; `rows`: the integers of each micro-batch."""
    total = torch.zeros(layout.width, dtype=torch.int64)
    for rank in range(layout.ranks):
        own, watched = (
            [number for number in range(one, layout.micro_batches, layout.ranks) if number in rows]
            for one in (rank, layout.watched_by(rank))
        )
        notes = Checksums(layout, rank, own or [rank], watched or [layout.watched_by(rank)], torch.tensor([7]))
        notes.own = [checksum(torch.tensor([rows[number]])) for number in own[:-1]]  # the last is what is left
        notes.again = [checksum(torch.tensor([rows.get(number, [0])])) for number in watched or [-1]]
        if own:
            notes.sent += checksum(torch.tensor([rows[number] for number in own]).sum(0))
        row = notes.row(IN_RANGE)
        assert len(row) == notes.width
        total += row
    numbers: list[int] = total.tolist()
    return numbers


@pytest.mark.parametrize("sizes", [(1, 8, 0), (2, 8, 1), (3, 8, 1), (3, 8, 2), (4, 5, 3), (5, 3, 2)])
def test_each_micro_batch_is_published_by_its_owner_and_by_another_rank(sizes: tuple[int, int, int]) -> None:
    layout = Layout(*sizes)
    ranks, count, _ = sizes
    generator = torch.Generator().manual_seed(1)
    rows = {number: torch.randint(-(2**50), 2**50, (9,), generator=generator).tolist() for number in range(count)}
    del rows[count // 2]  # one holds no sample
    found = Published.from_row(layout, rows_of(rows, layout))
    expected = [checksum(torch.tensor(rows[number])).item() if number in rows else 0 for number in range(count)]
    assert found.own[:count] == found.again[:count] == expected
    assert found.own[count:] == found.again[count:] == [0] * (max(ranks, count) - count)
    assert (found.weights, found.disputed, found.diverged) == ([7] * ranks, [], False)
    total = torch.tensor(list(rows.values())).sum(0)
    received = [checksum(total[:4]), checksum(total[4:], 4)]
    assert found.arrived([int(part) for part in received])
    assert not found.arrived([int(received[0]) ^ 1, int(received[1])])


@pytest.mark.parametrize("layout", [Layout(3, 8, 1), Layout(3, 8, 2), Layout(4, 2, 3), Layout(1, 8, 0)])
def test_the_parties_of_a_micro_batch_are_its_owner_and_who_watches_it(layout: Layout) -> None:
    for number in range(layout.places):
        owner, watcher = layout.parties(number)
        assert owner == number % layout.ranks
        assert layout.watched_by(watcher) == owner
        assert (owner == watcher) == (layout.ranks == 1)


def test_what_is_out_of_range_by_the_word_of_two_ranks_has_diverged() -> None:
    layout = Layout(2, 2, 1)
    assert Published(layout, [OUT_OF_RANGE, 5], [OUT_OF_RANGE, 6], [7, 7]).diverged
    assert not Published(layout, [OUT_OF_RANGE, 5], [4, 5], [7, 7]).diverged
    notes = Checksums(Layout(1, 1, 0), 0, [0], [0], torch.tensor([7]))
    notes.again = [torch.tensor([9])]
    assert notes.row(torch.tensor(False)).tolist() == [OUT_OF_RANGE, 9, 7]


@pytest.mark.parametrize(
    ("own", "again", "third", "accused"),
    [
        # micro-batch 0, which rank 0 owns and rank 2 recomputes
        (BAD, GOOD, [GOOD, GOOD, GOOD], {0: "passes"}),
        (BAD, GOOD, [BAD, GOOD, GOOD], {0: "lasts"}),
        (GOOD, BAD, [GOOD, GOOD, GOOD], {2: "passes"}),
        (GOOD, BAD, [GOOD, GOOD, BAD], {2: "lasts"}),
        (BAD, GOOD, [GOOD, BAD, GOOD], {0: "passes", 1: "to settle"}),
        (BAD, WORSE, [GOOD, GOOD, GOOD], {0: "passes", 2: "passes"}),
        (BAD, GOOD, [BAD, WORSE, GOOD], {}),  # no two agree, and nobody contradicts itself
        (BAD, GOOD, [WORSE, BAD, GOOD], {0: "twice"}),
        # two ranks
        (BAD, GOOD, [GOOD, GOOD], {0: "passes"}),
        (GOOD, BAD, [GOOD, GOOD], {1: "passes"}),
        (BAD, GOOD, [BAD, GOOD], {}),
        (BAD, GOOD, [WORSE, GOOD], {0: "twice"}),
        # one
        (BAD, GOOD, [GOOD], {0: "twice"}),
        (GOOD, BAD, [GOOD], {0: "twice"}),
    ],
)
def test_the_rank_that_is_alone_or_contradicts_itself_is_at_fault(
    own: int, again: int, third: list[int], accused: dict[int, str]
) -> None:
    layout = Layout(len(third), 1, min(1, len(third) - 1))
    found = judge(Published(layout, [own], [again], [7] * len(third)), [[answer] for answer in third])
    assert found.keys() == accused.keys()
    assert all(accused[rank] in found[rank] for rank in found)


def test_all_micro_batches_in_dispute_are_named_and_only_those() -> None:
    found = judge(Published(Layout(3, 4, 1), [BAD, GOOD, GOOD, BAD], [GOOD] * 4, [7] * 3), [[GOOD, GOOD]] * 3)
    assert found == {0: f"computed micro-batches 0, 3 {ENDINGS[2]}"}
    found = judge(Published(Layout(3, 2, 1), [GOOD, GOOD, BAD], [GOOD, GOOD, 0], [7] * 3), [[0]] * 3)
    assert found == {2: f"computed what it must not add {ENDINGS[2]}"}


@given(st.lists(st.integers(0, 3), min_size=1))
def test_a_majority_is_more_than_half(values: list[int]) -> None:
    found = majority(values)
    counts = {value: values.count(value) for value in values}
    assert (found is not None) == any(2 * count > len(values) for count in counts.values())
    assert found is None or 2 * counts[found] > len(values)
