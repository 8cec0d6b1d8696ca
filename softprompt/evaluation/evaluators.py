"""Evaluators: each computes metrics of a delta on a split, and a prediction for every example.

An evaluator is a function (inputs, shared, split, progress) -> Result. `inputs` has the inputs of
a forward pass besides the delta. `shared` is computed from the delta once for all rows. `split` has
the examples of one task. `Task.metrics` lists a task's evaluators and the metrics of each.

Two measurements are not evaluators. Latency (`softprompt.evaluation.latency`) compares two models.
A text whose perplexity is measured (`softprompt.evaluation.perplexity`) has no task.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from softprompt.data.encode import Encoded
from softprompt.data.eval_batches import EvalBatch
from softprompt.data.rows import RowLayout
from softprompt.data.tasks import ANSWER_METRICS, LABEL_METRICS, Task
from softprompt.evaluation import metrics as measures
from softprompt.evaluation.ranking import Scores, normalise, score_batches, scored_at_once
from softprompt.inference.beam import beam_search
from softprompt.inference.continuous import generate_in_pool
from softprompt.inference.decode import Report, generate
from softprompt.models import Decoder, Model
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.training.step import Shared

BATCH = 64  # inputs in one generation batch


class EvaluatorInputs(NamedTuple):
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


Evaluator = Callable[[EvaluatorInputs, Shared, Split, Report], Result]


def ranking(score: str = "sum") -> Evaluator:
    """Predicts the most probable candidate.

    Args:
        score: "sum" or "mean" of the log-probabilities of a candidate's tokens.
    """

    def evaluate(inputs: EvaluatorInputs, shared: Shared, split: Split, report: Report) -> Result:
        found = score_batches(
            inputs.model,
            inputs.weights,
            shared,
            split.batches(),
            mesh=inputs.mesh,
            at_once=scored_at_once(inputs.mesh),
            progress=report,
        )
        return ranked(split, found, score)

    return evaluate


def ranked(split: Split, found: Scores, score: str) -> Result:
    """Computes the result of `ranking` from the candidates' scores."""
    task, encoded = split.task, split.encoded
    names: Sequence[Sequence[str]] = encoded.choices or [task.labels] * len(encoded.ids)
    scores_NC = np.where(found[1] > 0, normalise(*found, score), -np.inf)
    predicted_N = scores_NC.argmax(axis=1)
    predicted = [own[index] for own, index in zip(names, predicted_N, strict=True)]
    if encoded.choices:
        metrics = measures.choice(predicted, encoded.answers, encoded.groups)
        right: Sequence[Any] = [{"answers": list(answers)} for answers in encoded.answers]
    else:
        metrics = _label_metrics(split, predicted_N)
        right = [{"label": _name(task.labels, label)} for label in encoded.labels]
    predictions = [
        {
            **answer,
            "predicted": text,
            "scores": dict(zip(own, row_C[: len(own)].round(5).tolist(), strict=True)),
        }
        for answer, text, own, row_C in zip(right, predicted, names, scores_NC, strict=True)
    ]
    return Result(metrics, predictions)


def _label_metrics(split: Split, predicted_N: np.ndarray) -> dict[str, float]:
    """The metrics of predicted labels, by their names in `LABEL_METRICS`."""
    task = split.task
    found = measures.classification(
        predicted_N,
        split.encoded.labels,
        len(task.labels),
        positive=task.labels.index(task.positive) if task.positive in task.labels else None,
        groups=split.encoded.groups,
    )
    return measures.task_score(found, task.reported)


def generation(beams: int = 1, max_new: int = 32) -> Evaluator:
    """Generates answers, each up to EOS or the end of the line.

    For a task with verbalizers an answer is parsed as a label. An answer that is not a label counts
    as wrong; `illegal` is the share of such answers.

    Args:
        beams: beam width; 1 is greedy decoding.
        max_new: largest number of tokens of an answer to a free-text task.
    """

    def evaluate(inputs: EvaluatorInputs, shared: Shared, split: Split, report: Report) -> Result:
        encoded, tokenizer = split.encoded, inputs.tokenizer
        longest = max((len(ids) for ids in encoded.candidates), default=max_new - 1)
        options: dict[str, Any] = {
            "max_new": longest + 1,
            "eos_id": tokenizer.eos_id,
            "batch": BATCH,
            "progress": report,
        }
        run: Callable[..., list[list[int]]] = generate_in_pool
        if beams > 1 or not _fits_pool(inputs):
            options["mesh"] = inputs.mesh
            if inputs.layout.prompts:
                options["which"] = [encoded.task(example) for example in range(len(encoded.ids))]
            run = generate if beams == 1 else functools.partial(beam_search, beams=beams)
        ids = run(inputs.model, inputs.weights, shared, encoded.inputs, **options)
        if split.task.verbalizers:
            return generated_labels(split, ids, tokenizer)
        return generated_answers(split, [_first_line(tokenizer.decode(one)) for one in ids])

    return evaluate


def _fits_pool(inputs: EvaluatorInputs) -> bool:
    """Whether a pool can run the rows: of a decoder, on one device, after a single context."""
    alone = inputs.mesh.size == 1 and not inputs.layout.prompts
    return alone and isinstance(inputs.model, Decoder)


def _first_line(text: str) -> str:
    """The first line of a generated answer."""
    return text.strip().split("\n")[0].strip()


def generated_answers(split: Split, predicted: Sequence[str]) -> Result:
    """Computes the result of `generation` for a free-text task, from the answers."""
    task, encoded = split.task, split.encoded
    predictions: list[dict[str, Any]] = [
        {"answers": list(right), "generated" if encoded.choices else "predicted": text}
        for right, text in zip(encoded.answers, predicted, strict=True)
    ]
    if task.correct_field:
        named = [right[0] for right in encoded.answers]
        found = measures.referents(predicted, named, encoded.labels)
    else:
        found = measures.free_text(predicted, encoded.answers, encoded.groups)
    found = measures.task_score(found, task.reported)
    if encoded.choices:
        found["illegal"] = measures.illegal_share(predicted, encoded.choices)
    return Result(_renamed(found, keep=ANSWER_METRICS), predictions)


def _renamed(found: Mapping[str, float], *, keep: Sequence[str] = ()) -> dict[str, float]:
    """Metrics of generated answers by names that differ from those of ranked candidates."""
    return {
        f"generated_{name}" if name in LABEL_METRICS and name not in keep else name: value
        for name, value in found.items()
    }


def generated_labels(split: Split, ids: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Result:
    """Computes the result of `generation` for a task with verbalizers."""
    task, labels = split.task, split.encoded.labels
    texts = list(task.verbalizers.values())
    predicted_N, illegal = measures.read_labels(ids, texts, tokenizer, exact=task.exact)
    predictions = [
        {
            "label": _name(task.labels, label),
            "generated": tokenizer.decode(one),
            "generated_label": _name(task.labels, predicted),
        }
        for label, predicted, one in zip(labels, predicted_N, ids, strict=True)
    ]
    found = _label_metrics(split, predicted_N)
    return Result({**_renamed(found), "illegal": illegal}, predictions)


def _name(labels: Sequence[str], index: int) -> str | None:
    """The name of a label; None for -1."""
    return labels[index] if index >= 0 else None
