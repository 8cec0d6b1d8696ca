"""The loop with a step of one line, and validation scores that are given."""

import json
import os
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from softprompt.data.encode import Encoded
from softprompt.data.pipeline import TrainSource, train_template
from softprompt.methods.delta_file import load_delta
from softprompt.models.dropout import Dropout
from softprompt.training import loop
from softprompt.training.checkpoints import checkpoint_manager
from softprompt.training.logs import MetricsLog, read_log
from softprompt.training.loop import Diverged, LoopConfig, LoopInputs, State
from softprompt.training.optimizers import AverageState, OptimizerConfig, make_optimizer
from softprompt.training.sharding import make_mesh, random_key, replicated
from softprompt.trials.run import mean_share

MESH = make_mesh(8, 1)


@pytest.fixture(scope="module")
def source():
    """Eight examples of two to nine tokens, two a step."""
    inputs = [np.arange(1, 2 + n, dtype=np.int32) for n in range(1, 9)]
    targets = [np.array([5], np.int32)] * 8
    ids, labels = [str(n) for n in range(8)], np.zeros(8, np.int32)
    encoded = Encoded(ids, inputs, targets, labels, (targets[0],), 0)
    return TrainSource(encoded, train_template(encoded, examples=2), seed=0)


class Run:
    """A trial of a counter: each step adds 1 to the delta; `scores` are its validations'.

    `diverge` is the step whose loss is not finite. `events` lists what happened, in order.
    """

    def __init__(self, folder, source, *, scores=(), diverge=-1, on_stage=None, **changes):
        self.folder, self.scores, self.diverge, self.on_stage = folder, scores, diverge, on_stage
        self.source, self.events, self.seen = source, [], []
        every = {"log_every": 1, "eval_every": 0, "checkpoint_every": 1000, "snapshots": 0}
        found = {"steps": 6, "patience": 0, "metric": "accuracy"} | every | changes
        self.config = LoopConfig(**found)

    def parts(self):
        return LoopInputs(
            program=None,
            weights={},
            source=self.source,
            rates=np.arange(self.config.steps, dtype=np.float32) / 8,
            dropout=Dropout(random_key(0, MESH)),
            mesh=MESH,
            row_multiple=8,
            evaluate=self.evaluate,
            fold=lambda delta: delta,
            folder=epath.Path(self.folder),
            notes={"config": {"seed": 0}, "fingerprint": "f"},
            step_flops=1.0,
            machine_flops=1.0,
            stage=self.stage,
        )

    def start(self):
        return make_optimizer(OptimizerConfig()).init({"prompt": jnp.zeros(2)})

    def step(self, delta, opt_state, weights, batch, dropout):
        number = int(delta["prompt"][0]) + 1
        self.events.append(f"step {number}")
        rate = float(optax.tree.get(opt_state, "learning_rate"))
        tokens = np.asarray(batch.rows.tokens)
        bits = jax.random.bits(dropout.key)
        self.seen.append((number, rate, tokens.shape[0], int(tokens.sum()), bits))
        loss = jnp.float32(jnp.nan if number == self.diverge else 1 / number)
        return {"prompt": delta["prompt"] + 1}, opt_state, {"loss": loss, "grad_norm": loss * 0 + 2}

    def evaluate(self, delta):
        number = int(delta["prompt"][0])
        self.events.append(f"validate {number}")
        scores = self.scores if isinstance(self.scores, dict) else dict(enumerate(self.scores))
        return {"accuracy": scores.get(number, 0.0), "examples": 4}

    def stage(self, what, done, total, note):
        self.events.append(f"note {done} {note.split()[0]}")
        if self.on_stage and note.startswith("loss"):
            self.on_stage(done)

    def __call__(self):
        """Trains from the newest checkpoint to the end; returns the state."""
        delta = jax.device_put({"prompt": jnp.zeros(2)}, replicated(MESH))
        state = State(delta, jax.device_put(self.start(), replicated(MESH)), best=delta)
        with checkpoint_manager(self.folder / "checkpoints") as manager:
            restored = loop.restore(manager, state, check=lambda *_: None, say=print)
            log = MetricsLog(self.folder, step=restored.step if restored else None, sinks=[])
            steps = loop.train(self.config, self.parts(), restored or state, log, manager)
            return drive(steps, self.step)


