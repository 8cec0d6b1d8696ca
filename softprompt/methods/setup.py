"""From a config's words to token ids: what a prompt starts from, and few-shot contexts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from softprompt.config import ConfigDict, base_config, members
from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.methods import initializers
from softprompt.methods.adapter import AdapterConfig
from softprompt.methods.ia3 import Ia3Config
from softprompt.methods.lora import LoraConfig
from softprompt.methods.multitask import MultitaskConfig
from softprompt.methods.prefix import PrefixConfig
from softprompt.methods.prompt import PromptConfig
from softprompt.pretrained.loading import Loaded
from softprompt.pretrained.tokenizer import Tokenizer

# Where an encoder-decoder may have what a method puts before a text.
PLACES = {
    "prompt": ("encoder", "decoder"),
    "multitask": ("encoder",),
    "prefix": ("encoder", "decoder", "cross"),
}
PROMPT_INITS = ("vocabulary", "uniform", "uniform_paper", "labels", "text", "file")


def method_config(config: ConfigDict, loaded: Loaded, train: Encoded) -> Any:
    """The static half of a method's configuration, its texts resolved to token ids.

    Raises:
        UserError: a setting that does not suit the model; an unreadable file; a text without
            tokens; a BOS that the tokenizer lacks.
    """
    method = config.method
    if method.name == "prompt":
        return prompt_config(config, loaded, train)
    if method.name == "multitask":
        return multitask_config(config, loaded, train)
    if method.name == "prefix":
        return prefix_config(config, loaded, train)
    return update_config(config)


def folded_config(config: ConfigDict, *, encoder_decoder: bool) -> Any:
    """As much of `method_config` as the shapes of a folded delta depend on; reads no file."""
    method, start = config.method, initializers.uniform()
    if method.name not in PLACES:
        return update_config(config)
    where = places(config, encoder_decoder, PLACES[method.name])
    if method.name == "prefix":
        return PrefixConfig(method.length, where)
    if method.name == "prompt":
        return PromptConfig(method.length, initializer=start, places=where)
    tasks = len(members(config))
    return MultitaskConfig(
        method.length, initializer=start, places=where, tasks=tasks, rank=method.rank
    )


def update_config(config: ConfigDict) -> Any:
    """The configuration of a method that takes no place before a text."""
    method = config.method
    if method.name == "lora":
        return lora_config(config)
    if method.name == "ia3":
        return Ia3Config(**_targets(config))
    if method.name == "adapter":
        return AdapterConfig(method.bottleneck, method.placement)
    return None


def keep_probabilities(config: ConfigDict) -> dict[str, np.ndarray]:
    """Fields of a trial's `Dropout`, float32 []: "model", "lora", "prompt" whose rate is not 0."""
    rates = {"model": config.train.dropout}
    if config.method.name in ("lora", "prompt"):
        rates[config.method.name] = config.method.dropout
    return {name: np.asarray(1 - rate, np.float32) for name, rate in rates.items() if rate}


def lora_config(config: ConfigDict) -> LoraConfig:
    """LoRA's configuration."""
    method = config.method
    return LoraConfig(method.rank, method.alpha, method.rslora, **_targets(config))


def _targets(config: ConfigDict) -> dict[str, tuple[str, ...]]:
    """The projections that a config names; nothing where it leaves them to the method."""
    named = tuple(name.strip() for name in config.method.targets.split(",") if name.strip())
    return {"targets": named} if named else {}


def multitask_config(config: ConfigDict, loaded: Loaded, train: Encoded) -> MultitaskConfig:
    """The multitask method's configuration.

    Raises:
        UserError: see `method_config`; a prompt that does not see an encoder's input.
    """
    if loaded.encoder_decoder and not config.method.prompt_to_input:
        raise UserError(
            "config key 'method.prompt_to_input' is False; allowed for a multitask: True"
        )
    shared = prompt_config(config, loaded, train)
    return MultitaskConfig(**vars(shared), tasks=len(members(config)), rank=config.method.rank)


def wants_bos(config: ConfigDict, tokenizer: Tokenizer) -> bool:
    """Whether a text, or what stands before it, begins with BOS.

    With `method.bos` "after" it does where the model was trained so, with "before" always.

    Raises:
        UserError: the tokenizer has none.
    """
    if config.method.bos == "before" and tokenizer.bos_id is None:
        raise UserError("config key 'method.bos' is 'before'; this model's tokenizer has no BOS")
    return config.method.bos == "before" or tokenizer.add_bos and config.method.bos == "after"


def prompt_config(config: ConfigDict, loaded: Loaded, train: Encoded) -> PromptConfig:
    """The prompt method's configuration, or what a multitask prompt shares with it.

    Raises:
        UserError: see `method_config`.
    """
    method = config.method
    before = wants_bos(config, loaded.tokenizer) and method.bos == "before"
    if method.init not in PROMPT_INITS:
        raise UserError(
            f"config key 'method.init' is {method.init!r}; allowed for a {method.name}: "
            f"{', '.join(PROMPT_INITS)}"
        )
    return PromptConfig(
        method.length,
        loaded.tokenizer.bos_id if before else None,
        initializer(config, loaded, train),
        loaded.config.embed_scale,
        places(config, loaded.encoder_decoder, PLACES[method.name]),
        method.reparam,
        method.bottleneck,
    )


