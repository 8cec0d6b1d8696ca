"""Names of tasks, which resolve under the root only, and A/B aliases."""

import asyncio
import math
import os

import httpx2
import pytest

from softprompt import cli
from softprompt.errors import UserError
from softprompt.serving.folders import NoTask, find_tasks, task_folder
from softprompt.serving.http.aliases import check_aliases, parse_alias
from softprompt.serving.http.errors import status_of
from tests.serving.fake import FakeEngine
from tests.serving.http import ADMIN_KEY, bearer, call, fake_app, post


@pytest.fixture
def root(tmp_path):
    for name in ("root/short", "root/long", "root/notes", "elsewhere/secret"):
        (tmp_path / name).mkdir(parents=True)
        if name != "root/notes":
            (tmp_path / name / "delta.safetensors").write_text("good")
    return tmp_path / "root"


BAD_NAMES = (
    *("", ".", "..", "../elsewhere", "../elsewhere/secret", "short/../long", "/etc", "short/"),
    *("short\0", "short\n", "~", "-rf", "C:\\x", "%2e%2e", "a" * 129, "ſhort", "short "),
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_refused(root, name):
    """Breaks when a name may hold a path: `match` for `fullmatch` in `task_folder`."""
    with pytest.raises(UserError, match="allowed"):
        task_folder(root, name)


def test_a_folder_is_found_by_its_name(root):
    """Breaks when a folder without a delta counts as a task."""
    assert find_tasks(root) == ["long", "short"]
    assert task_folder(root, "short") == root / "short"
    for name in ("notes", "absent"):
        with pytest.raises(NoTask, match=name) as raised:
            task_folder(root, name)
        assert status_of(raised.value) == 404
    with pytest.raises(UserError, match="nowhere"):
        find_tasks(root / "nowhere")
    with pytest.raises(UserError, match="delta.safetensors"):
        find_tasks(root / "notes")


def test_links_that_leave_the_root_are_refused(root):
    """Breaks when links are followed out of the root: drop the loop over `folder.iterdir()`."""
    os.symlink(root.parent / "elsewhere" / "secret", root / "folder_link")
    (root / "file_link").mkdir()
    secret = root.parent / "elsewhere" / "secret" / "delta.safetensors"
    os.symlink(secret, root / "file_link" / "delta.safetensors")
    os.symlink(root / "short", root / "inside")
    for name in ("folder_link", "file_link"):
        with pytest.raises(UserError, match="leaves the root"):
            task_folder(root, name)
    assert task_folder(root, "inside") == root / "inside"


def test_a_failed_load_changes_nothing(root):
    """Breaks when a name moves before its delta is checked, or an error is a 500."""
    with fake_app(root=root, admin_key=ADMIN_KEY) as (app, engine):
        before = engine.tasks()
        (root / "short" / "delta.safetensors").write_text("bad")
        for name, status in (("short", 400), ("absent", 404), ("..", 404), ("tiny", 404)):
            response = call(app, "PUT", f"/v1/tasks/{name}", headers=bearer(ADMIN_KEY))
            assert response.status_code == status, name
        assert engine.tasks() == before
        assert call(app, "DELETE", "/v1/tasks/absent", headers=bearer(ADMIN_KEY)).status_code == 404


def test_arms_get_their_shares_and_a_user_keeps_his():
    """Breaks when arms have equal shares, or are drawn for each request: hash a fresh token."""
    alias = parse_alias("best=short:3,long:1")
    users = [f"user {number}" for number in range(10_000)]
    first = [alias.arm(user) for user in users]
    expected, deviation = 7_500, math.sqrt(10_000 * 0.75 * 0.25)
    assert abs(first.count("short") - expected) < 3 * deviation
    assert [alias.arm(user) for user in users] == first
    drawn = [alias.arm("") for _ in range(10_000)]
    assert abs(drawn.count("short") - expected) < 4 * deviation
    other = parse_alias("other=short:3,long:1")
    assert [other.arm(user) for user in users] != first  # aliases split users independently


@pytest.mark.long
def test_arms_get_their_shares_over_http():
    """Breaks when `user` is not read: of 10,000 users, those who ask again would change arms."""
    alias = parse_alias("best=short:3,long:1")

    async def ask(client, number):
        body = {"model": "best", "prompt": "x", "max_tokens": 1, "user": f"{number % 10_000}"}
        return (await client.post("/v1/completions", json=body)).json()["model"]

    async def ask_all(app):
        url, found = "http://localhost", []
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=url) as client:
            for first in range(0, 10_500, 50):
                several = (ask(client, number) for number in range(first, first + 50))
                found += await asyncio.gather(*several)
        return found

    with fake_app(aliases={"best": alias}) as (app, _):
        arms = asyncio.run(ask_all(app))
    assert arms[:500] == arms[10_000:]
    assert abs(arms[:10_000].count("short") - 7_500) < 3 * math.sqrt(10_000 * 0.75 * 0.25)


