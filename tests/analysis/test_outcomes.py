"""Outcomes of A/B aliases: what is appended, and how arms are compared."""

import numpy as np
import pytest
from scipy import stats

from softprompt import cli
from softprompt.analysis.outcomes import FILE, append_outcome, compare_arms, read_outcomes
from softprompt.errors import UserError


def outcome(arm, value, user="", alias="best"):
    return {"alias": alias, "arm": arm, "baseline": "short", "user": user, "value": value}


def test_shares_have_wilsons_interval_and_newcombes_difference():
    """Breaks when limits are combined by adding them: `below = distance + distance`.

    The numbers are those of Newcombe 1998, "Interval estimation for the difference between
    independent proportions", Table II, method 10: 56/70 and 48/80.
    """
    found = [outcome("long", float(n < 56)) for n in range(70)]
    found += [outcome("short", float(n < 48)) for n in range(80)]
    short, long = compare_arms(found).to_dict("records")
    assert (short["arm"], short["n"], short["difference"]) == ("short", 80, None)
    assert long["difference"] == pytest.approx(0.2)
    limits = long["difference low"], long["difference high"]
    assert limits == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_numbers_have_students_interval():
    """Breaks when the normal quantile stands for Student's, or the spread is the population's."""
    values = [1.0, 2.5, 4.0, 4.5]
    (line,) = compare_arms([outcome("short", value) for value in values]).to_dict("records")
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (line["low"], line["high"]) == pytest.approx((theirs.low, theirs.high))
    (line,) = compare_arms([outcome("short", 2.5)]).to_dict("records")
    assert (line["mean"], line["low"]) == (2.5, None)


def test_a_user_is_one_observation():
    """Breaks when each outcome counts: one user with many would narrow the interval."""
    found = [outcome("short", 1.0, user="ann") for _ in range(50)]
    found += [outcome("short", 0.0, user=user) for user in ("bob", "eve")]
    (line,) = compare_arms(found).to_dict("records")
    assert (line["n"], line["users"]) == (52, 3)
    assert line["mean"] == pytest.approx(1 / 3)


def test_aliases_are_compared_apart():
    """Breaks when arms of the same name are joined over aliases."""
    found = [outcome("short", 1.0, alias=alias) for alias in ("best", "other", "other")]
    assert list(compare_arms(found)["n"]) == [1, 2]


def test_what_is_appended_is_read_and_printed(tmp_path, capsys):
    """Breaks when users are kept by name, or `softprompt table` needs trials beside outcomes."""
    rng = np.random.default_rng(0)
    for number in range(40):
        arm = ("short", "long")[number % 2]
        append_outcome(tmp_path, outcome(arm, int(rng.integers(2)), user=f"user {number}"))
    read = read_outcomes(tmp_path)
    assert [one["arm"] for one in read] == ["short", "long"] * 20
    assert len({one["user"] for one in read}) == 40
    assert "user 3" not in (tmp_path / FILE).read_text()
    assert cli.main(["table", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert [name in table for name in ("short", "long", "difference")] == [True] * 3


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"alias": "a"}', "nonsense", "null"])
def test_a_broken_line_is_named(tmp_path, line):
    """Breaks when a line that is cut is skipped, or is a traceback."""
    append_outcome(tmp_path, outcome("short", 1))
    with open(tmp_path / FILE, "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match="line 2"):
        read_outcomes(tmp_path)


def test_a_folder_without_outcomes_has_none(tmp_path):
    """Breaks when a missing file is an error, or a folder that cannot be written is a traceback."""
    assert read_outcomes(tmp_path) == []
    with pytest.raises(UserError, match="cannot write"):
        append_outcome(tmp_path / "absent", outcome("short", 1))