def prefix_config(config: ConfigDict, loaded: Loaded, train: Encoded) -> PrefixConfig:
    """The prefix method's configuration.

    Raises:
        UserError: see `method_config`; words as a start where they would see the input.
    """
    method = config.method
    where = places(config, loaded.encoder_decoder, PLACES["prefix"])
    made = method.init in ("noise", "zeros")
    if "cross" in where and not made:
        raise UserError(
            f"config key 'method.init' is {method.init!r}; allowed for a prefix of "
            "cross-attention: noise, zeros"
        )
    if where and made and not method.prompt_to_input:
        raise UserError(
            f"config key 'method.prompt_to_input' is False; allowed with method.init={method.init} "
            "of a prefix, which is no input: True"
        )
    if "encoder" in where and method.prompt_to_input and not made:
        raise UserError(
            f"config key 'method.init' is {method.init!r}: in an encoder, keys and values of words "
            "depend on the input; allowed: noise, zeros, or method.prompt_to_input=False"
        )
    if method.reparam == "mlp" and method.init != "noise":
        raise UserError(
            f"config key 'method.init' is {method.init!r}; allowed with method.reparam=mlp: noise"
        )
    return PrefixConfig(
        method.length,
        where,
        method.init if made else "rows",
        None if made else initializer(config, loaded, train),
        loaded.config.embed_scale,
        method.bottleneck if method.reparam == "mlp" else 0,
    )


def places(config: ConfigDict, encoder_decoder: bool, allowed: Sequence[str]) -> tuple[str, ...]:
    """The places of an encoder-decoder that `method.place` names; () for a decoder.

    Raises:
        UserError: one that the method has nothing for; a decoder with a key of encoder-decoders.
    """
    if not encoder_decoder:
        usual = base_config().method
        for key in ("place", "prompt_to_input"):
            if config.method[key] != usual[key]:
                raise UserError(
                    f"config key 'method.{key}' is {config.method[key]!r}, of encoder-decoders; "
                    f"allowed for a decoder: {usual[key]!r}"
                )
        return ()
    named = {"both": ("encoder", "decoder"), "all": ("encoder", "decoder", "cross")}
    where = named.get(config.method.place, (config.method.place,))
    if not set(where) <= set(allowed):
        names = [*allowed, *(["both"] if len(allowed) > 1 else [])]
        raise UserError(
            f"config key 'method.place' is {config.method.place!r}; allowed for a "
            f"{config.method.name}: {', '.join(names)}"
        )
    return where


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
    return initializers.from_rows(source_rows(config, loaded), rest, name=method.init_file)


def common_ids(config: ConfigDict, loaded: Loaded, train: Encoded) -> list[int]:
    """The most common tokens of the named text: the train split's inputs, or a file's lines.

    BOS and EOS, which inputs may begin and end with, are none of them.
    """
    method, added = config.method, {loaded.tokenizer.bos_id, loaded.tokenizer.eos_id}
    if method.common_text == "train":
        texts = ([i for i in ids.tolist() if i not in added] for ids in train.inputs)
        return initializers.common_tokens(texts, method.common_tokens)
    try:
        lines = epath.Path(method.common_text).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config key 'method.common_text' is {method.common_text!r}: {error}; allowed: train, "
            "or a text file"
        ) from error
    return initializers.common_tokens(map(loaded.tokenizer.encode, lines), method.common_tokens)


def source_rows(config: ConfigDict, loaded: Loaded) -> np.ndarray:
    """The rows [P, D] that `config.method.init_file` has for this model.

    Raises:
        UserError: see `prompt_rows`; trained on other weights, without `init_any_weights`.
    """
    method = config.method
    rows_PD, origin = prompt_rows(method.init_file, method.place)
    trained = origin.get("fingerprint", loaded.fingerprint)
    fits = rows_PD.shape[-1:] == (loaded.config.prompt_width,)  # else no key would make it
    if fits and trained != loaded.fingerprint and not method.init_any_weights:
        raise UserError(
            f"{method.init_file} was trained on weights {trained}, {config.model.name} has "
            f"{loaded.fingerprint}; method.init_any_weights=True starts from it nevertheless"
        )
    return rows_PD


def prompt_rows(file: str, place: str = "encoder") -> tuple[np.ndarray, dict[str, Any]]:
    """The rows [P, D] of a prompt file, and what it says of where they come from.

    Args:
        file: a delta.
        place: `method.place`, which chooses where the file has a prompt for each of two stacks.

    Raises:
        UserError: unreadable, no prompt in it, one that its other tensors belong to, or two and
            none of them chosen.
    """
    from softprompt.training.delta_file import load_delta

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
            f"{file}: its 'prompt' is none without what stands beside it, "
            f"{', '.join(sorted(others))}; allowed: prompts of method.name=prompt"
        )
    return part["prompt"], origin


def few_shot_tokens(config: ConfigDict, loaded: Loaded, train: Encoded, *, room: int) -> np.ndarray:
    """Solved examples as one text, int32 [P]: a seeded draw, the labels balanced, in random order.

    Args:
        config: its `method.shots` and `seed` choose.
        loaded: the model, for its BOS and the blank line between examples.
        train: encoded without BOS.
        room: largest number of tokens that leaves the model room for an input and its target.

    Raises:
        UserError: fewer labelled examples than shots, a longer text than there is room for, or no
            BOS where one is wanted.
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
    start = [tokenizer.bos_id] if wants_bos(config, tokenizer) else []
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
