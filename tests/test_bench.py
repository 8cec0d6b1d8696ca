"""The benchmark against PEFT: what a saving changes, its rows, statuses, table and claims."""

import dataclasses
import functools
import json
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import cells, forms, inputs, measure, ours, report, theirs
from experiments.bench.cells import Cell, System
from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.pretrained.loading import load_model
from softprompt.pretrained.save import save_folder
from softprompt.training.optimizers import make_optimizer, set_rate
from softprompt.training.step import train_step
from softprompt.trials.outputs import write_outputs
from softprompt.trials.prepare import initial_state, prepare, train_source
from softprompt.trials.session import Session, optimizer_config

TINY = Cell("tiny", "passage", "prompt", 20)
WORDS = "a warm and funny film that never loses its way in the city"
STEPS = cells.WARMUP + 1


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_folder):
    """A working directory with a tiny model's folder and its examples."""
    root = tmp_path_factory.mktemp("bench")
    for dtype, folder in cells.folders(root, "tiny").items():
        loaded = load_model(str(tiny_folder), dtype=dtype)
        (root / "models").mkdir(exist_ok=True)
        save_folder(folder, loaded.config, loaded.weights, loaded.tokenizer)
    random, words, lines = np.random.default_rng(0), WORDS.split(), []
    for n in range(120):
        text = " ".join(random.choice(words, random.integers(4, 12)))
        lines.append(json.dumps({"passage": text, "label": ("no", "yes")[n % 2]}) + "\n")
    (root / "passages.jsonl").write_text("".join(lines))
    config, examples = cells.cell_config(root, TINY), cells.examples_file(root, TINY)
    job = {"model": "tiny", "folders": cells.folders(root, "tiny")}
    job |= {"texts": [{"config": config, "length": 1, "examples": examples}]}
    inputs.write(job | {"passages": str(root / "passages.jsonl")})
    return root


@pytest.fixture(scope="module")
def prepared(workdir):
    task = cells.Task(TINY, System("ours", "float32"), steps=1)
    job = cells.job(task, workdir, best_threads={})
    return prepare(ours.settings(job, "float32"), Session(Progress()))


def first_losses(prepared, off):
    batches = [forms.make_batch(train_source(prepared), 0, off)]
    compiled, run = ours.stepper(prepared, batches, off=off, rate=0.01)
    assert not compiled.cached
    return [run(0) for _ in range(3)]


@pytest.mark.matrix
def test_losses_without_a_saving(prepared):
    """Mutation: a row's context is another row's; a target's weight is lost, or its position; an
    example stands in no row. ("context" has the rows of "packing".)"""
    whole = first_losses(prepared, "")
    assert whole[0] != pytest.approx(whole[2], rel=1e-3)  # it learned
    for off in ("context", "targets"):
        assert report.losses_apart(whole, first_losses(prepared, off)) < report.TOLERANCE, off


def test_what_is_off_is_computed(prepared):
    """Mutation: the prompt's copies are hoisted out of the rows; several examples share a row;
    logits at targets alone."""
    source, step = train_source(prepared), prepared.step
    alone, everywhere = forms.alone(source, 0), forms.everywhere(source[0])
    assert len(alone.rows.tokens) == 16 and alone.rows.segments.max() == 1
    assert alone.rows.tokens.shape[1] - source.lengths_N[source.places(0)[0]].max() in range(8)
    shapes = {everywhere.rows.index.shape, everywhere.targets.shape, source[0].rows.tokens.shape}
    assert len(shapes) == 1

    state, optimizer = initial_state(prepared), optimizer_config(prepared.config)
    arguments = (state.delta, set_rate(state.opt_state, np.float32(0)), prepared.frozen)
    arguments = jax.eval_shape(lambda *a: a, *arguments, alone, None)
    update = functools.partial(train_step, config=step, tx=make_optimizer(optimizer))
    repeated = functools.partial(forms.repeated_step, **update.keywords)
    flops = [jax.jit(f).lower(*arguments).cost_analysis()["flops"] for f in (update, repeated)]
    assert flops[1] > 1.2 * flops[0]


