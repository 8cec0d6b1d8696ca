"""Few-shot: solved examples before the text, as a prompt of their tokens' embeddings; no delta.

Source: Brown et al. 2020 (arXiv 2005.14165), section 2.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.methods.base import Context, MethodSettings, Setup, bos_setting, wants_bos
from softprompt.models import Model
from softprompt.models.quantize import embedding
from softprompt.settings import setting

if TYPE_CHECKING:  # it imports every format that a model may come in
    from softprompt.pretrained.loading import Loaded


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """Solved examples before the text."""

    name = "fewshot"
    trains = False
    is_context = True
    is_prompt = True
    shows_examples = True

    bos: str = bos_setting("after", "before", "none")
    shots: int = setting(16, "number of solved examples", low=1)

    @property
    def begins_with_bos(self) -> bool:
        """BOS stands before the examples, not before the text."""
        return True

    def label(self) -> str:
        """The method and its number of examples."""
        return f"{self.name}-{self.shots}"


@dataclasses.dataclass(frozen=True)
class FewshotConfig:
    """What the method needs to know.

    Attributes:
        tokens: of the examples.
        embed_scale: the model's, as in `PromptConfig`.
        places: an encoder-decoder's stack that reads them, "encoder"; () for a decoder.
    """

    tokens: tuple[int, ...] = ()
    embed_scale: float = 1.0
    places: tuple[str, ...] = ()


def resolve(settings: Settings, setup: Setup) -> FewshotConfig:
    """The static configuration for a trial.

    Raises:
        UserError: see `few_shot_tokens`.
    """
    if setup.loaded is None or setup.train is None:
        return FewshotConfig()
    tokens_P = few_shot_tokens(
        settings, setup.loaded, setup.train, seed=setup.seed, room=setup.room
    )
    places = ("encoder",) if setup.encoder_decoder else ()
    return FewshotConfig(tuple(tokens_P.tolist()), setup.sizes.embed_scale, places)


def context(cfg: FewshotConfig) -> Context:
    """What the examples take before a text."""
    return Context(len(cfg.tokens), cfg.places)


def init(key: jax.Array, model: Model, weights: Any, cfg: FewshotConfig) -> dict[str, jax.Array]:
    """Returns an empty delta."""
    return {}


def variables(delta: Any, weights: Any, cfg: FewshotConfig, task_ids: Any) -> dict[str, Any]:
    """The examples' embeddings [P, D] as the layers see them, in the place of a prompt."""
    tokens_P = np.array(cfg.tokens, np.int32)
    rows_PD = embedding({name: leaf[tokens_P] for name, leaf in weights["embed"].items()})
    prompt = {"prompt": rows_PD * jnp.asarray(cfg.embed_scale, rows_PD.dtype)}
    return {place: prompt for place in cfg.places} if cfg.places else prompt


def fold(delta: Any, cfg: FewshotConfig) -> Any:
    """Returns the delta as it is."""
    return delta


def few_shot_tokens(
    settings: Settings, loaded: "Loaded", train: Encoded, *, seed: int, room: int
) -> np.ndarray:
    """Solved examples as one text, int32 [P]: a seeded draw, the labels balanced, in random order.

    A blank line, and no EOS, ends each example. (An input keeps the space that a SentencePiece
    tokenizer begins every text with, as the input that is to be answered has it, too.)

    Args:
        settings: how many examples, and whether BOS stands before them.
        loaded: the model, for its BOS and the blank line between examples.
        train: encoded without BOS.
        seed: of the draw and the order.
        room: largest number of tokens that leaves the model room for an input and its target.

    Raises:
        UserError: fewer labelled examples than shots, a longer text than there is room for, or no
            BOS where one is wanted.
    """
    shots, random = settings.shots, np.random.default_rng([seed, 2])
    answered_N = np.array([len(ids) > 0 for ids in train.targets])
    labels_N = train.labels if train.candidates else np.where(answered_N, 0, -1)
    drawn = balanced_draw(labels_N, shots, random)
    if len(drawn) < shots:
        raise UserError(
            f"config key 'method.shots' is {shots}; allowed: at most {len(drawn)}, the labelled "
            "examples of the train split"
        )
    tokenizer = loaded.tokenizer
    gap = tokenizer.encode_continuation("\n\n")
    start = [tokenizer.bos_id] if wants_bos(settings.bos, tokenizer) else []
    end = -1 if loaded.encoder_decoder and tokenizer.add_eos else None  # inputs end with EOS
    parts = [start] + [
        [*train.inputs[i][:end], *train.without_eos(train.targets[i]), *gap] for i in drawn
    ]
    tokens_P = np.array([token for part in parts for token in part], np.int32)
    if len(tokens_P) > room:
        raise UserError(
            f"config key 'method.shots' is {shots}: {len(tokens_P)} tokens; the model has room for "
            f"{room} before an input"
        )
    return tokens_P


def balanced_draw(labels_N: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Indices of `number` labelled examples, as many of each label as can be, shuffled."""
    order = random.permutation(np.flatnonzero(labels_N >= 0))
    rank_N = np.zeros(len(labels_N), np.int64)  # how many of its label come before
    for label in np.unique(labels_N[order]):
        same = order[labels_N[order] == label]
        rank_N[same] = np.arange(len(same))
    return random.permutation(order[np.argsort(rank_N[order], kind="stable")][:number])
