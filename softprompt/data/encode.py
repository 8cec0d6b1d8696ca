"""Encodes records as token ids: fills the template, and shortens the fields of long inputs."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from softprompt.data.sources import Record
from softprompt.data.subsets import records_digest
from softprompt.data.tasks import Task, parse_template, target_text
from softprompt.errors import UserError
from softprompt.pretrained.tokenizer import Tokenizer

CHUNK = 4096  # texts tokenised together; bounds the memory for offsets


@dataclass(frozen=True)
class Encoded:
    """A split as token ids.

    Attributes:
        ids: the examples' ids.
        inputs: int32 token ids of each input, with BOS where one was asked for.
        targets: int32 token ids of each target; empty for an unlabelled example.
        labels: int32 [N], index into the candidates; -1 for an unlabelled example, and for all
            examples of a free-text task. Where answers may be wrong (`Task.correct_field`), 1 for a
            right one, 0 for a wrong one and -1 where it is not known.
        candidates: int32 token ids of each verbalizer in the task's order; () for a free-text task.
        truncated: number of inputs that were shortened.
        label_names: the labels' names, in the candidates' order.
        tasks: int32 [N], the number of each example's task in a mixture; None where all examples
            are of task 0.
        eos: whether targets and candidates end with EOS.
        answers: each example's right answers, the first of which is its target; an empty tuple for
            an example without one, and () for a classification task.
        groups: the group of each example; () where there are none.
        choices: the texts of each example's own candidates; () where all have the same or none.
        choice_ids: int32 token ids of `choices`.
        words: int32 token ids of what class-label initialisation begins with, for a task without
            verbalizers.
        digest: the first 16 hex digits of a SHA-256 of the examples' ids, texts and labels or
            answers, in order; "" where the examples come from no records.
    """

    ids: list[str]
    inputs: list[np.ndarray]
    targets: list[np.ndarray]
    labels: np.ndarray
    candidates: tuple[np.ndarray, ...]
    truncated: int
    label_names: tuple[str, ...] = ()
    tasks: np.ndarray | None = None
    eos: bool = False
    answers: tuple[tuple[str, ...], ...] = ()
    groups: tuple[str, ...] = ()
    choices: tuple[tuple[str, ...], ...] = ()
    choice_ids: tuple[tuple[np.ndarray, ...], ...] = ()
    words: tuple[np.ndarray, ...] = ()
    digest: str = ""

    def without_eos(self, tokens: np.ndarray) -> np.ndarray:
        """The token ids of a target's or a candidate's text alone, without the EOS after it."""
        return tokens[:-1] if self.eos else tokens

    def ranked(self, example: int) -> tuple[np.ndarray, ...]:
        """The token ids of the candidates that are ranked after an example's input."""
        return self.choice_ids[example] if self.choice_ids else self.candidates

    def task(self, example: int) -> int:
        """The number of an example's task."""
        return 0 if self.tasks is None else int(self.tasks[example])

    def without_opening(self, count: int) -> "Encoded":
        """The same without the first `count` tokens of every input."""
        return replace(self, inputs=[tokens[count:] for tokens in self.inputs])


def common_opening(inputs: Iterable[np.ndarray]) -> np.ndarray:
    """The tokens that all inputs begin with; each input has at least one more token.

    Tokens are compared, not text. What a tokenizer merges across the end of a template's first
    words in some input is therefore not in the opening.
    """
    rest = iter(inputs)
    opening = next(rest)[:-1]
    for tokens in rest:
        start = tokens[: min(len(opening), len(tokens) - 1)]
        same = opening[: len(start)] == start
        opening = start if same.all() else start[: int(same.argmin())]
        if not len(opening):
            break
    return opening