@pytest.mark.matrix
def test_a_process_and_its_resumption(workdir, monkeypatch):
    """Mutation: the warm-up is counted; a share of another shape's rate; a done row is run again; a
    failed one is not."""
    monkeypatch.setattr(bench, "commit_now", lambda: "unknown")
    tasks = [cells.Task(TINY, System("ours"), steps=1)]
    with Progress() as progress:
        (row,) = bench.run(tasks, workdir, "no-such-python", progress=progress)
        assert row["status"] == "done", row["error"]
        assert (len(row["seconds"]), len(row["losses"])) == (1, STEPS)
        assert row["first"] > row["seconds"][0] > 0 and not row["cached"]
        assert 1e7 < row["memory"] < 4e9 and row["flops"] > 0 and row["rate"] > 0
        assert row["actual_dtype"] in cells.DTYPES and np.isfinite(row["losses"]).all()
        file = workdir / "rows.jsonl"
        lost = [{**tasks[0].key, "off": "targets", "status": "failed"}]
        file.write_text(file.read_text() + json.dumps(lost[0]) + '\n{"half')
        monkeypatch.setattr(bench, "child", lambda *a, **k: {"status": "killed", "error": "9"})
        again = dataclasses.replace(tasks[0], system=System("ours", off="targets"))
        rows = bench.run([*tasks, again], workdir, "no-such-python", progress=progress)
    assert rows[0] == row
    assert json.loads(file.read_text().splitlines()[-1]) == rows[1]  # not behind half a line
    assert (rows[1]["status"], rows[1]["off"]) == ("killed", "targets")
    table = report.table(rows)
    assert list(table["status"]) == ["done", "killed"]
    assert table["seconds"][0] == row["seconds"][0]


@pytest.mark.parametrize(
    ("then", "now", "anew"),
    [
        ("a1", "a1", 0),
        ("a1", "b2", 2),
        ("a1", "a1-dirty", 2),
        ("a1-dirty", "a1-dirty", 2),
        (None, "unknown", 0),
    ],
)
def test_rows_of_other_code(then, now, anew, tmp_path, monkeypatch):
    """Mutation: a row of another commit is kept, or PEFT's is; two trees with changes are the same;
    outside git nothing is kept."""
    tasks = [cells.Task(TINY, System(side)) for side in ("ours", "peft")]
    lines = [json.dumps(t.key | {"status": "done", "commit": then}) + "\n" for t in tasks]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    told, ran, ended = [], [], {"status": "killed", "error": "9"}
    monkeypatch.setattr(Progress, "say", lambda self, text: told.append(text))
    monkeypatch.setattr(bench, "commit_now", lambda: now)
    monkeypatch.setattr(bench, "make_inputs", lambda *a: {"status": "done"})
    monkeypatch.setattr(bench, "run_task", lambda task, *a: ran.append(task) or ended)
    with Progress() as progress:
        rows = bench.run(tasks, tmp_path, "no-such-python", progress=progress)
    assert len(ran) == anew
    assert [row["status"] for row in rows] == ["killed" if anew else "done"] * 2
    line = f"{anew} of 2 processes were of other code; they are measured anew"
    assert told.count(line) == (1 if anew else 0)


def test_a_failed_process_stands_with_the_others_of_its_kind():
    """It has no dtype but the one that was asked for. Mutation: it is a line of its own."""
    asked = cells.Task(TINY, System("ours"), steps=1).key
    assert asked["dtype"] == "auto"
    done = asked | {"status": "done", "actual_dtype": "bfloat16", "seconds": [1.0]}
    (group,) = report.groups([asked | {"status": "failed", "error": "9"}, done])
    assert (group.dtype, group.status) == ("bfloat16", "done, failed")


