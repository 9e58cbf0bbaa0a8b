"""Documents by number: files, JSON lines, parquet, Python's library.

A document is a text, or is made from a record by a `chat.Layout`. A source
holds names and offsets, never the texts, and reads a document when it is asked
for. Every problem of the data is one error that names the document.
"""

import json
import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxchunk.data.chat import Document, Layout, RecordError
from jaxchunk.data.files import (
  hash_files,
  hash_parts,
  opening,
  scan_lines,
  to_text,
)

_STDLIB_LEAVES_OUT = frozenset(
  ("test", "tests", "idle_test", "site-packages", "dist-packages")
)


class Source(Protocol):
  """Documents by number."""

  @property
  def fingerprint(self) -> str:
    """Hash of the contents and of how they are read, wherever they lie."""
    ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> str:
    """Its text."""
    ...

  def document(self, index: int) -> Document:
    """Its text and which part of that is trained on."""
    ...

  def name(self, index: int) -> str:
    """What to call the document in a message."""
    ...


class _Texts:
  """Documents of which everything is trained on."""

  def __getitem__(self, index: int) -> str:
    raise NotImplementedError

  def document(self, index: int) -> Document:
    """The whole text."""
    return Document(self[index], enclosed=True)


class FileSource(_Texts):
  """One document per file."""

  def __init__(
    self,
    root: Path,
    files: Sequence[Path],
    *,
    errors: str = "strict",
    cache_dir: Path,
  ):
    self._root, self._files, self._errors = root, list(files), errors
    names = [path.relative_to(root).as_posix() for path in files]
    digests = hash_files(self._files, cache_dir)
    self.fingerprint = hash_parts("files", errors, *names, *digests)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> str:
    with opening(self._files[index]):
      raw = self._files[index].read_bytes()
    return to_text(raw, errors=self._errors, name=self.name(index))

  def name(self, index: int) -> str:
    """The path of the file below the source's folder."""
    return self._files[index].relative_to(self._root).as_posix()


class JsonlSource(_Texts):
  """One document per line of JSON; blank lines are no documents."""

  def __init__(
    self,
    files: Sequence[Path],
    *,
    field: str = "text",
    errors: str = "strict",
    cache_dir: Path,
  ):
    self._files, self._field, self._errors = list(files), field, errors
    scans = [scan_lines(path, cache_dir) for path in self._files]
    digests = [str(scan["digest"]) for scan in scans]
    self.fingerprint = hash_parts("jsonl", field, errors, *digests)
    counts = [len(scan["offsets"]) for scan in scans]
    self._file_of = np.repeat(np.arange(len(scans)), counts)
    self._offsets, self._sizes, self._lines = (
      np.concatenate([scan[key] for scan in scans])
      for key in ("offsets", "sizes", "lines")
    )

  def __len__(self) -> int:
    return len(self._offsets)

  def record(self, index: int) -> Mapping[str, Any]:
    """The object of a line."""
    path, name = self._files[self._file_of[index]], self.name(index)
    # Opened each time: cheap beside parsing, and any thread may read.
    with opening(path), path.open("rb") as file:
      file.seek(int(self._offsets[index]))
      raw = file.read(int(self._sizes[index]))
    line = to_text(raw, errors=self._errors, name=name).removeprefix("\ufeff")
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(
        f"{name} is not JSON ({error}); each line must be one JSON object"
      ) from None
    if not isinstance(record, dict):
      raise ValueError(
        f"{name} is a JSON {type(record).__name__}; each line must be one"
        " object"
      )
    return record

  def __getitem__(self, index: int) -> str:
    record, name = self.record(index), self.name(index)
    if self._field not in record:
      raise ValueError(
        f"{name} has no field {self._field!r}, only {sorted(record)}; set"
        " data.text_field"
      )
    text = record[self._field]
    if not isinstance(text, str):
      raise ValueError(
        f"{name}: field {self._field!r} is {type(text).__name__}, not a string"
      )
    return to_text(text, errors=self._errors, name=name)

  def name(self, index: int) -> str:
    """File and line number, from 1."""
    file = self._files[self._file_of[index]]
    return f"{file}:{self._lines[index]}"