def encode(
    records: Sequence[Record],
    task: Task,
    tokenizer: Tokenizer,
    *,
    max_input: int,
    max_target: int,
    bos: bool,
    eos: bool,
    input_eos: bool = False,
) -> Encoded:
    """Tokenises records for a task, inputs and targets separately.

    An input of more than `max_input` tokens loses tokens at the end of its longest field, or of its
    longest fields equally, until it fits. Only tokens that lie entirely inside a field are dropped,
    so the template stays complete. A target is never shortened.

    Args:
        records: hold the fields that the template names.
        task: its template and verbalizers are used.
        tokenizer: the model's.
        max_input: largest number of tokens of an input, BOS included.
        max_target: largest number of tokens of a target, EOS included.
        bos: begin each input with BOS.
        eos: end each target and candidate with EOS.
        input_eos: end each input with EOS, which is never dropped.

    Raises:
        UserError: a target or the template alone is too long, an input has no tokens, two
            verbalizers have the same tokens, or the tokenizer lacks the BOS or EOS.
    """
    prefix = _special(tokenizer.bos_id, "BOS", bos)
    suffix = _special(tokenizer.eos_id, "EOS", eos)
    candidates = _candidates(tokenizer, task, suffix, max_target)
    labels = _labels(records, task)
    around = prefix, _special(tokenizer.eos_id, "EOS", input_eos)
    inputs, truncated = _inputs(records, task, tokenizer, around, max_input)

    def answer(record: Record, text: str, name: str) -> np.ndarray:
        where = f"{name} of example {record['id']!r}"
        return _target(tokenizer, target_text(task, text), suffix, max_target, where)

    def target(record: Record, label: int) -> np.ndarray:
        if record["label"] is None:
            return np.zeros(0, np.int32)
        return candidates[label] if candidates else answer(record, record["label"], "target")

    return Encoded(
        ids=[record["id"] for record in records],
        inputs=inputs,
        targets=[target(*pair) for pair in zip(records, labels, strict=True)],
        labels=labels,
        candidates=candidates,
        truncated=truncated,
        label_names=task.labels,
        eos=eos,
        digest=records_digest(records, task.fields),
        **_own_parts(records, task, tokenizer, answer),
    )


def _own_parts(
    records: Sequence[Record], task: Task, tokenizer: Tokenizer, answer: Callable[..., np.ndarray]
) -> dict[str, Any]:
    """The fields of `Encoded` that only some tasks have."""
    choices = tuple(record["candidates"] for record in records if "candidates" in record)
    pairs = zip(records, choices, strict=False)
    words = [tokenizer.encode_continuation(f" {word}") for word in task.words]
    return {
        "answers": () if task.verbalizers else tuple(one.get("answers", ()) for one in records),
        "groups": tuple(record["group"] for record in records if "group" in record),
        "choices": choices,
        "choice_ids": tuple(
            tuple(answer(record, text, "candidate") for text in texts) for record, texts in pairs
        ),
        "words": tuple(np.array(ids, np.int32) for ids in words),
    }


def _labels(records: Sequence[Record], task: Task) -> np.ndarray:
    """The index of each record's label, or whether its answer is right; see `Encoded.labels`."""
    if task.correct_field:
        right = {None: -1, False: 0, True: 1}
        return np.array([right[record.get("correct")] for record in records], np.int32)
    index = {label: number for number, label in enumerate(task.labels)}
    return np.array([index.get(record["label"], -1) for record in records], np.int32)


def _candidates(
    tokenizer: Tokenizer, task: Task, suffix: list[int], max_target: int
) -> tuple[np.ndarray, ...]:
    """The token ids of each verbalizer."""
    candidates = tuple(
        _target(tokenizer, target, suffix, max_target, f"verbalizer {target!r}")
        for target in task.verbalizers.values()
    )
    if len({tuple(tokens) for tokens in candidates}) < len(candidates):
        raise UserError(f"task {task.name!r}: two of its verbalizers have the same tokens")
    return candidates


def _special(token: int | None, name: str, wanted: bool) -> list[int]:
    """A list of the special token where it is wanted, else an empty list."""
    if wanted and token is None:
        raise UserError(f"the model's tokenizer has no {name} token, and the config asks for one")
    return [token] if wanted and token is not None else []