def drive(steps, take):
    """Takes each step that the loop asks for; returns its state at the end."""
    try:
        call = next(steps)
        while True:
            call = steps.send(take(*call[1:]))
    except StopIteration as end:
        return end.value


def checkpoints_in(folder):
    return sorted(int(child.name) for child in (folder / "checkpoints").iterdir())


def test_every_step_gets_its_batch_rate_and_key(tmp_path, source):
    """Mutation: start the batches at 0 after a restore; hand over the rate of the step before."""
    first, second = (Run(tmp_path, source, checkpoint_every=3, steps=n) for n in (4, 9))
    for run, numbers in ((first, range(1, 5)), (second, range(5, 10))):
        run()
        assert [number for number, *_ in run.seen] == list(numbers)
        for number, rate, rows, tokens, _ in run.seen:
            assert rate == (number - 1) / 8
            assert rows == 8, "padded to the mesh"
            assert tokens == source[number - 1].rows.tokens.sum()
    assert len({int(bits) for *_, bits in first.seen + second.seen}) == 9


def test_metrics_are_fetched_a_step_behind(tmp_path, source):
    """Mutation: note a step before the next one is started."""
    run = Run(tmp_path, source)
    run()
    events = [event for event in run.events if not event.startswith("validate")]
    assert events[:5] == ["note 0 validation", "step 1", "step 2", "note 1 loss", "step 3"]
    assert events[-3:] == ["note 5 loss", "note 6 loss", "note 6 validation"]


def test_log_lines(tmp_path, source):
    """Mutation: forget the last step's line, or the evaluation at step 0."""
    Run(tmp_path, source, log_every=4, eval_every=4, scores=[0.25] * 9)()
    lines = read_log(tmp_path)
    assert [(line["step"], "loss" in line) for line in lines] == [
        (0, False),
        (4, True),
        (4, False),
        (6, True),
        (6, False),
    ]
    assert lines[0] == {"step": 0, "validation/accuracy": 0.25, "validation/examples": 4}
    assert lines[1]["loss"] == 0.25
    assert lines[1]["rate"] == 3 / 8
    assert lines[1]["fill"] == source.fill(3)
    for key in ("seconds", "tokens_per_second", "examples_per_second", "peak_share"):
        assert lines[1][key] > 0
    rate = lines[1]["tokens_per_second"] * lines[1]["seconds"]
    assert rate == pytest.approx(sum(map(source.tokens, range(4))))
    assert 0 <= lines[1]["input_wait_share"] <= 1


class SlowSource(TrainSource):
    """Batches that take 0.3 s to make: ten times what else happens in a step on a busy machine."""

    def __getitem__(self, step):
        time.sleep(0.3)
        return super().__getitem__(step)


class SlowRun(Run):
    """Steps of 0.6 s."""

    def step(self, *arguments):
        time.sleep(0.6)
        return super().step(*arguments)