@pytest.mark.parametrize(
    "text",
    [
        *("best", "best=", "=a:1", "best=a", "best=a:0", "best=a:-1", "best=a:nan", "best=a:inf"),
        *("best=a:1,a:1", "best=../a:1", "be/st=a:1", "best=a:1,", "best=a:x"),
    ],
)
def test_other_aliases_are_refused(text):
    """Breaks when a weight of zero or a name with a path is taken."""
    with pytest.raises(UserError, match="NAME=TASK:WEIGHT"):
        parse_alias(text)


def test_aliases_have_names_of_their_own_and_arms_that_exist():
    """Breaks when an alias hides a task, or names one that is not there."""
    check_aliases([parse_alias("best=a:1,b:1")], ["model", "a", "b"])
    for text, said in (("a=b:1", "taken"), ("model=a:1", "taken"), ("best=c:1", "'c'")):
        with pytest.raises(UserError, match=said):
            check_aliases([parse_alias(text)], ["model", "a", "b"])
    twice = [parse_alias("best=a:1"), parse_alias("best=b:1")]
    with pytest.raises(UserError, match="taken"):
        check_aliases(twice, ["model", "a", "b"])


def test_an_arm_that_no_trial_has_ends_the_command(root, monkeypatch, capsys):
    """Breaks when arms are checked by their trials alone: every user of this one would get 404."""
    monkeypatch.setattr("softprompt.commands.serve.make_engine", lambda *_: FakeEngine())
    command = ["serve", str(root), "--model", "absent", "--port", "0"]
    assert cli.main([*command, "--alias", "best=short:1,long:movies:1"]) == 2
    assert "'long:movies'" in capsys.readouterr().err.splitlines()[-1]


def test_answers_name_their_arm_and_outcomes_are_kept(root):
    """Breaks when an answer names the alias, or an arm of no alias is counted."""
    alias = parse_alias("best=short:1,long:1")
    with fake_app(root=root, aliases={"best": alias}) as (app, _):
        for user in ("ann", "bob", "eve", "joe"):
            body = {"model": "best", "prompt": "x", "user": user}
            assert post(app, "/v1/completions", body).json()["model"] == alias.arm(user)
            predicted = post(app, "/v1/tasks/best/predict", {"inputs": ["x"], "user": user})
            assert predicted.json()["task"] == alias.arm(user)
            sent = {"alias": "best", "arm": alias.arm(user), "user": user, "value": 1}
            assert post(app, "/v1/outcomes", sent).status_code == 201
        for wrong in ({"arm": "tiny"}, {"alias": "x"}, {"value": "1"}, {"value": None}, {"x": 1}):
            response = post(app, "/v1/outcomes", sent | wrong)
            assert (response.status_code, response.json()["error"]["param"]) == (400, *wrong)
    lines = (root / "outcomes.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert not any(user in line for line in lines for user in ("ann", "bob", "eve", "joe"))


def test_an_arm_may_be_one_of_a_trials_several_tasks():
    """Breaks when the last ":" of TRIAL:TASK:WEIGHT is not the one before the weight."""
    alias = parse_alias("best=both:movies:1,both:tweets:2")
    assert (alias.arms, alias.weights) == (("both:movies", "both:tweets"), (1.0, 2.0))
    check_aliases([alias], ["model", "both"])