def test_peft_needs_a_python(monkeypatch, capsys, tmp_path):
    """Mutation: it is found out once all models are written."""
    words = ["experiments.bench", "--peft-python", "/no/such", "--workdir", str(tmp_path / "w")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        bench.main()
    assert "--peft-python is '/no/such': no such program" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


ENDS = {
    "import os; os.kill(os.getpid(), 9)": "killed",
    "print('nonsense')": "failed",
    "raise MemoryError": "out of memory",
    "raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')": "out of memory",
    "raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')": "out of memory",
    "raise ValueError('then set SOFTPROMPT_ACCEPT_TERMS=gemma')": "terms not accepted",
    "raise ValueError('two\\nlines')": "failed",
}


@pytest.mark.parametrize("code", ENDS)
def test_how_a_process_ends(code, tmp_path):
    """Mutation: a child's death is ours; what it was is lost."""
    wrapped = code if "raise" not in code else f"def f(job): {code}\nmain(f)"
    program = f"from experiments.bench.measure import main\n{wrapped}"
    row = bench.child([sys.executable, "-c", program], {}, tmp_path, "x")
    assert row["status"] == ENDS[code]
    assert row["error"].count("\n") == 0


@pytest.mark.parametrize("status", ["killed", "failed", "out of memory", "terms not accepted"])
def test_the_exit_code(status, tmp_path, monkeypatch, capsys):
    """Mutation: a process that failed is no failure; one that ran out of memory is."""
    failed = status in ("killed", "failed")

    def run(tasks, *a, **k):
        rows = [task.key | {"status": "out of memory", "error": ""} for task in tasks]
        rows[2] |= {"status": status, "error": "why"}
        return rows

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "write_outputs", lambda *a: None)
    monkeypatch.setattr(sys, "argv", ["experiments.bench", "--workdir", str(tmp_path)])
    assert bench.main() == int(failed)
    name = cells.plan("claimed", processes=2, steps=10)[2].name
    told = f"experiments.bench: {name}: {status} (why)\n" if failed else ""
    assert capsys.readouterr().err == told


def test_only_the_warm_up_is_left_out():
    """Mutation: the limit counts the warm-up; it cuts a process to no step at all."""
    seconds, losses = measure.timed(float, warmup=2, steps=10, limit=-1.0)
    assert losses == [0.0, 1.0, 2.0, 3.0, 4.0] and len(seconds) == 2 + measure.FEWEST

    def slow_at_first(n):
        time.sleep(0.3 * (n < 2))
        return 0.0

    assert len(measure.timed(slow_at_first, warmup=2, steps=10, limit=0.5)[0]) == 12