def _target(
    tokenizer: Tokenizer, text: str, suffix: list[int], max_target: int, where: str
) -> np.ndarray:
    """The token ids of a target, as the continuation of an input."""
    tokens = [*tokenizer.encode_continuation(text), *suffix]
    if len(tokens) > max_target:
        raise UserError(f"{where} has {len(tokens)} tokens; task.max_target is {max_target}")
    if len(tokens) == len(suffix):
        raise UserError(f"{where} has no tokens")
    return np.array(tokens, np.int32)


def _inputs(
    records: Sequence[Record],
    task: Task,
    tokenizer: Tokenizer,
    around: tuple[list[int], list[int]],
    limit: int,
) -> tuple[list[np.ndarray], int]:
    """The token ids of every input between those `around` it, and how many were shortened."""
    segments, (prefix, suffix) = parse_template(task.template), around
    room = limit - len(prefix) - len(suffix)
    inputs, truncated = [], 0
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        filled = [_fill(segments, record) for record in chunk]
        texts = [text for text, _ in filled]
        encodings = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
        for record, (text, spans), encoding in zip(chunk, filled, encodings, strict=True):
            tokens = encoding.ids
            if len(tokens) > room:
                keep = _tokens_to_keep(encoding.offsets, spans, len(text), room)
                if len(keep) > room:
                    raise UserError(
                        f"example {record['id']!r}: the template alone takes "
                        f"{limit - room + len(keep)} tokens; task.max_input is {limit}"
                    )
                tokens = [tokens[index] for index in keep]
                truncated += 1
            if not (prefix or tokens or suffix):
                raise UserError(
                    f"example {record['id']!r}: its input, of {task.template!r}, has no tokens"
                )
            inputs.append(np.array([*prefix, *tokens, *suffix], np.int32))
    return inputs, truncated


def _fill(segments: list[tuple[str, str]], record: Record) -> tuple[str, list[tuple[int, int]]]:
    """The filled template, and each field's span of characters [start, end) in it."""
    text, spans = "", []
    for literal, name in segments:
        text += literal
        if name:
            spans.append((len(text), len(text) + len(record[name])))
            text += record[name]
    return text, spans


def _tokens_to_keep(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]], length: int, limit: int
) -> list[int]:
    """Indices of the tokens to keep: at most `limit` if dropping tokens of fields achieves that."""
    ranges = [_inside(offsets, span, length) for span in spans]
    sizes = [stop - start for start, stop in ranges]
    over = len(offsets) - limit
    while over > 0 and max(sizes, default=0) > 0:
        longest = max(range(len(sizes)), key=lambda field: sizes[field])
        second = max((size for field, size in enumerate(sizes) if field != longest), default=0)
        dropped = min(over, max(1, sizes[longest] - second))
        sizes[longest] -= dropped
        over -= dropped
    dropped_tokens: set[int] = set()
    for (start, stop), size in zip(ranges, sizes, strict=True):
        cut = start + size
        while start < cut < stop and offsets[cut - 1][1] > offsets[cut][0]:
            cut -= 1  # the tokens on both sides are bytes of one character
        dropped_tokens.update(range(cut, stop))
    return [token for token in range(len(offsets)) if token not in dropped_tokens]


