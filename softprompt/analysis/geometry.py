"""Where a trained prompt's vectors lie among the embeddings of the vocabulary.

Source: Lester et al. 2021, section 7, which names these properties; the scores are defined here.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest tokens of each vector of a prompt, by cosine.

    Attributes:
        ids: [P, k], the nearest first.
        similarity: [P, k], their cosines.
        tightness: [P], the mean cosine between the k tokens themselves.
    """

    ids: npt.NDArray[np.integer]
    similarity: Floats
    tightness: Floats


def neighbours(prompt_PD: Floats, embedding_VD: Floats, *, count: int = 5) -> Neighbours:
    """Finds the nearest tokens of each vector; ties go to the smaller id.

    Args:
        prompt_PD: a prompt.
        embedding_VD: the rows of the vocabulary. Rows of zeros are near to nothing.
        count: k.
    """
    rows_VD = _unit(embedding_VD)
    cosine_PV = _unit(prompt_PD) @ rows_VD.T
    ids_PK = np.argsort(-cosine_PV, axis=1, kind="stable")[:, :count]
    near_PKD = rows_VD[ids_PK]
    between_PKK = np.einsum("pkd,pjd->pkj", near_PKD, near_PKD)
    pairs = max(1, count * (count - 1))
    own_P = np.einsum("pkk->p", between_PKK)
    tightness_P = (between_PKK.sum((1, 2)) - own_P) / pairs
    return Neighbours(ids_PK, np.take_along_axis(cosine_PV, ids_PK, 1), tightness_P)


def label_persistence(found: Neighbours, labels: Sequence[Sequence[int]]) -> float:
    """The share of vectors, started from labels, that have a token of their label near.

    Args:
        found: the neighbours of the trained prompt.
        labels: for each vector that started from a label, in order from the first, the label's
            tokens.
    """
    pairs = zip(found.ids.tolist(), labels, strict=False)  # the others started from other tokens
    kept = [bool(set(near) & set(tokens)) for near, tokens in pairs]
    return float(np.mean(kept)) if kept else float("nan")


def duplicate_rate(found: Neighbours) -> float:
    """The share of vectors whose nearest token is also that of an earlier vector."""
    nearest = found.ids[:, 0]
    return 1 - len(np.unique(nearest)) / len(nearest)


def norm_ratio(prompt_PD: Floats, embedding_VD: Floats) -> float:
    """The mean norm of the prompt's vectors over that of the vocabulary's rows."""
    means = [np.linalg.norm(rows, axis=-1).mean() for rows in (prompt_PD, embedding_VD)]
    return float(means[0] / means[1])


def displacement(prompt_PD: Floats, start_PD: Floats) -> float:
    """The mean distance that vectors moved in training, over the mean norm at the start."""
    moved = np.linalg.norm(prompt_PD - start_PD, axis=-1).mean()
    return float(moved / np.linalg.norm(start_PD, axis=-1).mean())


def measures(
    found: Neighbours,
    prompt_PD: Floats,
    start_PD: Floats,
    embedding_VD: Floats,
    labels: Sequence[Sequence[int]],
) -> dict[str, float]:
    """All numbers of a prompt: means over its vectors.

    Args:
        found: its neighbours.
        prompt_PD: the prompt.
        start_PD: what it started from.
        embedding_VD: the rows of the vocabulary.
        labels: see `label_persistence`.
    """
    return {
        "cosine to the nearest": float(found.similarity[:, 0].mean()),
        "tightness": float(found.tightness.mean()),
        "label persistence": label_persistence(found, labels),
        "duplicates": duplicate_rate(found),
        "norm": norm_ratio(prompt_PD, embedding_VD),
        "displacement": displacement(prompt_PD, start_PD),
    }


def prompt_similarity(one_PD: Floats, other_PD: Floats) -> float:
    """The mean cosine between all pairs of vectors of two prompts, of any lengths.

    Source: Vu et al. 2022 (SPoT, arXiv 2110.07904), similarity of tasks by their prompts.
    """
    return float((_unit(one_PD) @ _unit(other_PD).T).mean())


def _unit(rows: Floats) -> Floats:
    """Rows of length 1; rows of zeros stay so."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0))
