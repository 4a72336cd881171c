"""Finds or downloads the files of the sets, and prepares them with TFDS.

`load_prepared` returns a random-access sequence of `Example`. TFDS writes its
array_record files once into $GRPO_JAX_CACHE (default ~/.cache/grpo_jax), and Grain
reads them. The name of a prepared folder contains the SHA-256 of its source, so a
changed file is prepared again. TensorFlow is not needed.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
import tqdm

from grpo_jax.data.example import Example
from grpo_jax.data.registry import (
    GITHUB,
    Source,
    find_source,
    is_file,
    local_source,
    read_examples,
)
from grpo_jax.errors import GrpoError
from grpo_jax.files import cache_folder, file_digest

VERSION = "1.1.0"  # of the prepared rows; raise it when parsers.py changes them
NAME, SPLIT = "questions", "rows"  # of the TFDS dataset
FIELDS = ("question", "answer", "solution", "language", "id", "columns")


def _download(source: Source, data_dir: str) -> Path:
    """Downloads the original file into the cache, under a name with its SHA-256."""
    by_hand = f"{data_dir or '$GRPO_JAX_DATA'}/{source.file}"
    if not source.url:
        raise GrpoError(
            f"data {source.slug}: no file {by_hand}, and MATH may not be downloaded: "
            "set GRPO_JAX_DATA to a folder that holds it (JSON lines with problem, "
            "solution, level, type or subject, id)"
        )
    folder = cache_folder("downloads")
    path = folder / f"{source.sha256[:16]}-{Path(source.file).name}"
    if path.exists():
        return path
    url = source.url if "://" in source.url else f"{GITHUB}/{source.url}"
    handle, part = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            with urllib.request.urlopen(url, timeout=30) as response:
                shutil.copyfileobj(response, file)
        found = file_digest(part)
        if found != source.sha256:
            raise OSError(f"its SHA-256 is {found}, expected {source.sha256}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise GrpoError(
            f"data {source.slug}: cannot download {url} ({error}); get that file by "
            f"hand and put it at {by_hand}"
        ) from None
    finally:
        Path(part).unlink(missing_ok=True)
    return path


def _find_file(source: Source, data_dir: str | None) -> Path:
    data_dir = data_dir or os.environ.get("GRPO_JAX_DATA") or ""
    path = Path(data_dir, source.file)
    if data_dir and path.is_file():
        return path
    return _download(source, data_dir)


def _prepare(source: Source, path: Path) -> Path:
    """Returns the folder of prepared records. Two processes may do this at once."""
    folder = cache_folder("tfds")
    done = folder / f"{source.slug}-{file_digest(path)[:16]}-{VERSION}"
    if done.exists():
        return done
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as part:
        rows = Path(part, "rows")
        _write_records(source, path, rows / NAME / VERSION)
        try:
            rows.rename(done)
        except OSError:
            if not done.exists():  # else the other process was faster
                raise
    return done


def _write_records(source: Source, path: Path, folder: Path) -> None:
    """Writes a file's examples as a TFDS dataset, in the order of the file."""
    first_empty = tfds.core.MetadataDict()  # first row without answer or solution
    texts = {name: tfds.features.Text() for name in FIELDS}
    version = tfds.core.Version(VERSION)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(NAME, version, str(folder), __name__),
        features=tfds.features.FeaturesDict(texts),
        disable_shuffling=True,
        metadata=first_empty,
    )
    folder.mkdir(parents=True)
    writer = tfds.core.SequentialWriter(info, 1 << 20, file_format="array_record")
    writer.initialize_splits([SPLIT])
    small = path.stat().st_size < 50e6  # quick, so no progress bar
    rows = enumerate(tqdm.tqdm(read_examples(source, path), unit="row", disable=small))
    while chunk := list(itertools.islice(rows, 1000)):
        written = []
        for index, example in chunk:
            row = {name: getattr(example, name) for name in FIELDS}
            for name in ("answer", "solution"):
                if not row[name]:
                    first_empty.setdefault(name, index)
            row["columns"] = json.dumps(row["columns"], ensure_ascii=False)
            written.append(row)
        writer.add_examples({SPLIT: written})
    writer.close_all()
    if not info.splits.total_num_examples:
        raise GrpoError(f"{path}: the file has no rows")


class PreparedDataset:
    """A random-access sequence over prepared records, decoded one by one.

    Args:
      name: the set and split, used in the ids of rows that have none.
      folder: the folder of the prepared records.
    """

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.digest = folder.name  # the SHA-256 of its source
        builder: Any = tfds.builder_from_directory(folder / NAME / VERSION)
        self.first_empty = dict(builder.info.metadata or {})
        self._records = builder.as_data_source(SPLIT)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Example:
        row = self._records[index]  # {field: bytes}
        record = {field: value.decode() for field, value in row.items()}
        record["columns"] = json.loads(record["columns"])
        record["id"] = record["id"] or f"{self.name}/{index}"
        return Example(**record)


def load_prepared(
    name: str, split: str, *, data_dir: str | None, require: Sequence[str]
) -> PreparedDataset:
    """Returns one set; see `datasets.load_dataset` for the arguments.

    Raises:
      GrpoError: the set or file is unknown, cannot be downloaded, read or prepared, or
        has a row without a required field.
    """
    if is_file(name):
        source, path = local_source(name), Path(name)
        if not path.is_file():
            raise GrpoError(f"data {name!r}: no such file")
    else:
        source = find_source(name, split)
        path = _find_file(source, data_dir)
    folder = _prepare(source, path)
    try:
        rows = PreparedDataset(name if is_file(name) else f"{name}/{split}", folder)
        rows[len(rows) - 1]
    except Exception as error:
        raise GrpoError(
            f"{folder}: these prepared records cannot be read ({error}); delete the "
            "folder and run again"
        ) from error
    for field in require:
        if field in rows.first_empty:
            raise GrpoError(
                f"{path}: row {rows.first_empty[field]} has no {field!r}, which is "
                "needed here"
            )
    return rows
