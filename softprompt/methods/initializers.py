"""Initialisers of prompts: functions (key, embedding_VD, P) -> prompt_PD.

The embeddings are already scaled if the model scales them. `INITIALIZERS` maps the values of
`method.init` to the initialisers' settings classes.

Source: Lester et al. 2021, section 3.2, "Prompt initialization".
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.methods.delta_file import load_delta
from softprompt.settings import Settings, setting

if TYPE_CHECKING:  # this import loads the readers of all model formats
    from softprompt.pretrained.loading import Loaded

Initializer = Callable[[jax.Array, jax.Array, int], jax.Array]


def embedding_rms(embedding_VD: jax.Array) -> jax.Array:
    """Root mean square of the embedding matrix's entries."""
    return jnp.sqrt(jnp.mean(jnp.square(embedding_VD.astype(jnp.float32))))


def uniform(bound: float | None = None) -> Initializer:
    """Uniform in [-bound, bound]; without a bound, scaled to the embeddings' RMS.

    The paper uses a bound of 0.5 for embeddings with an RMS near 10.7 (T5 1.1). The same bound is
    relatively much larger for a model whose embeddings have an RMS of 0.1.
    """

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        limit = 3**0.5 * embedding_rms(embedding_VD) if bound is None else bound
        shape = (length, embedding_VD.shape[1])
        return limit * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)

    return rows


def vocabulary(ids: Sequence[int]) -> Initializer:
    """Rows of the embedding matrix, sampled from `ids`, without replacement if there are enough."""
    pool = np.asarray(ids, np.int32)

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        replace = length > len(pool)
        return embedding_VD[jax.random.choice(key, pool, (length,), replace=replace)]

    return rows


def fixed(ids: Sequence[Sequence[int]], rest: Initializer) -> Initializer:
    """The mean embedding of each group of token ids, then rows of `rest`.

    If the groups are the verbalizers, this is the paper's class-label initialisation. Groups beyond
    the prompt's length are ignored.
    """

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        groups = [np.asarray(g, np.int32) for g in ids[:length]]
        first = jnp.stack([jnp.mean(embedding_VD[g].astype(jnp.float32), axis=0) for g in groups])
        return _extended(first, rest, key, embedding_VD, length)

    return rows


def text(ids: Sequence[int]) -> Initializer:
    """The embeddings of a text, truncated or repeated to the prompt's length."""

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        return embedding_VD[np.resize(np.asarray(ids, np.int32), length)]

    return rows


def from_rows(prompt_PD: np.ndarray, rest: Initializer, *, name: str) -> Initializer:
    """Another prompt, truncated to the prompt's length or extended with rows of `rest`.

    Args:
        prompt_PD: the other prompt.
        rest: initialises the missing rows.
        name: the other prompt's file, for errors.

    Raises:
        UserError: its width is not the model's (raised when the initialiser runs).
    """

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        width = embedding_VD.shape[1]
        if prompt_PD.ndim != 2 or prompt_PD.shape[1] != width:
            raise UserError(
                f"{name}: a prompt of shape {list(prompt_PD.shape)} does not fit this model; "
                f"allowed: [any length, {width}]"
            )
        first = jnp.asarray(prompt_PD[:length])
        return _extended(first, rest, key, embedding_VD, length)

    return rows


def _extended(
    first_PD: jax.Array, rest: Initializer, key: jax.Array, embedding_VD: jax.Array, length: int
) -> jax.Array:
    """Rows, followed by rows of `rest` up to the prompt's length."""
    missing = length - len(first_PD)
    if missing == 0:
        return first_PD
    return jnp.concatenate([first_PD, rest(key, embedding_VD, missing).astype(first_PD.dtype)])


