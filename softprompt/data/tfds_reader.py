"""Records read from TFDS datasets, our own and the catalogue's, without TensorFlow.

Importing tensorflow_datasets takes half a second, so the functions here import it when called.
"""

import functools
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from softprompt.data.sources import Columns, Record, Row, make_records
from softprompt.downloads import cache_dir, locked, say
from softprompt.errors import UserError, nearest

RETRIES = 0  # of a download; without a network the first failure is the message
TIMEOUT = (5, 60)  # seconds to wait for a connection, and for the next piece of a download


def read_tfds(name: str, split: str, columns: Columns) -> list[Record]:
    """Reads a split of a TFDS dataset; prepares the dataset in the cache first if it is not there.

    Works without TensorFlow for our own datasets (`softprompt.data.builders`) and for TFDS's
    catalogue. Reading a prepared dataset needs no network. Sequences become lists, and dicts stay
    dicts; numbers become text, classes their names, and a class of -1 (a hidden label) None.

    Args:
        name: the name in TFDS's spelling, such as "glue/sst2:2.0.0"; pin the version.
        split: a split or a slice of one, such as "train" or "train[:10%]".
        columns: the features that records hold. An `id` of "" takes the dataset's own text "id", or
            numbers the records where it has none.

    Returns:
        Records in the order of the prepared files; a numbered one has the id "<split>-<index>".

    Raises:
        UserError: the dataset, config, version, split or a field is unknown, a label is not
            allowed, answers are no text, an id is used twice, or the preparation failed.
    """
    import tensorflow_datasets as tfds

    with _adapted_tfds():
        builder = _prepared(name)
        source = _open_split(builder, name, split)
        features = builder.info.features
        if columns.transform_row is None:
            _check_fields(columns, name, features)
        rows = [source[index] for index in range(len(source))]
    if not columns.id and "id" in features and isinstance(features["id"], tfds.features.Text):
        columns = replace(columns, id="id")
    classes = {field: names for field in features if (names := _names(features[field]))}
    named = (
        (f"tfds:{name}, {split}, example '{split}-{number}'", _plain_row(row, classes))
        for number, row in enumerate(rows)
    )
    return make_records(named, columns, id_prefix=split)


def _names(feature: Any) -> Sequence[str] | None:
    """The names of a feature's classes; None for any other feature."""
    names: Sequence[str] | None = getattr(feature, "names", None)
    return names


def _plain_row(row: Mapping[str, Any], classes: Mapping[str, Sequence[str]]) -> Row:
    """A row of texts, lists and dicts, with the names of its classes."""
    plain: Row = {key: _plain(value) for key, value in row.items()}
    for key, names in classes.items():
        plain[key] = names[int(row[key])] if int(row[key]) >= 0 else None
    return plain


def _plain(value: Any) -> Any:
    """A value of TFDS as text, lists and dicts."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0:
        return [_plain(one) for one in value]
    return str(value)


def _check_fields(columns: Columns, name: str, features: Mapping[str, Any]) -> None:
    """Checks that a dataset has the fields that are named."""
    others = (columns.label, columns.id, columns.group, columns.candidates)
    for field in filter(None, (*columns.texts, *others)):
        if field not in features and field.split(".")[0] not in features:
            raise UserError(
                f"tfds:{name} has no field {field!r}{nearest(field, features)}; "
                f"known: {', '.join(features)}"
            )


def _open_split(builder: Any, name: str, split: str) -> Any:
    """A random-access view of a split; a UserError that lists the splits where there is none."""
    try:
        return builder.as_data_source(split)
    except (KeyError, ValueError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"tfds:{name} has no split {split!r}; known: {known}") from error


def _prepared(name: str) -> Any:
    """The builder of a dataset, prepared: one process prepares while the others wait."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # noqa: F401  registers glue and super_glue, lost without h5py

    import softprompt.data.builders  # noqa: F401  registers our own

    folder = cache_dir() / "tfds"
    builder = _builder(name, folder)
    if _is_prepared(builder):
        return builder
    with locked(folder / f".{builder.info.full_name.replace('/', '-')}.lock", f"preparing {name}"):
        builder = _builder(name, folder)
        if not _is_prepared(builder):
            say(f"preparing dataset {name} in {folder} ...")
            if not sys.stderr.isatty():
                tfds.disable_progress_bar()
            _prepare(builder, name)
            sizes = ", ".join(
                f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items()
            )
            say(f"prepared dataset {name}: {sizes} examples")
    return builder