class ParquetSource(_Texts):
  """One document per row; keeps one row group in memory.

  Of its columns, that with the text; without one, all that it has.

  Rows in file order cost one read per row group, rows in random order one read
  per row: leave `data.cache_tokens` on.
  """

  def __init__(
    self,
    files: Sequence[Path],
    *,
    column: str | None = "text",
    errors: str = "strict",
    cache_dir: Path,
  ):
    self._files, self._column, self._errors = list(files), column, errors
    digests = hash_files(self._files, cache_dir)
    self.fingerprint = hash_parts("parquet", str(column), errors, *digests)
    groups = [
      (file, group, rows)
      for file, path in enumerate(self._files)
      for group, rows in enumerate(_row_groups(path, column))
    ]
    self._groups = [(file, group) for file, group, _ in groups]
    self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
    file_of = np.asarray([file for file, _, _ in groups], np.int64)
    # The first row of every file, to name rows after their place in it.
    self._file_starts = self._starts[
      np.searchsorted(file_of, np.arange(len(self._files)))
    ]
    self._last: tuple[int, pa.Table] | None = None

  def __len__(self) -> int:
    return int(self._starts[-1])

  def record(self, index: int) -> Mapping[str, Any]:
    """The values of a row by column."""
    if not -len(self) <= index < len(self):
      raise IndexError(f"no row {index} in a source of {len(self)}")
    index %= len(self)
    group = int(np.searchsorted(self._starts, index, side="right")) - 1
    # One assignment, so that a second thread sees an old pair or a new one.
    last = self._last
    if last is None or last[0] != group:
      self._last = last = (group, self._read(group))
    row = last[1].slice(index - int(self._starts[group]), 1)
    try:
      return dict(row.to_pylist()[0])
    except UnicodeDecodeError as error:
      raise ValueError(
        f"{self.name(index)} is not UTF-8 ({error}); mend the row"
      ) from error

  def __getitem__(self, index: int) -> str:
    value = self.record(index)[str(self._column)]
    if value is None:
      raise ValueError(
        f"{self.name(index)} has no value in column {self._column!r}; filter"
        " out the null rows"
      )
    return to_text(value, errors=self._errors, name=self.name(index))

  def _read(self, group: int) -> pa.Table:
    file, number = self._groups[group]
    wanted = None if self._column is None else [self._column]
    with opening(self._files[file]), pq.ParquetFile(self._files[file]) as rows:
      table = rows.read_row_group(number, columns=wanted)
    if self._column is None:
      return table
    # As bytes: arrow does not check UTF-8, and its own error names no row.
    column = table.column(0)
    large = pa.types.is_large_string(column.type)
    small = pa.types.is_string(column.type)
    if large or small:
      column = column.cast(pa.large_binary() if large else pa.binary())
    return pa.table({self._column: column})

  def name(self, index: int) -> str:
    """File and row number, from 0."""
    file = self._groups[
      int(np.searchsorted(self._starts, index, side="right")) - 1
    ][0]
    return f"{self._files[file]}:row {index - int(self._file_starts[file])}"