def common_tokens(texts: Iterable[Iterable[int]], number: int) -> list[int]:
    """Ids of the `number` most common tokens in tokenised texts, most common first.

    The paper samples "from the 5,000 most common tokens", which T5's vocabulary lists first. Other
    vocabularies are not sorted by frequency, so tokens are counted. Ties go to the smaller id.
    """
    counts: collections.Counter[int] = collections.Counter()
    for ids in texts:
        counts.update(ids)
    order = sorted(counts, key=lambda i: (-counts[i], i))
    return order[:number]


@dataclasses.dataclass(frozen=True)
class InitializerSettings(Settings):
    """Base class of the initialisers' settings.

    Attributes:
        from_file: it reads the prompt's first rows from `method.init_file`.
    """

    section = "method"
    from_file: ClassVar[bool] = False

    def initializer(self, loaded: "Loaded", train: Encoded, *, place: str) -> Initializer:
        """The initialiser for a model.

        Args:
            loaded: the model.
            train: the training examples.
            place: `method.place`.

        Raises:
            UserError: its text or file cannot be used for this model.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Uniform(InitializerSettings):
    """Uniform noise with the embeddings' RMS."""

    bound: ClassVar[float | None] = None

    def initializer(self, loaded: "Loaded", train: Encoded, *, place: str) -> Initializer:
        """See `uniform`."""
        return uniform(self.bound)


@dataclasses.dataclass(frozen=True)
class UniformPaper(Uniform):
    """Uniform noise in [-0.5, 0.5]."""

    bound = 0.5


@dataclasses.dataclass(frozen=True)
class Vocabulary(InitializerSettings):
    """Embeddings of common tokens."""

    common_tokens: int = setting(5000, "how many of the most common tokens are sampled from", low=1)
    common_text: str = setting(
        "train",
        "the text whose tokens are counted: train (the train split) or a text file's path; or "
        "vocabulary, whose first tokens are taken as they are listed, as in the paper",
    )

    def initializer(self, loaded: "Loaded", train: Encoded, *, place: str) -> Initializer:
        """See `vocabulary`."""
        return vocabulary(self.common_ids(loaded, train))

    def common_ids(self, loaded: "Loaded", train: Encoded) -> list[int]:
        """The most common tokens of the train split's inputs, or of a file's lines.

        BOS and EOS of the inputs are not counted. T5's vocabulary lists common tokens first: with
        "vocabulary", its first ids are taken, as `from_sample_of_embeddings` of
        google-research/prompt-tuning does.
        """
        if self.common_text == "vocabulary":
            return list(range(min(self.common_tokens, loaded.tokenizer.vocab_size)))
        added = {loaded.tokenizer.bos_id, loaded.tokenizer.eos_id}
        texts: Iterable[Sequence[int]]
        if self.common_text == "train":
            texts = ([i for i in ids.tolist() if i not in added] for ids in train.inputs)
        else:
            texts = map(loaded.tokenizer.encode, self._lines())
        found = common_tokens(texts, self.common_tokens)
        if not found:
            raise UserError(
                f"config key 'method.common_text' is {self.common_text!r}; allowed: a text that "
                "has tokens"
            )
        return found

    def _lines(self) -> list[str]:
        try:
            return epath.Path(self.common_text).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"config key 'method.common_text' is {self.common_text!r}: {error}; allowed: "
                "train, vocabulary, or a text file"
            ) from error


@dataclasses.dataclass(frozen=True)
class Labels(Vocabulary):
    """Mean embeddings of each label's verbalizer or words, then embeddings of common tokens."""

    def initializer(self, loaded: "Loaded", train: Encoded, *, place: str) -> Initializer:
        """See `fixed`."""
        texts = [train.without_eos(ids).tolist() for ids in train.candidates]
        texts += [ids.tolist() for ids in train.words]
        if not texts:
            raise UserError("config key 'method.init' is 'labels'; this task has no verbalizers")
        rest = super().initializer(loaded, train, place=place)
        return fixed(texts, rest)