def _inside(offsets: list[tuple[int, int]], span: tuple[int, int], length: int) -> tuple[int, int]:
    """The range of tokens that lie entirely inside a span of characters.

    Characters that no token covers (some tokenizers trim spaces from their offsets) count to both
    neighbours, so a token that may carry a piece of the template is never counted as inside.
    """
    inside = []
    for token, (start, end) in enumerate(offsets):
        before = offsets[token - 1][1] if token else 0
        after = offsets[token + 1][0] if token + 1 < len(offsets) else length
        if span[0] <= min(start, before) and max(end, after) <= span[1]:
            inside.append(token)
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def mix(splits: Mapping[str, Encoded]) -> Encoded:
    """Joins the examples of several tasks, so that tasks are mixed in proportion to their sizes.

    Source: arXiv 1910.10683, section 3.5.2.

    Args:
        splits: the tasks' splits by name, in the order of their numbers. Names are put before ids,
            which tasks may share.
    """
    parts = list(splits.values())
    candidates = {tuple(ids): ids for part in parts for ids in part.candidates}
    index = {tokens: number for number, tokens in enumerate(candidates)}
    labels = [
        index[tuple(part.candidates[label])] if part.candidates and label >= 0 else -1
        for part in parts
        for label in part.labels.tolist()
    ]
    digests = "".join(f"{name} {part.digest}\n" for name, part in splits.items())
    return Encoded(
        ids=[f"{name}/{one}" for name, part in splits.items() for one in part.ids],
        inputs=[ids for part in parts for ids in part.inputs],
        targets=[ids for part in parts for ids in part.targets],
        labels=np.array(labels, np.int32),
        candidates=tuple(candidates.values()),
        truncated=sum(part.truncated for part in parts),
        tasks=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.ids) for part in parts]),
        eos=parts[0].eos,
        answers=tuple(one for part in parts for one in part.answers or [()] * len(part.ids)),
        words=tuple(word for part in parts for word in part.words),
        digest=hashlib.sha256(digests.encode()).hexdigest()[:16],
    )


def check_ranking(encoded: Encoded, score: str) -> None:
    """Checks that `eval.score` lets every candidate of a task win.

    Raises:
        UserError: scores are sums of log-probabilities, and a candidate begins with another one.
    """
    if score != "sum":
        return
    names = encoded.choices or (encoded.label_names,)
    for texts, ids in zip(names, encoded.choice_ids or (encoded.candidates,), strict=True):
        candidates = {tuple(tokens.tolist()): text for text, tokens in zip(texts, ids, strict=True)}
        for one, text in candidates.items():
            starts = [candidates.get(one[:end]) for end in range(1, len(one))]
            if other := next(filter(None, starts), None):
                raise UserError(
                    f"the {'candidate' if encoded.choices else 'verbalizer of'} {text!r} begins "
                    f"with that of {other!r}, and so is never the likelier by config key "
                    "'eval.score'=sum; allowed: mean, or task.eos=True"
                )


def target_advice(encoded: Encoded, score: str) -> str:
    """Returns a line for a task whose targets suit the config badly, or "".

    A sum of log-probabilities (`eval.score`) falls with every token, so of labels with different
    numbers of tokens it favours the short ones. A model that is trained on free text without EOS
    does not learn where an answer ends.
    """
    if not encoded.candidates and not encoded.eos:
        return "answers have no EOS, so generated ones do not end; consider task.eos=True"
    lengths = [len(encoded.without_eos(tokens)) for tokens in encoded.candidates]
    if score != "sum" or len(set(lengths)) < 2:
        return ""
    return (
        f"labels have {min(lengths)} to {max(lengths)} tokens, and eval.score=sum favours short "
        "ones; consider eval.score=mean, or verbalizers of equal length"
    )


def summary(encoded: Encoded) -> dict[str, Any]:
    """Returns counts for a report: examples, truncated inputs, labels by name, token lengths."""
    counts = Counter(encoded.labels.tolist())
    lengths_N = np.array([len(tokens) for tokens in encoded.inputs] or [0])
    targets_N = np.array([len(tokens) for tokens in encoded.targets] or [0])
    return {
        "examples": len(encoded.ids),
        "truncated": encoded.truncated,
        "unlabelled": int((targets_N == 0).sum()) if encoded.ids else 0,
        "labels": {name: counts[label] for label, name in enumerate(encoded.label_names)},
        "input_tokens_mean": float(lengths_N.mean()),
        "input_tokens_max": int(lengths_N.max()),
        "target_tokens_max": int(targets_N.max()),
    }