class RecordSource:
  """One document per record of JSON lines or parquet, laid out as text."""

  def __init__(self, records: JsonlSource | ParquetSource, layout: Layout):
    self._records, self._layout = records, layout
    self.fingerprint = hash_parts(
      "records", records.fingerprint, layout.fingerprint
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> str:
    return self.document(index).text

  def document(self, index: int) -> Document:
    """The text of the record and what is trained on.

    Raises:
      RecordError: It cannot be laid out; names file and line.
    """
    try:
      document = self._layout.document(self._records.record(index))
    except RecordError as error:
      raise RecordError(error.problem, f"{self.name(index)} {error}") from error
    except ValueError as error:
      # No JSON, or no object; it has the name already.
      raise RecordError("bad_record", str(error)) from error
    try:
      document.text.encode()
    except UnicodeEncodeError as error:
      raise RecordError(
        "bad_record", f"{self.name(index)} is not Unicode ({error})"
      ) from error
    return document

  def name(self, index: int) -> str:
    """File and line, or row."""
    return self._records.name(index)


def load_source(
  spec: str,
  *,
  cache_dir: Path,
  layout: Layout | None = None,
  text_field: str = "text",
  pattern: str = "**/*.txt",
  errors: str = "strict",
) -> Source:
  """Opens the documents that `spec` names.

  Args:
    spec: `"stdlib"`, or the path of a `.jsonl` file, a `.parquet` file or a
      folder.
    cache_dir: Where line offsets and hashes of large files are kept.
    layout: Of records; `None` where documents are texts.
    text_field: JSON field or parquet column that holds the text.
    pattern: Which files of a folder to take; if it ends in `.jsonl` or
      `.parquet` they are shards, otherwise one document each.
    errors: `"strict"` or `"replace"`: what to do about invalid UTF-8.

  Returns:
    The source, with at least one document.

  Raises:
    FileNotFoundError: There is no such path.
    ValueError: There are no documents, a parquet column is missing, or the
      kind of file is unknown.
  """
  if spec == "stdlib":
    if layout is not None:
      raise ValueError(
        f"data.format {layout.format!r} does not go with data.source 'stdlib',"
        " which has texts"
      )
    return _stdlib(errors, cache_dir)
  root = Path(spec).expanduser()
  if not root.exists():
    raise FileNotFoundError(
      f"data.source {spec!r} does not exist; it is 'stdlib' or the path of a"
      " .jsonl file, a .parquet file or a folder"
    )
  if root.is_dir():
    files = sorted(p for p in root.glob(pattern) if p.is_file())
    suffix = Path(pattern).suffix
    if not files:
      raise ValueError(
        f"folder {root} has no file that matches {pattern!r}; set data.pattern"
      )
  else:
    files, suffix = [root], root.suffix
    if suffix not in (".jsonl", ".parquet"):
      raise ValueError(
        f"data.source {spec!r} is not a .jsonl file, a .parquet file or a"
        " folder; for a single text file name its folder and set data.pattern"
      )
  source: Source
  if suffix == ".jsonl":
    lines = JsonlSource(
      files, field=text_field, errors=errors, cache_dir=cache_dir
    )
    source = RecordSource(lines, layout) if layout else lines
  elif suffix == ".parquet":
    rows = ParquetSource(
      files,
      column=None if layout else text_field,
      errors=errors,
      cache_dir=cache_dir,
    )
    source = RecordSource(rows, layout) if layout else rows
  elif layout is not None:
    raise ValueError(
      f"data.format {layout.format!r} wants records: .jsonl or .parquet files,"
      f" not {pattern!r}"
    )
  else:
    source = FileSource(root, files, errors=errors, cache_dir=cache_dir)
  if len(source) == 0:
    raise ValueError(f"data.source {spec!r} has no documents")
  return source


def _stdlib(errors: str, cache_dir: Path) -> FileSource:
  root = Path(sysconfig.get_path("stdlib"))
  files = []
  for folder, subfolders, names in os.walk(root):
    # In place: what is left out is not walked either.
    subfolders[:] = set(subfolders) - _STDLIB_LEAVES_OUT
    files += [Path(folder, name) for name in names if name.endswith(".py")]
  if not files:
    raise ValueError(
      f"the Python standard library at {root} has no .py files (this Python"
      " ships them compiled or zipped); set data.source to a path"
    )
  files.sort(key=lambda path: path.relative_to(root).as_posix())
  return FileSource(root, files, errors=errors, cache_dir=cache_dir)


def _row_groups(path: Path, column: str | None) -> list[int]:
  with opening(path), pq.ParquetFile(path) as file:
    schema, metadata = file.schema_arrow, file.metadata
  if column is not None:
    _check_column(path, schema, column)
  return [
    metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)
  ]


def _check_column(path: Path, schema: pa.Schema, column: str) -> None:
  if column not in schema.names:
    raise ValueError(
      f"{path} has no column {column!r}, only {schema.names}; set"
      " data.text_field"
    )
  kind = schema.field(column).type
  texts = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
  if kind not in texts:
    raise ValueError(f"{path}: column {column!r} is {kind}, not text")