@dataclasses.dataclass(frozen=True)
class Text(InitializerSettings):
    """The embeddings of a text's tokens, repeated if the text is short."""

    init_text: str = setting("", "the text whose token embeddings start the prompt")

    def check(self) -> None:
        """Checks that the text is not empty."""
        if not self.init_text:
            raise UserError("config key 'method.init_text' is empty; method.init=text needs it")

    def initializer(self, loaded: "Loaded", train: Encoded, *, place: str) -> Initializer:
        """See `text`."""
        ids = loaded.tokenizer.encode(self.init_text)
        if not ids:
            raise UserError("config key 'method.init_text' has no tokens")
        return text(ids)


@dataclasses.dataclass(frozen=True)
class File(Vocabulary):
    """The vectors of a trained prompt, then embeddings of common tokens."""

    from_file = True

    init_file: str = setting(
        "",
        "a delta.safetensors, whose prompt is cut or extended to `length`; or trial:ID for that of "
        "a finished trial whose folder is beside this one's",
    )
    init_any_weights: bool = setting(
        False, "accept a prompt that was trained on other weights", scientific=False
    )

    def check(self) -> None:
        """Checks that the file's name is not empty."""
        if not self.init_file:
            raise UserError("config key 'method.init_file' is empty; method.init=file needs it")

    def initializer(self, loaded: "Loaded", train: Encoded, *, place: str) -> Initializer:
        """See `from_rows`; without a file, all rows are embeddings of common tokens.

        Raises:
            UserError: see `prompt_rows`; or the prompt was trained on other weights.
        """
        if not self.init_file:  # in an estimate, if the other trial's prompt does not exist yet
            return super().initializer(loaded, train, place=place)
        rows_PD, origin = prompt_rows(self.init_file, place)
        trained = origin.get("fingerprint", loaded.fingerprint)
        fits = rows_PD.shape[-1:] == (loaded.config.prompt_width,)  # else `from_rows` raises
        if fits and trained != loaded.fingerprint and not self.init_any_weights:
            raise UserError(
                f"{self.init_file} was trained on weights {trained}, {loaded.name} has "
                f"{loaded.fingerprint}; method.init_any_weights=True starts from it nevertheless"
            )
        rest = super().initializer(loaded, train, place=place)
        return from_rows(rows_PD, rest, name=self.init_file)


INITIALIZERS: dict[str, type[InitializerSettings]] = {
    "vocabulary": Vocabulary,
    "uniform": Uniform,
    "uniform_paper": UniformPaper,
    "labels": Labels,
    "text": Text,
    "file": File,
}


def prompt_rows(file: str, place: str = "encoder") -> tuple[np.ndarray, dict[str, Any]]:
    """The prompt [P, D] of a delta file, and the file's provenance.

    Args:
        file: a delta.
        place: `method.place`, which selects the prompt if the file has one for each stack.

    Raises:
        UserError: the file is unreadable, has no prompt, has other tensors that belong to the
            prompt, or has two prompts of which `place` selects none.
    """
    delta, origin = load_delta(file)
    parts = {"": delta, "encoder": delta.get("encoder"), "decoder": delta.get("decoder")}
    found = {
        name: part
        for name, part in parts.items()
        if isinstance(part, dict) and isinstance(part.get("prompt"), np.ndarray)
    }
    if not found:
        raise UserError(f"{file}: no tensor 'prompt' in it; it has {', '.join(delta) or 'none'}")
    if len(found) > 1 and place not in found:
        raise UserError(
            f"{file} has prompts of {' and '.join(found)}; config key 'method.place' is {place!r}; "
            f"allowed: {', '.join(found)}"
        )
    part = found[place] if place in found else next(iter(found.values()))
    if others := part.keys() - {"prompt"}:
        raise UserError(
            f"{file}: its 'prompt' is incomplete without its other tensors, "
            f"{', '.join(sorted(others))}; allowed: prompts of method.name=prompt"
        )
    return part["prompt"], origin
