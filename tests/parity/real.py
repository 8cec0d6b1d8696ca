"""Logits of real models, ours and those of transformers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.pretrained.loading import Loaded

torch = pytest.importorskip("torch")


def reference_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def largest_difference(ours: Loaded, model: Any, texts_ids: list[list[int]]) -> float:
    """Over all positions of all texts; each text is run alone by both."""
    longest = max(map(len, texts_ids))
    apply = jax.jit(ours.model.apply)
    worst = 0.0
    for ids in texts_ids:
        padded_T = jnp.array(ids + [0] * (longest - len(ids)))  # causal: padding is not seen
        logits_TV = np.asarray(apply({"params": ours.weights}, padded_T))[: len(ids)]
        worst = max(worst, float(np.abs(logits_TV - reference_logits(model, ids)).max()))
    return worst
