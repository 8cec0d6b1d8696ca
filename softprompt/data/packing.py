"""Packing: which example stands in which row of which step, planned for a whole epoch.

A step has exactly B examples in exactly R rows of T tokens, so that its arrays have one shape and
compile once. All of that follows from the lengths of the data and never from a seed: lengths are
put into narrow buckets, every step is given places (a bucket and a row), and a seed only chooses
which example of a bucket takes which of its places, and the order of the steps. What fits for one
seed therefore fits for all.

Source: the project's own design; the heuristics are longest-processing-time (Graham 1969, with a
cap on the number of items a step) and best-fit decreasing (Johnson 1974).
"""

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# The search for a row length stops at this mean fill: shorter rows make attention cheaper.
TARGET_FILL = 0.95
QUANTA = 20  # buckets in the mean length
TRIES = 20  # orders in which a step is packed before a row length is given up


@dataclass(frozen=True)
class RowShape:
    """The shape of a packed step: R rows, T tokens in a row, and M target positions in a row.

    `examples`: the most that stand in a row.
    """

    rows: int
    tokens: int
    targets: int
    examples: int = 0


@dataclass(frozen=True)
class Plan:
    """An epoch: the example at each of the B places of each of S steps, and the place's row."""

    examples_SB: np.ndarray
    rows_SB: np.ndarray


@dataclass(frozen=True)
class Template:
    """The part of the packing that does not depend on epoch or seed.

    Attributes:
        shape: rows, tokens and targets of every step.
        bucket_N: the bucket of each example, by its length.
        slot_SB: for each place, an index into the examples sorted by bucket, shuffled within each.
        rows_SB: the row of each place.
    """

    shape: RowShape
    bucket_N: np.ndarray
    slot_SB: np.ndarray
    rows_SB: np.ndarray

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.slot_SB)

    @property
    def examples(self) -> int:
        """Examples in a step."""
        return self.slot_SB.shape[1]

    def epoch(self, seed: int, epoch: int) -> Plan:
        """The plan of one epoch, a pure function of (seed, epoch)."""
        random = np.random.default_rng([seed, epoch])
        order_N = np.lexsort((random.random(len(self.bucket_N)), self.bucket_N))
        order_S = np.argsort(random.random(self.steps), kind="stable")
        return Plan(order_N[self.slot_SB[order_S]], self.rows_SB[order_S])


