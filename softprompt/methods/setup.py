"""From a config's words to token ids: what a prompt starts from, and few-shot contexts."""

import numpy as np
from etils import epath

from softprompt.config import ConfigDict
from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.methods import initializers
from softprompt.methods.prompt import PromptConfig
from softprompt.models.loading import Loaded


def prompt_config(config: ConfigDict, loaded: Loaded, train: Encoded) -> PromptConfig:
    """The prompt method's configuration, its initialiser's text resolved to token ids.

    Raises:
        UserError: an unreadable file, a text without tokens, a BOS that the tokenizer lacks.
    """
    method, bos = config.method, loaded.tokenizer.bos_id
    if method.bos == "before" and bos is None:
        raise UserError("config key 'method.bos' is 'before'; this model's tokenizer has no BOS")
    before = bos if method.bos == "before" else None
    both = ("encoder", "decoder")
    places = both if method.place == "both" else (method.place,)
    return PromptConfig(
        method.length,
        before,
        initializer(config, loaded, train),
        loaded.config.embed_scale,
        places if loaded.encoder_decoder else (),
    )


def initializer(config: ConfigDict, loaded: Loaded, train: Encoded) -> initializers.Initializer:
    """The initialiser that `config.method.init` names."""
    method = config.method
    if method.init == "uniform":
        return initializers.uniform()
    if method.init == "uniform_paper":
        return initializers.uniform(0.5)
    if method.init == "text":
        ids = loaded.tokenizer.encode(method.init_text)
        if not ids:
            raise UserError("config key 'method.init_text' has no tokens")
        return initializers.text(ids)
    rest = initializers.vocabulary(common_ids(config, loaded, train))
    if method.init == "vocabulary":
        return rest
    if method.init == "labels":
        if not train.candidates:
            raise UserError("config key 'method.init' is 'labels'; this task has no verbalizers")
        return initializers.fixed([ids.tolist() for ids in train.candidates], rest)
    return initializers.from_rows(prompt_rows(method.init_file), rest, name=method.init_file)


def common_ids(config: ConfigDict, loaded: Loaded, train: Encoded) -> list[int]:
    """The most common tokens of the named text: the train split's inputs, or a file's lines."""
    method = config.method
    if method.common_text == "train":
        return initializers.common_tokens(
            map(np.ndarray.tolist, train.inputs), method.common_tokens
        )
    try:
        lines = epath.Path(method.common_text).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config key 'method.common_text' is {method.common_text!r}: {error}; allowed: train, "
            "or a text file"
        ) from error
    return initializers.common_tokens(map(loaded.tokenizer.encode, lines), method.common_tokens)


def prompt_rows(file: str) -> np.ndarray:
    """The rows [P, D] of a prompt file.

    Raises:
        UserError: unreadable, or no prompt in it.
    """
    from softprompt.training.delta_file import load_delta

    delta, _ = load_delta(file)
    for place in (delta, delta.get("encoder"), delta.get("decoder")):
        if isinstance(place, dict) and isinstance(place.get("prompt"), np.ndarray):
            return place["prompt"]
    raise UserError(f"{file}: no tensor 'prompt' in it; it has {', '.join(delta) or 'none'}")


def few_shot_tokens(config: ConfigDict, loaded: Loaded, train: Encoded, *, room: int) -> np.ndarray:
    """Solved examples as one text, int32 [P]: a seeded draw, the labels balanced, in random order.

    Args:
        config: its `method.shots` and `seed` choose.
        loaded: the model, for its BOS and the blank line between examples.
        train: encoded without BOS.
        room: largest number of tokens that leaves the model room for an input and its target.

    Raises:
        UserError: fewer labelled examples than shots, or a longer text than there is room for.
    """
    shots, random = config.method.shots, np.random.default_rng([config.seed, 2])
    drawn = balanced_draw(train.labels, shots, random)
    if len(drawn) < shots:
        raise UserError(
            f"config key 'method.shots' is {shots}; allowed: at most {len(drawn)}, the labelled "
            "examples of the train split"
        )
    tokenizer = loaded.tokenizer
    gap = tokenizer.encode("\n\n")
    start = [tokenizer.bos_id] if tokenizer.add_bos and config.method.bos != "none" else []
    end = -1 if loaded.encoder_decoder and tokenizer.add_eos else None  # inputs end with EOS
    parts = [start] + [[*train.inputs[i][:end], *train.targets[i], *gap] for i in drawn]
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
