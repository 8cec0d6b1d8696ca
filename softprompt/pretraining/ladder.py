"""The pretrained models in the cache: their list, and archives that move them.

An archive is a tar file with the models' folders, followed by the SHA-256 of all its bytes before
(tar's readers ignore what follows the end of a tar file).
"""

import hashlib
import math
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from softprompt.errors import UserError
from softprompt.files import check_writable, read_json
from softprompt.models.shapes import leaf_shapes
from softprompt.pretrained.ladder import (
    PREFIX,
    PROVENANCE,
    RUNGS,
    is_made,
    ladder_dir,
    model_folder,
)

DIGEST = 64  # hex digits
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", PROVENANCE)


def made_models() -> list[str]:
    """The names of all models in the cache, sorted."""
    root = ladder_dir()
    folders = sorted(root.iterdir()) if root.is_dir() else []
    names = [f"{PREFIX}{folder.name}" for folder in folders if not folder.name.startswith(".")]
    return [name for name in names if is_made(name)]


def listing() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table of the ladder: what is in the cache, and what is not."""
    header = ("NAME", "PARAMETERS", "TOKENS", "LOSS", "SHARE", "MINUTES", "WHERE")
    names = [*RUNGS, *(name for name in made_models() if name not in RUNGS)]
    return header, [_line(name) for name in sorted(names)]


def _line(name: str) -> tuple[str, ...]:
    """A row of the table."""
    inner = inner_parameters(name)
    parameters = "" if inner is None else f"{inner:,}"
    if not is_made(name):
        return (name, parameters, "", "", "", "", f"softprompt pretrain {name}")
    facts = summary(name)
    share = facts["share"]
    return (
        name,
        parameters,
        f"{facts['tokens']:,}",
        f"{facts['loss']:.4f}",
        "" if share is None else f"{share:.2f}",
        f"{facts['minutes']:.1f}",
        str(model_folder(name)),
    )


def inner_parameters(name: str) -> int | None:
    """The parameters outside of embeddings and head; None for a model that is not on the ladder."""
    config = RUNGS.get(name.partition("@")[0])
    if config is None:
        return None
    shapes = leaf_shapes(config).items()
    return sum(math.prod(shape) for path, shape in shapes if "layers/" in path)


def summary(name: str) -> dict[str, Any]:
    """The facts of a model in the cache that a study quotes.

    Returns:
        name, parameters (see `inner_parameters`), tokens that it was trained on, loss in nats on
        held-out text, share of the machine's peak, minutes, and the recipe's hash, the corpus'
        digest and the commit.
    """
    facts = read_json(model_folder(name) / PROVENANCE)
    return {
        "name": name,
        "parameters": inner_parameters(name),
        "tokens": facts["trained_tokens"],
        "loss": facts["loss"],
        "share": facts["peak_share"],
        "minutes": facts["seconds"] / 60,
        "recipe": facts["recipe_hash"],
        "corpus": facts["corpus"]["digest"],
        "commit": facts["commit"],
    }


def pack(file: str) -> list[str]:
    """Writes all pretrained models into an archive, and returns their names.

    The same models give the same bytes.

    Raises:
        UserError: there are none, or the file exists or cannot be written.
    """
    names, target = made_models(), Path(file).expanduser()
    if not names:
        raise UserError(f"no pretrained model in {ladder_dir()}; `softprompt pretrain` makes them")
    if target.exists():
        raise UserError(f"{target} exists; give a new file")
    check_writable(target.parent)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name in names:
                for part in FILES:
                    path = model_folder(name) / part
                    info = tarfile.TarInfo(f"{name}/{part}")
                    info.size = path.stat().st_size
                    with path.open("rb") as content:
                        archive.addfile(info, content)
        digest = _digest(partial, partial.stat().st_size)
        with partial.open("ab") as end:
            end.write(digest.encode())
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return names


def import_archive(file: str) -> list[str]:
    """Puts the models of an archive into the cache, and returns their names.

    Models that are there already, with the same weights, are left as they are.

    Raises:
        UserError: the file is no complete archive or any of its bytes differs, or another model
            of the same name is in the cache. Nothing is changed then.
    """
    source, staging = Path(file).expanduser(), ladder_dir() / ".import"
    _check(source)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with tarfile.open(source) as archive:
            archive.extractall(staging, filter="data")
        folders = sorted((staging / PREFIX).iterdir())
        names = [f"{PREFIX}{folder.name}" for folder in folders]
        new = [name for name in names if not _is_here(name, staging / name)]
        for name in new:
            os.replace(staging / name, model_folder(name))
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{source}: cannot be imported ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return names


def _is_here(name: str, folder: Path) -> bool:
    """Whether the same model is in the cache.

    Raises:
        UserError: another model of that name is there.
    """
    if not is_made(name):
        return False
    ours, theirs = (_digest(one / FILES[1]) for one in (model_folder(name), folder))
    if ours != theirs:
        raise UserError(
            f"{model_folder(name)} has other weights than the archive's {name}; delete one of them"
        )
    return True


def _check(source: Path) -> None:
    """Checks the digest at an archive's end."""
    try:
        size = source.stat().st_size - DIGEST
        with source.open("rb") as content:
            content.seek(max(size, 0))
            said = content.read()
        found = _digest(source, max(size, 0)).encode()
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    if said != found:
        raise UserError(
            f"{source}: its SHA-256 is not the one at its end; allowed: a whole file that "
            "`softprompt ladder pack` wrote"
        )


def _digest(file: Path, size: int | None = None) -> str:
    """The SHA-256 of the first `size` bytes of a file, in hex; None for all."""
    left = file.stat().st_size if size is None else size
    made = hashlib.sha256()
    with file.open("rb") as content:
        while left and (part := content.read(min(left, 1 << 20))):
            made.update(part)
            left -= len(part)
    return made.hexdigest()
