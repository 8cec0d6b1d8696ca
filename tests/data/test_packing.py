"""The epoch plan. Each test names the mutation of `softprompt.data.packing` that breaks it."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.data.packing import Plan, Template, best_fit, choose_rows, plan_template

# Lengths in tokens at 0, 5, ..., 100 % of real splits (template included, cut at 256).
QUANTILES = {
    "movie snippets": "8 13 15 17 19 21 23 25 28 30 33 35 38 41 43 46 48 51 55 59 69",
    "BoolQ": "37 74 84 92 99 106 112 119 125 132 140 150 160 172 184 200 221 250 256 256 256",
    "SMS": "9 13 14 15 15 16 17 17 18 20 22 24 27 32 36 40 43 45 46 53 225",
}


def lengths_like(name: str, count: int) -> np.ndarray:
    quantiles = np.array(QUANTILES[name].split(), float)
    at = np.random.default_rng(0).random(count) * (len(quantiles) - 1)
    return np.interp(at, np.arange(len(quantiles)), quantiles).astype(int)


def targets_like(lengths: np.ndarray) -> np.ndarray:
    return 1 + np.arange(len(lengths)) % 3 * (lengths > 4)


def check_fits(template: Template, plan: Plan, lengths: np.ndarray, targets: np.ndarray) -> None:
    shape = template.shape
    for examples_B, rows_B in zip(plan.examples_SB, plan.rows_SB, strict=True):
        assert rows_B.min() >= 0
        used_R = np.bincount(rows_B, lengths[examples_B], minlength=shape.rows)
        targets_R = np.bincount(rows_B, targets[examples_B], minlength=shape.rows)
        assert len(used_R) == shape.rows and used_R.max() <= shape.tokens
        assert targets_R.max() <= shape.targets


def fill(template: Template, plan: Plan, lengths: np.ndarray) -> float:
    shape = template.shape
    return lengths[plan.examples_SB].sum(axis=1).mean() / (shape.rows * shape.tokens)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 40), st.integers(1, 400)), min_size=1, max_size=70),
    st.integers(1, 24),
    st.integers(0, 3),
)
def test_any_lengths_give_full_steps_that_hold_every_example(lengths, examples, seed):
    # Mutations: capacity from the bucket's mean length; M from each example's own target;
    # _slots without `% members`; _separate_repeats removed.
    lengths = np.array(lengths)
    targets = targets_like(lengths)
    template = plan_template(lengths, targets, examples=examples)
    plan = template.epoch(seed, 0)
    check_fits(template, plan, lengths, targets)
    assert plan.examples_SB.shape == (-(-len(lengths) // examples), examples)
    uses_N = np.bincount(plan.examples_SB.ravel(), minlength=len(lengths))
    assert uses_N.min() >= 1
    if len(lengths) >= examples:
        assert (uses_N == 2).sum() == -len(lengths) % examples and uses_N.max() <= 2
        assert all(len(set(step)) == examples for step in plan.examples_SB.tolist())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=3, max_size=12), st.data())
def test_an_example_used_twice_is_never_twice_in_one_step(lengths, data):
    # Mutation: _separate_repeats removed (few lengths: buckets of one member are dealt twice).
    examples = data.draw(st.integers(2, len(lengths) - 1))
    lengths = np.array(lengths) * 100
    plan = plan_template(lengths, lengths, examples=examples).epoch(0, 0)
    assert all(len(set(step)) == examples for step in plan.examples_SB.tolist())


@pytest.mark.parametrize("name", QUANTILES)
def test_twenty_seeds_share_shape_and_profile(name):
    # Mutation: shuffle all examples in `epoch`, not only those of a bucket.
    lengths = lengths_like(name, 1003)
    targets = targets_like(lengths)
    template = plan_template(lengths, targets, examples=16)
    profiles = set()
    for seed in range(20):
        plan = template.epoch(seed, seed)
        check_fits(template, plan, lengths, targets)
        profiles.add(tuple(sorted(map(tuple, template.bucket_N[plan.examples_SB].tolist()))))
    assert len(profiles) == 1


def test_the_plan_is_a_function_of_seed_and_epoch():
    # Mutations: ignore the epoch; ignore the seed; use seed + epoch; keep the order of steps.
    template = plan_template(lengths_like("movie snippets", 200), np.ones(200), examples=8)
    orders = [template.epoch(*at).examples_SB for at in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert np.array_equal(orders[0], template.epoch(0, 0).examples_SB)
    for first in range(4):
        assert not any(np.array_equal(orders[first], other) for other in orders[first + 1 :])
    profiles = [template.bucket_N[order].tolist() for order in orders]
    assert profiles[0] != profiles[1]


def test_an_example_meets_new_companions():
    # Mutation: rank examples by length inside a bucket instead of shuffling them.
    template = plan_template(lengths_like("movie snippets", 2000), np.ones(2000), examples=16)
    met = set()
    for epoch in range(5):
        order_SB = template.epoch(0, epoch).examples_SB
        met |= set(order_SB[(order_SB == 7).any(axis=1)].ravel().tolist())
    assert len(met) > 60  # of at most 76


@pytest.mark.parametrize("examples", [16, 32])
@pytest.mark.parametrize(
    ("name", "count", "least"),
    [
        ("movie snippets", 8000, 0.95),
        ("movie snippets", 500, 0.95),
        ("BoolQ", 3270, 0.9),
        ("BoolQ", 500, 0.9),
        ("SMS", 5000, 0.9),
    ],
)
def test_rows_are_full(name, count, least, examples):
    # Mutations: deal round robin; pack first come first served; T always the longest example.
    lengths = lengths_like(name, count)
    template = plan_template(lengths, np.ones(count), examples=examples)
    assert min(fill(template, template.epoch(seed, 0), lengths) for seed in range(3)) >= least


def test_the_shortest_row_that_fills_enough_is_taken():
    # Mutation: search for the best fill (one row of 640 here, which is completely full).
    lengths = np.full(64, 39)
    template = plan_template(lengths, np.ones(64), examples=16)
    assert (template.shape.rows, template.shape.tokens) == (16, 40)
    assert template.shape.targets == 1


def test_a_step_that_best_fit_decreasing_cannot_pack_is_tried_again():
    # Mutation: TRIES = 1 (best-fit decreasing needs three rows: 72 + 48, 64 + 40 + 16, 16).
    sizes_SB = np.array([[72, 64, 48, 40, 16, 16]])
    tokens, rows_SB = choose_rows(sizes_SB, used=256, multiple=128)
    assert tokens == 128
    assert np.bincount(rows_SB[0], sizes_SB[0]).tolist() == [128, 128]


def test_a_step_with_a_long_example_keeps_room_for_the_others():
    # Mutation: a step's load counts nothing for its empty places (the fullest has 8 % too much).
    lengths = np.concatenate([np.full(10, 225), np.linspace(10, 50, 1590).astype(int)])
    template = plan_template(lengths, np.ones(1600), examples=16)
    plan = template.epoch(0, 0)
    check_fits(template, plan, lengths, np.ones(1600))
    totals_S = lengths[plan.examples_SB].sum(axis=1)
    assert totals_S.max() <= 1.03 * totals_S.mean()


@pytest.mark.parametrize(("count", "examples"), [(1, 1), (1, 8), (3, 8), (8, 8), (7, 1)])
def test_few_examples(count, examples):
    # Mutation: assert N >= B, or leave places empty.
    lengths = np.arange(1, count + 1) * 11
    template = plan_template(lengths, np.ones(count), examples=examples)
    plan = template.epoch(3, 4)
    check_fits(template, plan, lengths, np.ones(count))
    uses_N = np.bincount(plan.examples_SB.ravel(), minlength=count)
    assert uses_N.sum() % examples == 0 and uses_N.max() - uses_N.min() <= 1


def test_a_hundred_thousand_examples_are_planned_in_seconds():
    # Mutation: scan all steps for the lightest instead of keeping a heap (minutes).
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 0.6, 100_000), 8, 512).astype(int)
    start = time.monotonic()
    template = plan_template(lengths, np.ones(len(lengths)), examples=16)
    template.epoch(0, 0)
    assert time.monotonic() - start < 15  # half a second on a quiet machine


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_best_fit_takes_the_fullest_row_with_room(sizes):
    # Mutations: take the emptiest row; forget to clear the bit of a room that is used up.
    rooms: list[int] = []
    for size, row in zip(sizes, best_fit(sizes, 50), strict=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            assert rooms[row] == min(fitting)
        else:
            assert row == len(rooms)
            rooms.append(50)
        rooms[row] -= size


def test_what_does_not_fit_in_a_row_is_refused():
    # Breaks when an item is larger than a row and gets one nevertheless.
    with pytest.raises(AssertionError, match="size 8 .* row of 7"):
        best_fit([3, 8], 7)