def plan_template(
    lengths: np.ndarray, target_lengths: np.ndarray, *, examples: int, multiple: int = 8
) -> Template:
    """Plans the steps of an epoch from the lengths alone.

    Where `examples` does not divide the number of examples, the last places are filled by a second
    use of examples spread evenly over the order of lengths; which of a bucket's examples are used
    twice changes with the epoch. An example stands twice in one step only where there are fewer
    examples than places in a step.

    Args:
        lengths: tokens that each example takes in a row, [N].
        target_lengths: target tokens of each example, [N].
        examples: B, the number of examples in every step.
        multiple: T is a multiple of this.
    """
    lengths, target_lengths = np.asarray(lengths), np.asarray(target_lengths)
    assert len(lengths) == len(target_lengths) > 0 and examples > 0 and lengths.min() > 0
    quantum = max(1, int(lengths.mean()) // QUANTA)
    _, bucket_N = np.unique(-(-lengths // quantum), return_inverse=True)
    size_of, targets_of = _largest(bucket_N, lengths), _largest(bucket_N, target_lengths)
    ranks = _ranks(len(lengths), examples)
    order = np.argsort(lengths, kind="stable")
    bucket_SB = _deal(bucket_N[order][ranks][::-1], size_of, examples)
    _separate_repeats(bucket_SB, np.bincount(bucket_N))
    bucket_SB = -np.sort(-bucket_SB, axis=1)
    used = lengths[order][ranks].sum() / len(bucket_SB)
    tokens, rows_SB = choose_rows(size_of[bucket_SB], used=used, multiple=multiple)
    rows = int(rows_SB.max()) + 1
    targets_SR = np.zeros((len(bucket_SB), rows), np.int64)
    examples_SR = np.zeros_like(targets_SR)
    where = np.arange(len(bucket_SB))[:, None], rows_SB
    np.add.at(targets_SR, where, targets_of[bucket_SB])
    np.add.at(examples_SR, where, 1)
    shape = RowShape(rows, tokens, int(targets_SR.max()), int(examples_SR.max()))
    return Template(shape, bucket_N, _slots(bucket_SB, np.bincount(bucket_N)), rows_SB)


def choose_rows(sizes_SB: np.ndarray, *, used: float, multiple: int) -> tuple[int, np.ndarray]:
    """Chooses the row length and packs every step into equally many rows.

    Lengths are tried upwards, in steps of `multiple`, from the longest place: the first that fills
    TARGET_FILL is taken, otherwise the one that fills most. The search ends where a step fits in
    one row, or at 1024 tokens or four times the longest place, whichever is more: beyond that
    attention costs more than the padding it would save.

    Args:
        sizes_SB: the room that each place needs, descending within a step.
        used: tokens that the examples of a step really have, on average.
        multiple: the row length is a multiple of this.

    Returns:
        T, and the row of each place.
    """
    longest = _round_up(int(sizes_SB.max()), multiple)
    last = _round_up(int(sizes_SB.sum(axis=1).max()), multiple)
    last = min(last, max(1024 // multiple * multiple, 4 * longest))
    # The fullest steps come first, so that too few rows fail early.
    fullest = np.argsort(-sizes_SB.sum(axis=1), kind="stable")
    steps = sizes_SB[fullest].tolist()
    best_fill, tokens, packed = 0.0, longest, steps
    for candidate in range(longest, last + 1, multiple):
        below = math.ceil(used / (best_fill * candidate)) if best_fill else 1 + len(steps[0])
        rows = _pack_steps(steps, candidate, below)
        if rows is not None:
            best_fill = used / (candidate * (1 + max(map(max, rows))))
            tokens, packed = candidate, rows
            if best_fill >= TARGET_FILL:
                break
    rows_SB = np.empty(sizes_SB.shape, np.int64)
    rows_SB[fullest] = packed
    return tokens, rows_SB


def best_fit(sizes: Iterable[int], capacity: int) -> list[int]:
    """Puts each item, in the order given, into the fullest row that still has room for it.

    Descending sizes, none above `capacity`, pack best.

    Returns:
        The row of each item; rows are numbered in the order in which they are opened.
    """
    rows, opened = [], 0
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit k is set where some row has k left
    for size in sizes:
        assert size <= capacity, f"an item of size {size} does not fit in a row of {capacity}"
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row, opened = capacity, opened, opened + 1
        with_room.setdefault(room - size, []).append(row)
        rooms |= 1 << (room - size)
        rows.append(row)
    return rows


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _largest(bucket_N: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """The largest value in each bucket."""
    largest = np.zeros(bucket_N.max() + 1, np.int64)
    np.maximum.at(largest, bucket_N, values_N)
    return largest


def _ranks(count: int, examples: int) -> np.ndarray:
    """Ranks in the order of lengths that take an epoch's places: all, some twice to fill up."""
    spare = -count % examples
    again = (np.arange(spare) * 2 + 1) * count // max(1, 2 * spare)
    return np.sort(np.concatenate([np.arange(count), again]))


def _deal(buckets: np.ndarray, size_of: np.ndarray, examples: int) -> np.ndarray:
    """Deals places (their buckets, longest first), each to the step with the least load and room.

    A step's load counts the shortest size for each place still empty, so that a step with one very
    long example keeps room for the short ones that must join it.
    """
    steps: list[list[int]] = [[] for _ in range(len(buckets) // examples)]
    loads = [(0, step) for step in range(len(steps))]
    extra = (size_of[buckets] - size_of.min()).tolist()
    for bucket, more in zip(buckets.tolist(), extra, strict=True):
        load, step = loads[0]
        steps[step].append(bucket)
        if len(steps[step]) < examples:
            heapq.heapreplace(loads, (load + more, step))
        else:
            heapq.heappop(loads)
    return np.array(steps, np.int64)


def _separate_repeats(bucket_SB: np.ndarray, members: np.ndarray) -> None:
    """Swaps places until no step has more places of a bucket than it has examples (in place).

    A partner always exists: a bucket has at most twice as many places as examples, so that every
    other step has fewer places of it than examples, and not all of that step's other buckets can
    be exhausted here.
    """
    if len(bucket_SB) == 1 or bucket_SB.size == members.sum():
        return
    counts = np.zeros((len(bucket_SB), len(members)), np.int32)
    np.add.at(counts, (np.arange(len(bucket_SB))[:, None], bucket_SB), 1)
    for step, bucket in np.argwhere(counts > members):
        while counts[step, bucket] > members[bucket]:
            free_S = counts[:, bucket] < members[bucket]
            fits_SB = free_S[:, None] & (counts[step] < members)[bucket_SB]
            distance_SB = np.where(fits_SB, abs(bucket_SB - bucket), len(members))
            other, place = np.unravel_index(distance_SB.argmin(), distance_SB.shape)
            swapped = bucket_SB[other, place]
            bucket_SB[other, place] = bucket
            bucket_SB[step, np.flatnonzero(bucket_SB[step] == bucket)[0]] = swapped
            counts[[step, other], bucket] += [-1, 1]
            counts[[step, other], swapped] += [1, -1]


def _slots(bucket_SB: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Numbers each bucket's places cyclically through its examples.

    A step's places of a bucket are neighbours in this order, so that they take different examples.
    """
    flat = bucket_SB.ravel()
    order = np.argsort(flat, kind="stable")
    places = np.bincount(flat, minlength=len(members))
    nth = np.arange(len(flat)) - np.repeat(np.cumsum(places) - places, places)
    slots = np.empty(len(flat), np.int64)
    slots[order] = (np.cumsum(members) - members)[flat[order]] + nth % members[flat[order]]
    return slots.reshape(bucket_SB.shape)


def _pack_steps(steps: list[list[int]], tokens: int, below: int) -> list[list[int]] | None:
    """Packs all steps (the fullest first) into as few rows as serve all, and fewer than `below`."""
    fewest = max(math.ceil(sum(steps[0]) / tokens), max(best_fit(steps[0], tokens)))
    for most in range(fewest, below):
        packed = []
        for sizes in steps:
            rows = _pack(sizes, tokens, most)
            if rows is None:
                break
            packed.append(rows)
        else:
            return packed
    return None


def _pack(sizes: list[int], tokens: int, most: int) -> list[int] | None:
    """Best fit, again and again with the items that found no room put first; None if all fail."""
    order = list(range(len(sizes)))
    for _ in range(TRIES):
        rows = best_fit([sizes[item] for item in order], tokens)
        if max(rows) < most:
            return [row for _, row in sorted(zip(order, rows, strict=True))]
        unplaced = [item for item, row in zip(order, rows, strict=True) if row >= most]
        order = unplaced + [item for item in order if item not in unplaced]
    return None
