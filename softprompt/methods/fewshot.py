"""Few-shot prompting: solved examples before the text, as a prompt of token embeddings; no delta.

Source: Brown et al. 2020 (arXiv 2005.14165), section 2.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.methods.base import (
    ContextShape,
    MethodSettings,
    Setup,
    bos_setting,
    unchanged,
    wants_bos,
)
from softprompt.models import Model
from softprompt.models.quantize import embedding
from softprompt.settings import setting

if TYPE_CHECKING:  # this import loads the readers of all model formats
    from softprompt.pretrained.loading import Loaded

fold = unchanged


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
        """BOS comes before the examples, not before the text."""
        return True

    def label(self) -> str:
        """The method and its number of examples."""
        return f"{self.name}-{self.shots}"


@dataclasses.dataclass(frozen=True)
class FewshotConfig:
    """The static configuration.

    Attributes:
        tokens: of the examples.
        embed_scale: the model's, as in `PromptConfig`.
        stacks: the stack of an encoder-decoder that reads them, "encoder"; () for a decoder.
    """

    tokens: tuple[int, ...] = ()
    embed_scale: float = 1.0
    stacks: tuple[str, ...] = ()


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
    stacks = ("encoder",) if setup.encoder_decoder else ()
    return FewshotConfig(tuple(tokens_P.tolist()), setup.sizes.embed_scale, stacks)


def context(cfg: FewshotConfig) -> ContextShape:
    """The shape of the examples' context."""
    return ContextShape(len(cfg.tokens), cfg.stacks)


def init(key: jax.Array, model: Model, weights: Any, cfg: FewshotConfig) -> dict[str, jax.Array]:
    """Returns an empty delta."""
    return {}


def variables(delta: Any, weights: Any, cfg: FewshotConfig, task_ids: Any) -> dict[str, Any]:
    """The examples' scaled embeddings [P, D] as a prompt."""
    tokens_P = np.array(cfg.tokens, np.int32)
    rows_PD = embedding({name: leaf[tokens_P] for name, leaf in weights["embed"].items()})
    prompt = {"prompt": rows_PD * jnp.asarray(cfg.embed_scale, rows_PD.dtype)}
    return {stack: prompt for stack in cfg.stacks} if cfg.stacks else prompt


def few_shot_tokens(
    settings: Settings, loaded: "Loaded", train: Encoded, *, seed: int, room: int
) -> np.ndarray:
    """The token ids of solved examples as one text, int32 [P], drawn with balanced labels.

    Each example ends with a blank line and without EOS. (SentencePiece tokenizers begin every text
    with a space. The examples keep it, because the input after them has it too.)

    Args:
        settings: the number of examples, and `method.bos`.
        loaded: the model, whose tokenizer encodes BOS and the blank line.
        train: encoded without BOS.
        seed: of the draw and the order.
        room: the most tokens that leave the model room for an input and its target.

    Raises:
        UserError: fewer labelled examples than shots, more tokens than `room`, or no BOS in a
            tokenizer that needs one.
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
    """Shuffled indices of `number` labelled examples, with as equal label counts as possible."""
    order = random.permutation(np.flatnonzero(labels_N >= 0))
    rank_N = np.zeros(len(labels_N), np.int64)  # the number of earlier examples with the same label
    for label in np.unique(labels_N[order]):
        same = order[labels_N[order] == label]
        rank_N[same] = np.arange(len(same))
    return random.permutation(order[np.argsort(rank_N[order], kind="stable")][:number])