def _is_prepared(builder: Any) -> bool:
    """Whether a dataset is complete: TFDS writes into another folder and renames it at the end."""
    return bool((builder.data_path / "dataset_info.json").exists())


def _builder(name: str, folder: Any) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=folder)
    except Exception as error:  # TFDS raises many types for a name that it does not know
        said, known = re.split("[/:]", name)[0], tfds.list_builders(with_community_datasets=False)
        near = nearest(said, known) if said not in known else ""
        raise UserError(
            f"cannot open TFDS dataset {name!r}{near}: {_first_line(error)} (names are as in "
            "glue/sst2:2.0.0, see https://www.tensorflow.org/datasets/catalog)"
        ) from error


def _prepare(builder: Any, name: str) -> None:
    """Downloads and writes a dataset as array_record, all of it or nothing."""
    from tensorflow_datasets.core.constants import INCOMPLETE_PREFIX
    from tensorflow_datasets.core.download import download_manager, extractor, util

    failures = (
        OSError,
        AssertionError,  # a data set that must be downloaded by hand
        util.DownloadError,
        download_manager.NonMatchingChecksumError,
        extractor.ExtractError,
    )
    for left_over in builder.data_path.parent.glob(f"{INCOMPLETE_PREFIX}*_{builder.version}"):
        left_over.rmtree()
    try:
        with redirect_stdout(io.StringIO()):  # it says what `say` says
            builder.download_and_prepare(file_format="array_record")
    except failures as error:
        raise UserError(
            f"could not prepare TFDS dataset {name}: {type(error).__name__}: {_first_line(error)} "
            "(check the network and HTTPS_PROXY; or prepare it on another machine with `softprompt "
            f"data prepare` and copy its folder to {builder.data_path})"
        ) from error


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    text = re.sub(r"^Failed to construct dataset .*?}\": ", "", str(error).strip())
    return text.splitlines()[0][:300] if text else type(error).__name__


@contextmanager
def _adapted_tfds() -> Iterator[None]:
    """Lets TFDS's catalogue run without TensorFlow, and lets its downloads fail soon.

    Three modules of TFDS use a handful of TensorFlow's names (an integer type, file access) and one
    a backport of the standard library: within the block they find equivalents. Downloads, which
    would be tried for 200 seconds where there is no network, are retried `RETRIES` times and time
    out. `sys.modules` is left alone.
    """
    import importlib.resources.abc  # noqa: F401  read as importlib.resources.abc.Traversable
    import importlib.util

    from tensorflow_datasets.core import dataset_builder
    from tensorflow_datasets.core.download import downloader, extractor
    from tensorflow_datasets.text import super_glue

    patches: list[tuple[Any, str, Any]] = [
        (dataset_builder, "importlib_resources", importlib.resources),
        (downloader, "MAX_RETRIES", RETRIES),
        (downloader, "_open_url", functools.partial(downloader._open_url, timeout=TIMEOUT)),
    ]
    if importlib.util.find_spec("tensorflow") is None:
        tf = _tensorflow_names()
        patches += [(module, "tf", tf) for module in (downloader, extractor, super_glue)]
    before = [getattr(module, name) for module, name, _ in patches]
    for module, name, value in patches:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(patches, before, strict=True):
            setattr(module, name, value)


def _tensorflow_names() -> SimpleNamespace:
    """The names of TensorFlow that TFDS's downloader, extractor and super_glue use."""
    import shutil

    import numpy as np

    def copy(source: str, target: Any) -> None:
        shutil.copyfile(str(source).removeprefix("file://"), target)

    gfile = SimpleNamespace(GFile=open, copy=copy)
    return SimpleNamespace(
        int32=np.int32,
        io=SimpleNamespace(gfile=gfile),
        compat=SimpleNamespace(as_text=_plain),
        errors=SimpleNamespace(UnimplementedError=NotImplementedError),
    )
