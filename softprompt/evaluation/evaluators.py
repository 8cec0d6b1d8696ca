"""Evaluators: each computes metrics of a delta on a split, and a prediction for every example.

An evaluator is a function (forward, shared, split, progress) -> Result. `forward` has the inputs of
a forward pass besides the delta. `shared` is computed from the delta once for all rows. `split` has
the examples of one task. `Task.metrics` lists a task's evaluators and the metrics of each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from softprompt.data.encode import Encoded
from softprompt.data.eval_batches import EvalBatch
from softprompt.data.rows import RowLayout
from softprompt.data.tasks import Task
from softprompt.evaluation.generation import read_labels
from softprompt.evaluation.metrics import classification, free_text
from softprompt.evaluation.ranking import Scores, normalise, score_batches, scored_at_once
from softprompt.inference.beam import beam_search
from softprompt.inference.decode import Report, generate
from softprompt.models import Model
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.training.step import Shared

BATCH = 64  # inputs that are generated from together


class Forward(NamedTuple):
    """The inputs of a forward pass besides the delta.

    Attributes:
        model: configured for the method.
        weights: its frozen weights.
        mesh: the devices.
        layout: how an example is laid out in a row.
        tokenizer: the model's.
    """

    model: Model
    weights: Any
    mesh: Mesh
    layout: RowLayout
    tokenizer: Tokenizer


class Split(NamedTuple):
    """One task's examples.

    Attributes:
        task: the task.
        encoded: the examples.
        batches: returns the examples packed for ranking; packs them once.
    """

    task: Task
    encoded: Encoded
    batches: Callable[[], list[EvalBatch]]


class Result(NamedTuple):
    """The result of an evaluator.

    Attributes:
        metrics: by name; `examples` is the number of labelled examples.
        predictions: a dict for each example, in order; it does not have the id.
    """

    metrics: dict[str, float]
    predictions: list[dict[str, Any]]


Evaluator = Callable[[Forward, Shared, Split, Report], Result]


def ranking(score: str = "sum") -> Evaluator:
    """Predicts the most probable candidate.

    Args:
        score: "sum" or "mean" of the log-probabilities of a candidate's tokens.
    """

    def evaluate(forward: Forward, shared: Shared, split: Split, report: Report) -> Result:
        found = score_batches(
            forward.model,
            forward.weights,
            shared,
            split.batches(),
            mesh=forward.mesh,
            at_once=scored_at_once(forward.mesh),
            progress=report,
        )
        return ranked(split, found, score)

    return evaluate


def ranked(split: Split, found: Scores, score: str) -> Result:
    """Computes the result of `ranking` from the candidates' scores."""
    scores_NC, labels = normalise(*found, score), list(split.task.verbalizers)
    predicted_N = scores_NC.argmax(axis=1)
    metrics = classification(predicted_N, split.encoded.labels, len(labels))
    predictions = [
        {
            "label": _name(labels, label),
            "predicted": labels[predicted],
            "scores": dict(zip(labels, row_C.round(5).tolist(), strict=True)),
        }
        for label, predicted, row_C in zip(
            split.encoded.labels, predicted_N, scores_NC, strict=True
        )
    ]
    return Result(metrics, predictions)


def generation(beams: int = 1, max_new: int = 32) -> Evaluator:
    """Generates answers, each up to EOS or the end of the line.

    For a task with verbalizers an answer is parsed as a label. An answer that is not a label counts
    as wrong; `illegal` is the share of such answers.

    Args:
        beams: beam width; 1 is greedy decoding.
        max_new: largest number of tokens of an answer to a free-text task.
    """

    def evaluate(forward: Forward, shared: Shared, split: Split, report: Report) -> Result:
        encoded, tokenizer = split.encoded, forward.tokenizer
        longest = max((len(ids) for ids in encoded.candidates), default=max_new - 1)
        options: dict[str, Any] = {
            "max_new": longest + 1,
            "eos_id": tokenizer.eos_id,
            "batch": BATCH,
            "mesh": forward.mesh,
            "progress": report,
        }
        if forward.layout.prompts:
            options["which"] = [encoded.task(example) for example in range(len(encoded.ids))]
        run = generate if beams == 1 else functools.partial(beam_search, beams=beams)
        ids = run(forward.model, forward.weights, shared, encoded.inputs, **options)
        if split.task.verbalizers:
            return generated_labels(split, ids, tokenizer)
        answers = [tokenizer.decode(one).strip().split("\n")[0].strip() for one in ids]
        predictions = [
            {"answers": list(right), "predicted": answer}
            for right, answer in zip(encoded.answers, answers, strict=True)
        ]
        return Result(free_text(answers, encoded.answers), predictions)

    return evaluate


def generated_labels(split: Split, ids: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Result:
    """Computes the result of `generation` for a task with verbalizers."""
    labels, texts = list(split.task.verbalizers), list(split.task.verbalizers.values())
    predicted_N, illegal = read_labels(ids, texts, tokenizer)
    metrics = classification(predicted_N, split.encoded.labels, len(labels))
    names = {"accuracy": "generated_accuracy", "macro_f1": "generated_macro_f1"}
    predictions = [
        {
            "label": _name(labels, label),
            "generated": tokenizer.decode(one),
            "generated_label": _name(labels, predicted),
        }
        for label, predicted, one in zip(split.encoded.labels, predicted_N, ids, strict=True)
    ]
    renamed = {names.get(name, name): value for name, value in metrics.items()}
    return Result({**renamed, "illegal": illegal}, predictions)


def _name(labels: Sequence[str], index: int) -> str | None:
    """The name of a label; None for -1."""
    return labels[index] if index >= 0 else None
