"""What is shown while it works."""

import io

from softprompt.console import Progress, duration


def test_progress_off_a_terminal_is_plain_lines(capsys):
    with Progress() as progress:
        progress.trial("prompt-5-vocabulary-s0", 0, 4, 600.0)
        progress.stage("load the model")
        progress.stage("train", 1, 100, "loss 0.7")
        progress.stage("train", 2, 100, "loss 0.6")
        progress.stage("train", 100, 100, "loss 0.5")
        progress.finished("test accuracy 0.8", 1, 4, 450.0)
        progress.finished("test accuracy 0.9", 2, 4, None)
    assert capsys.readouterr().err.splitlines() == [
        "trial 1 of 4: prompt-5-vocabulary-s0, about 10 min 0 s left",
        "[prompt-5-vocabulary-s0] load the model ...",
        "[prompt-5-vocabulary-s0] train 1/100: loss 0.7, 0 s left",
        "[prompt-5-vocabulary-s0] train 100/100: loss 0.5",
        "test accuracy 0.8",
        "1 of 4 trials done, about 7 min 30 s left",
        "test accuracy 0.9",
    ]


def test_progress_on_a_terminal_ends_with_what_was_said(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(stream) as progress:
        progress.trial("prompt-5-vocabulary-s0", 0, 4, None)
        progress.stage("load the model")
        progress.stage("train", 50, 100, "loss 0.7")
        progress.say("validation accuracy 0.8 [best]")
        progress.finished("test accuracy 0.8", 1, 4, 450.0)
    written = stream.getvalue()
    assert "validation accuracy 0.8 [best]\n" in written
    assert "50/100" in written
    assert "test accuracy 0.8\n" in written and "about 7 min 30 s left" in written


def test_a_trial_beside_others_takes_its_bar_away(monkeypatch):
    """Mutations: the bar stays; it does not say whose it is."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    with Progress(stream) as progress:
        with progress.for_trial("prompt-5") as part:
            part.stage("train", 50, 100)
            (bar,) = progress._bars.tasks
            assert bar.description == "prompt-5: train"
        assert progress._bars.tasks == []


def test_durations():
    assert [duration(s) for s in (0.4, 59, 60, 3599, 3600, 7500)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
        "2 h 5 min",
    ]