def test_the_share_of_waiting_for_input(tmp_path, source):
    """A slow source is waited for most of the time; where steps take longer it costs nothing.

    Mutation: a batch is made when its step is due (neither the reader nor the feed looks ahead);
    what one line waited is in the next one too.
    """
    slow = SlowSource(source.encoded, source.template, seed=0)
    runs = {"idle": Run(tmp_path / "idle", slow), "busy": SlowRun(tmp_path / "busy", slow)}
    shares = {}
    for name, run in runs.items():
        run()
        log = read_log(tmp_path / name)
        lines = [line for line in log if "loss" in line]
        shares[name] = np.median([line["input_wait_share"] for line in lines])
        waits = [line["input_wait_share"] * line["seconds"] for line in lines]
        mean = sum(waits) / sum(line["seconds"] for line in lines)
        assert mean_share(log, "input_wait_share") == pytest.approx(mean)
    assert 0.6 < shares["idle"] <= 1
    assert shares["busy"] < 0.2


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.1, 0, 0.3, 0, 0.2, 0, 0.3], 2),  # the first of equals
        ([0.5, 0, 0.3, 0, 0.2, 0, 0.5], 0),
        ([0.1, 0, 0.2, 0, 0.3, 0, 0.4], 6),
    ],
)
def test_the_best_delta_is_kept(tmp_path, source, scores, best):
    """Mutation: `>=` for `>`; keep the newest delta."""
    state = Run(tmp_path, source, eval_every=2, scores=scores)()
    assert state.best_step == best
    assert state.best["prompt"][0] == best
    assert state.best_scores["accuracy"] == scores[best]
    assert state.last_scores["accuracy"] == scores[6]
    assert (state.step, int(state.delta["prompt"][0])) == (6, 6)


class Averaging(Run):
    """The same counter with an average at 100 more than the delta."""

    def step(self, delta, opt_state, *rest):
        delta, opt_state, metrics = super().step(delta, opt_state, *rest)
        return delta, (*opt_state[:-1], AverageState({"prompt": delta["prompt"] + 100})), metrics

    def start(self):
        average = AverageState({"prompt": jnp.full(2, 100.0)})
        return (*super().start(), average)


def test_an_average_is_what_is_validated_and_kept(tmp_path, source):
    """Mutation: validate, keep or snapshot the delta; go on from the average."""
    scores = dict.fromkeys((100, 102, 104, 106), 0.1) | {102: 0.9}
    run = Averaging(tmp_path, source, eval_every=2, snapshots=3, scores=scores)
    state = run()
    seen = [event for event in run.events if event.startswith("validate")]
    assert seen == ["validate 100", "validate 102", "validate 104", "validate 106"]
    assert (state.best_step, state.best["prompt"][0]) == (2, 102)
    assert state.best_scores["accuracy"] == 0.9
    assert (state.delta["prompt"][0], state.delta_to_evaluate()["prompt"][0]) == (6, 106)
    assert [number for number, *_ in run.seen] == [1, 2, 3, 4, 5, 6]
    assert load_delta(tmp_path / "snapshots" / "3.safetensors")[0]["prompt"][0] == 103


@pytest.mark.parametrize(
    ("scores", "patience", "end"),
    [
        ([0.5] + [0.1] * 20, 3, 3),  # nothing beats step 0
        ([0.1, 0.2, 0.2, 0.2, 0.3, 0.2, 0.1, 0.3] + [0.9] * 20, 3, 7),  # a new best starts over
        ([0.1, 0.2, 0.2, 0.2, 0.3, 0.2, 0.1, 0.3] + [0.9] * 20, 0, 12),
    ],
)
def test_early_stopping(tmp_path, source, scores, patience, end):
    """Mutation: count on after a new best; stop one evaluation late; write no checkpoint."""
    run = Run(tmp_path, source, steps=12, eval_every=1, scores=scores, patience=patience)
    state = run()
    assert state.step == end
    assert checkpoints_in(tmp_path) == [end]
    assert [line["step"] for line in read_log(tmp_path)][-1] == end
    before = list(run.events)
    assert run().step == end, "a stopped trial stays stopped"
    assert run.events == before


