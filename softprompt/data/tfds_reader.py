"""Records from TFDS datasets, our own and the catalogue's, prepared and read without TensorFlow.

tensorflow_datasets takes half a second to import, so everything here imports it when it is called.
"""

import functools
import io
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from types import SimpleNamespace
from typing import Any

from softprompt.data.sources import Record
from softprompt.downloads import cache_dir, locked, say
from softprompt.errors import UserError, nearest

RETRIES = 2  # of a download
TIMEOUT = (5, 60)  # seconds to wait for a connection, and for the next piece of a download


def read_tfds(
    name: str,
    split: str,
    *,
    fields: Sequence[str],
    label_field: str = "label",
    id_field: str = "",
    labels: Collection[str] | None = None,
) -> list[Record]:
    """Reads a split of a TFDS dataset, preparing the dataset in the cache if it is not there.

    Own datasets (`softprompt.data.builders`) and TFDS's catalogue alike, without TensorFlow. A
    prepared dataset needs no network.

    Args:
        name: as TFDS spells it, such as "glue/sst2:2.0.0"; pin the version.
        split: a split or slice of one, such as "train" or "train[:10%]".
        fields: the features that records are to hold; numbers become text.
        label_field: the feature with the label; classes become their names, a class of -1 (a hidden
            label) None.
        id_field: the feature with the id; "" is the dataset's own text "id", or else numbers the
            records.
        labels: the labels that are allowed; None allows any.

    Returns:
        Records in the order of the prepared files; one that is numbered is "<split>-<index>".

    Raises:
        UserError: unknown dataset, config, version, split or field, a label that is not allowed, an
            id that is used twice, or a failed preparation.
    """
    import tensorflow_datasets as tfds

    with _adapted_tfds():
        builder = _prepared(name)
        source = _open_split(builder, name, split)
        features = builder.info.features
        _check_fields(filter(None, (*fields, label_field, id_field)), name, features)
        names = getattr(features[label_field], "names", None) if label_field else None
        rows = [source[index] for index in range(len(source))]
    if not id_field and "id" in features and isinstance(features["id"], tfds.features.Text):
        id_field = "id"
    records, seen = [], set[str]()
    for index, row in enumerate(rows):
        key = _string(row[id_field]) if id_field else f"{split}-{index}"
        if key in seen:
            raise UserError(f"tfds:{name}, {split}: id {key!r} of field {id_field!r} is used twice")
        seen.add(key)
        record = {field: _string(row[field]) for field in fields}
        label = _class(row[label_field], names) if label_field else None
        if label is not None and labels is not None and label not in labels:
            raise UserError(
                f"tfds:{name}, {split}, example {key!r}: label {label!r} has no verbalizer; "
                f"known: {', '.join(labels)}"
            )
        records.append({"id": key, **record, "label": label})
    return records


def _check_fields(fields: Iterable[str], name: str, features: Mapping[str, Any]) -> None:
    """Checks that a dataset has them."""
    for field in fields:
        if field not in features:
            raise UserError(
                f"tfds:{name} has no field {field!r}{nearest(field, features)}; "
                f"known: {', '.join(features)}"
            )


def _string(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _class(value: Any, names: Sequence[str] | None) -> str | None:
    """A label feature's value as text; None for a class of -1."""
    if names is None:
        return _string(value)
    return None if int(value) < 0 else names[int(value)]


def _open_split(builder: Any, name: str, split: str) -> Any:
    """A random-access view of a split, or a UserError that lists the splits."""
    try:
        return builder.as_data_source(split)
    except (KeyError, ValueError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"tfds:{name} has no split {split!r}; known: {known}") from error


def _prepared(name: str) -> Any:
    """A prepared dataset's builder; one process prepares, others wait."""
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
    """Whether a dataset is complete: TFDS writes under another name and renames at the end."""
    return bool((builder.data_path / "dataset_info.json").exists())


def _builder(name: str, folder: Any) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=folder)
    except Exception as error:  # TFDS raises many types for a name that it does not know
        said, known = re.split("[/:]", name)[0], tfds.list_builders(with_community_datasets=False)
        near = nearest(said, known) if said not in known else ""
        raise UserError(
            f"cannot open TFDS dataset {name!r}{near}: {_first(error)} (names are as in "
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
            f"could not prepare TFDS dataset {name}: {type(error).__name__}: {_first(error)} "
            "(check the network and HTTPS_PROXY; or prepare it on another machine with `softprompt "
            f"data prepare` and copy its folder to {builder.data_path})"
        ) from error


def _first(error: BaseException) -> str:
    """The first line of what an error says, shortened."""
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
    """What TFDS's downloader, extractor and super_glue use of TensorFlow."""
    import shutil

    import numpy as np

    def copy(source: str, target: Any) -> None:
        shutil.copyfile(str(source).removeprefix("file://"), target)

    gfile = SimpleNamespace(GFile=open, copy=copy)
    return SimpleNamespace(
        int32=np.int32,
        io=SimpleNamespace(gfile=gfile),
        compat=SimpleNamespace(as_text=_string),
        errors=SimpleNamespace(UnimplementedError=NotImplementedError),
    )