@pytest.mark.parametrize(("platform", "count"), [("cpu", 1), ("gpu", ours.PRODUCTS)])
def test_products_in_flight(platform, count, monkeypatch):
    """Mutation: an accelerator is waited for after each product, or a CPU is given many; the time
    of all is told for that of one."""
    now, flying, waits = [0.0], [], []

    def wait(results):
        waits.append(len(flying))
        now[0] += len(flying)
        flying.clear()

    class Result:
        block_until_ready = wait

    def jit(function):
        return lambda a, b: flying.append(1) or Result()

    fake = {"jit": jit, "block_until_ready": wait, "default_backend": lambda: platform}
    monkeypatch.setattr(ours, "jax", types.SimpleNamespace(random=jax.random, **fake))
    monkeypatch.setattr(ours, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    assert ours.product_seconds("mk,kn->mn", [(2, 3), (3, 4)], "float32") == 1.0
    assert waits == [1] + [count] * 15


def test_the_plan():
    """Mutation: a system's processes follow one another; they take the same steps; a cell
    is lost; PEFT in float32 comes last of its cell, minutes from what it is compared with."""
    tasks = cells.plan("claimed", processes=2, steps=10)
    assert len({task.identity for task in tasks}) == len(tasks)
    whole = [t for t in tasks if t.purpose == "time"]
    timed = [t for t in whole if t.cell == Cell("smollm2", "movie", "prompt", 20)]
    assert [(t.system.side, t.process) for t in timed] == [
        *(("peft", 0), ("ours", 0)),
        *(("peft", 1), ("ours", 1)),
    ]
    cell = [t for t in whole if t.cell.model == "smollm2"][:4]
    assert [(t.system.side, t.system.dtype, t.process) for t in cell] == [
        *(("peft", "bfloat16", 0), ("ours", "auto", 0)),
        *(("peft", "float32", 0), ("ours", "auto", 1)),
    ]
    compared = [t.steps for t in whole if t.system.dtype == "float32"]
    assert compared == [10, 10, 1, *[10] * 4]
    t5 = [t for t in whole if t.cell.model == "t5-small" and t.cell.length == 100][:4]
    assert [t.cell.method for t in t5] == ["prompt"] * 3 + [cells.APART]
    assert [t.system.side for t in t5] == ["peft", "peft", "ours", "ours"]
    config = cells.job(t5[3], bench.ROOT, best_threads={})["config"]
    assert config["method.name"] == "prompt" and not config["method.prompt_to_input"]
    jobs = [cells.job(t, bench.ROOT, best_threads={}) for t in (timed[0], timed[2])]
    assert [job["start"] for job in jobs] == [0, cells.SPAN]
    cells_of = {task.cell for task in cells.plan("full", processes=1, steps=1)}
    assert len(cells_of) == 2 * 2 * (4 + 4 + 1 + 1)
    with pytest.raises(UserError, match="unknown subset 'half'; known: claimed, full, t5"):
        cells.plan("half", processes=1, steps=1)
    with pytest.raises(UserError, match="--steps is 100; allowed: 1 to 99"):
        cells.plan("full", processes=1, steps=100)


def test_peft_needs_nothing_of_ours():
    """Mutation: theirs.py imports the library, or torch before it is asked to measure."""
    code = "import sys, experiments.bench.theirs; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"jax", "softprompt", "torch", "transformers", "peft"}


def test_peft_reads_the_same_examples(workdir):
    """Mutation: an input's token is a label; padding is attended to; another example's tokens."""
    job = cells.job(cells.Task(TINY, System("peft"), steps=1), workdir, best_threads={})
    prepared = prepare(ours.settings(job, "float32"), Session(Progress()))
    source = train_source(prepared)
    for step, batch in enumerate(theirs.read_batches(job)):
        for row, example in enumerate(source.places(step)[0]):
            tokens = [*prepared.step.opening, *source.encoded.inputs[example]]
            target = source.encoded.targets[example]
            seen = batch["attention_mask"][row].astype(bool)
            assert (batch["input_ids"][row][seen] == [*tokens, *target]).all()
            assert (batch["labels"][row][batch["labels"][row] >= 0] == target).all()
            assert batch["labels"][row][len(tokens)] == target[0]
        assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(axis=1).max()


def test_an_encoder_reads_the_input_alone(workdir):
    """Mutation: the encoder sees the answer; the answer's first token is no label."""
    job = cells.job(cells.Task(TINY, System("peft"), steps=1), workdir, best_threads={})
    decoders, t5s = (theirs.read_batches(job, encoder_decoder=flag) for flag in (False, True))
    for decoder, t5 in zip(decoders, t5s, strict=True):
        for row in range(16):
            seen, whole = (x["input_ids"][row][x["attention_mask"][row] > 0] for x in (t5, decoder))
            target, same = (x["labels"][row][x["labels"][row] >= 0].tolist() for x in (t5, decoder))
            assert [*seen, *target] == whole.tolist() and target == same


def made_rows(model="smollm2", length=100, **seconds):
    """Rows of two processes a system, whose median is `seconds` by "side_dtype_off".

    The first's is the same, the second's twice as much.
    """
    rows = []
    for name, step in seconds.items():
        side, dtype, off = (name.split("_") + [""])[:3]
        for process in range(2):
            task = cells.Task(
                Cell(model, "movie", "prompt", length), System(side, dtype, off), process=process
            )
            rows.append(
                task.key
                | {"status": "done", "error": "", "losses": [2.0, 1.5], "first": 9.0 - process}
                | {"seconds": [step, *[step * (1 + process)] * 2], "actual_dtype": dtype}
                | {"memory": 10**9 * (1 + process), "flops": 3e12, "rate": 4e12}
                | ({"cached": process == 1} if side == "ours" else {})
            )
    return rows


def test_table_claims_and_figure(tmp_path):
    """Mutation: the slower dtype is the one to beat; context is compared with everything on alone;
    the mean of medians; a missing cell is a failure."""
    rows = made_rows(
        ours_bfloat16=1.0, peft_bfloat16=7.0, peft_float32=12.0, ours_bfloat16_context=6.0,
        ours_bfloat16_packing=1.5,
    )  # fmt: skip
    rows += made_rows(length=500, ours_bfloat16=1.0, peft_bfloat16=10.0)
    rows[3] |= {"status": "killed"}  # of PEFT's bfloat16, the second
    for off, loss in (("", 2.0), ("context", 2.0 + 1e-6), ("packing", 2.1)):
        task = cells.Task(TINY, System("ours", "float32", off), "losses")
        rows.append(task.key | {"status": "done", "losses": [1.0, loss]})
    table = report.table(rows).set_index(["P", "system", "dtype"])
    one = table.loc[(100, "softprompt", "bfloat16")]
    assert (one["seconds"], one["speed"], one["batches"], one["memory"]) == (1.0, 7.0, 6, 2.0)
    assert (one["share"], one["first"], one["first, cached"]) == (0.75, 9.0, 8.0)
    context = table.loc[(100, "softprompt without context", "bfloat16")]
    assert (context["factor"], context["alone"]) == (6.0, 4.0)
    assert table.loc[(100, "PEFT", "bfloat16")]["status"] == "done, killed"
    claims = report.claims(rows).set_index("claim")
    met = {name: verdict for name, verdict in claims["verdict"].items()}
    assert met["smollm2, P = 100: speed against PEFT in its quicker dtype"] == "met"
    assert met["smollm2, P = 100: speed against PEFT in float32"] == "met"
    assert met["smollm2, P = 500: speed against PEFT in its quicker dtype"] == "missed"
    assert met["gemma3, P = 100: speed against PEFT in its quicker dtype"] == "not measured"
    assert met["smollm2, P = 100: peak memory against PEFT in the same dtype"] == "missed"
    assert met["smollm2, P = 100: share of the products' rate"] == "met"
    verdicts = [met[f"tiny: losses without {off}, relative difference"] for off in cells.SAVINGS]
    assert verdicts == ["met", "missed", "not measured"]
    write_outputs(report, rows, tmp_path)
    write_outputs(report, rows[:1], tmp_path)


def test_the_figures_bars(monkeypatch):
    """Mutation: only processes of one number are compared, of which ours has more."""
    lines = {}
    monkeypatch.setattr(report, "length_plot", lambda given, *rest, **more: lines.update(given))
    report.figure(made_rows(ours_bfloat16=1.0, peft_bfloat16=10.0))
    ((point,),) = lines.values()
    assert (point.low, point.high) == (5.0, 20.0)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("method", cells.METHODS)
def test_peft_starts_where_we_do(method, workdir):
    """Mutation: other weights, other examples or other labels; PEFT trains nothing."""
    torch = pytest.importorskip("torch")
    cell = dataclasses.replace(TINY, method=method, length=5)
    task = cells.Task(cell, System("peft", "float32"), steps=1)
    job = cells.job(task, workdir, best_threads={})
    before = torch.get_num_threads()
    still = theirs.measure(job | {"threads": [1, 2], "rate": 0.0})
    moving = theirs.measure(job | {"threads": [1], "rate": 0.01})
    torch.set_num_threads(before)
    assert set(still["tried"]) == {"1", "2"} and len(still["seconds"]) == 1
    assert still["losses"][0] == moving["losses"][0]
    assert still["losses"][1] != moving["losses"][1]
    if method in ("lora", "full"):  # which begin as the model itself
        prepared = prepare(ours.settings(job, "float32"), Session(Progress()))
        batches = [forms.make_batch(train_source(prepared), 0, "")]
        loss = ours.stepper(prepared, batches, off="", rate=0.01)[1](0)
        assert moving["losses"][0] == pytest.approx(loss, rel=1e-5)