def test_checkpoints_and_snapshots(tmp_path, source):
    """Mutation: write the checkpoint before the evaluation of the same step."""
    scores = [0.1, 0, 0.2, 0, 0.3, 0, 0.2]
    Run(tmp_path, source, checkpoint_every=2, snapshots=3, eval_every=2, scores=scores)()
    assert checkpoints_in(tmp_path) == [4, 6], "the last two"
    for step in (3, 6):
        delta, provenance = load_delta(tmp_path / "snapshots" / f"{step}.safetensors")
        assert delta["prompt"][0] == step
        assert provenance == {"step": step, "config": {"seed": 0}, "fingerprint": "f"}
    notes = json.loads((tmp_path / "checkpoints" / "4" / "notes" / "metadata").read_text())
    assert notes["best_step"] == 4
    assert notes["config"] == {"seed": 0}
    assert notes["fingerprint"] == "f"


@pytest.mark.parametrize("diverge", [1, 3, 4, 6])
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_loss_that_is_not_finite_stops_the_trial(tmp_path, source, diverge, log_every):
    """Mutation: look at logged steps alone; save the checkpoint of a step before looking at it."""
    run = Run(tmp_path, source, diverge=diverge, checkpoint_every=2, log_every=log_every)
    with pytest.raises(Diverged) as error:
        run()
    message = str(error.value)
    assert message.startswith(f"step {diverge}: grad_norm nan, loss nan: not finite at rate ")
    last = f"grad_norm 2, loss {1 / (diverge - 1):.4g}" if diverge > 1 else "none"
    assert message.endswith(f"last finite metrics: {last}")
    line = read_log(tmp_path)[-1]
    assert (line["step"], line["loss"]) == (diverge, None)
    assert not any(step >= diverge for step in checkpoints_in(tmp_path))


def test_the_rate_and_what_is_finite_are_named(tmp_path, source):
    class Overflow(Run):
        def step(self, *arguments):
            delta, opt_state, metrics = super().step(*arguments)
            return delta, opt_state, metrics | {"delta_norm": jnp.float32(jnp.inf)}

    with pytest.raises(Diverged) as error:
        Overflow(tmp_path, source)()
    assert str(error.value) == (
        "step 1: delta_norm inf: not finite at rate 0 (finite: grad_norm 2, loss 1); "
        "last finite metrics: none"
    )


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_sigterm_saves_the_step_it_comes_in_and_exits_with_75(tmp_path, source, stop):
    """Mutation: exit without a save, or before the write is finished."""

    def terminate(step):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    scores = [0.1, 0.2, 0.3, 0.1, 0.1, 0.4, 0.1]
    run = Run(tmp_path, source, eval_every=1, scores=scores, on_stage=terminate)
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    (saved,) = checkpoints_in(tmp_path)
    assert saved == stop + 1
    run.on_stage = None
    state = run()
    assert [number for number, *_ in run.seen] == [1, 2, 3, 4, 5, 6], "no step twice"
    assert (state.best_step, state.step) == (5, 6)
    lines = [line["step"] for line in read_log(tmp_path)]
    assert lines == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


@pytest.mark.parametrize("steps", [5, 6])
def test_sigterm_in_the_last_step_is_not_forgotten(tmp_path, source, steps):
    """Nor behind it, in the last validation. Mutation: the signal is dropped with its handler, so
    that a sweep goes on with its next trial."""

    def terminate(step):
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    run = Run(tmp_path, source, on_stage=terminate)
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 75
    assert checkpoints_in(tmp_path) == [6]
    run.on_stage = None
    assert run().step == 6
    assert [number for number, *_ in run.seen] == [1, 2, 3, 4, 5, 6], "no step twice"


def test_no_steps_is_an_evaluation(tmp_path, source):
    state = Run(tmp_path, source, steps=0, scores=[0.5])()
    assert (state.step, state.best_step, state.best_scores["accuracy"]) == (0, 0, 0.5)


def test_seconds_add_up_over_processes(monkeypatch):
    """Mutation: take the seconds of the last process alone."""
    clock = SimpleNamespace(monotonic=lambda: 130.0)
    monkeypatch.setattr(loop, "time", clock)
    state = State({}, {}, {}, seconds=20.0, began=100.0)
    assert state.elapsed() == 50.0
    assert state.notes()["seconds"] == 50.0
