import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchunk.data import files
from jaxchunk.data.sources import load_source


def _jsonl(path, *lines):
  path.write_bytes(b"\n".join(lines) + b"\n")
  return str(path)


def _load(spec, cache_dir, **options):
  return load_source(str(spec), cache_dir=cache_dir, **options)


@pytest.mark.fast
def test_jsonl_by_offset_skips_blank_lines_and_names_lines(tmp_path, cache_dir):
  path = _jsonl(
    tmp_path / "a.jsonl",
    '\ufeff{"text": "one"}'.encode(),
    b"",
    '{"text": "zwölf 🙂", "id": 2}'.encode(),
    b'  {"text": "tail\\n"}  ',
  )
  source = _load(path, cache_dir)
  assert [source[i] for i in (2, 0, 1)] == ["tail\n", "one", "zwölf 🙂"]
  assert [source.name(i) for i in range(3)] == [
    f"{path}:{line}" for line in (1, 3, 4)
  ]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"{nope", r"bad.jsonl:2 is not JSON .*each line must be one JSON object"),
    (b"[1]", r"bad.jsonl:2 is a JSON list"),
    (
      b'{"body": "x"}',
      r"bad.jsonl:2 has no field 'text', only \['body'\]; set",
    ),
    (b'{"text": 3}', r"bad.jsonl:2: field 'text' is int, not a string"),
    (
      b'{"text": "\xff"}',
      r"bad.jsonl:2 is not valid UTF-8 .* at byte 10.*repl",
    ),
    (b'{"text": "\\ud800"}', r"bad.jsonl:2 is not valid UTF-8"),
  ],
)
def test_bad_line_is_named_with_a_remedy(tmp_path, cache_dir, line, message):
  path = _jsonl(tmp_path / "bad.jsonl", b'{"text": "fine"}', line)
  source = _load(path, cache_dir)
  assert source[0] == "fine"
  with pytest.raises(ValueError, match=message):
    source[1]


def test_invalid_utf8_can_be_replaced(tmp_path, cache_dir):
  path = _jsonl(
    tmp_path / "a.jsonl", b'{"text": "a\xffb"}', b'{"text": "a\\ud800b"}'
  )
  source = _load(path, cache_dir, errors="replace")
  assert [source[0], source[1]] == ["a\ufffdb", "a\ufffdb"]
  assert source.fingerprint != _load(path, cache_dir).fingerprint


@pytest.mark.fast
def test_parquet_rows_across_row_groups_and_shards(tmp_path, cache_dir):
  for shard, kind in enumerate((pa.string(), pa.large_string(), pa.binary())):
    texts = [f"shard {shard} row {row} é" for row in range(5)]
    column = pa.array([text.encode() for text in texts], pa.binary())
    table = pa.table({"body": column.cast(kind), "n": list(range(5))})
    pq.write_table(table, tmp_path / f"{shard}.parquet", row_group_size=2)
  source = _load(tmp_path, cache_dir, pattern="*.parquet", text_field="body")
  assert len(source) == 15
  for i in (14, 0, 7, 6, 9, 10, 4):
    assert source[i] == f"shard {i // 5} row {i % 5} é"
    assert source.name(i).endswith(f"{i // 5}.parquet:row {i % 5}")
  with pytest.raises(IndexError, match="no row 15"):
    source[15]


def test_bad_parquet(tmp_path, cache_dir):
  path = tmp_path / "a.parquet"
  pq.write_table(pa.table({"text": ["x", None], "n": [1, 2]}), path)
  with pytest.raises(ValueError, match=r"no column 'body', only.*text_field"):
    _load(path, cache_dir, text_field="body")
  with pytest.raises(ValueError, match="column 'n' is int64, not text"):
    _load(path, cache_dir, text_field="n")
  with pytest.raises(ValueError, match=r"a.parquet:row 1 has no value"):
    _load(path, cache_dir)[1]
  binary = pa.table({"text": pa.array([b"\xff"], pa.binary())})
  pq.write_table(binary, path)
  with pytest.raises(ValueError, match=r"a.parquet:row 0 is not valid UTF-8"):
    _load(path, cache_dir)[0]
  path.write_bytes(b"not parquet at all")
  with pytest.raises(ValueError, match="not a readable parquet file"):
    _load(path, cache_dir)


def test_missing_unknown_and_empty_data(tmp_path, cache_dir):
  with pytest.raises(FileNotFoundError, match="does not exist; it is 'stdlib'"):
    _load(tmp_path / "nowhere.jsonl", cache_dir)
  (tmp_path / "a.csv").write_text("x")
  with pytest.raises(ValueError, match=r"not a .jsonl file, a .parquet file"):
    _load(tmp_path / "a.csv", cache_dir)
  with pytest.raises(ValueError, match=r"no file that matches .*data.pattern"):
    _load(tmp_path, cache_dir, pattern="*.md")
  (tmp_path / "a.jsonl").write_text("\n  \n")
  with pytest.raises(ValueError, match="has no documents"):
    _load(tmp_path / "a.jsonl", cache_dir)
  (tmp_path / "a.jsonl").unlink()
  (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    _load(tmp_path / "a.jsonl", cache_dir)


def test_folder_is_sorted_and_reports_bad_and_vanished_files(
  tmp_path, cache_dir
):
  folder = tmp_path / "texts"
  (folder / "sub").mkdir(parents=True)
  (folder / "b.txt").write_bytes(b"bee\r\n")
  (folder / "sub" / "a.txt").write_bytes("ä".encode())
  (folder / "c.txt").write_bytes(b"\x80")
  source = _load(folder, cache_dir)
  assert [source.name(i) for i in range(3)] == ["b.txt", "c.txt", "sub/a.txt"]
  assert [source[0], source[2]] == ["bee\r\n", "ä"]
  with pytest.raises(ValueError, match=r"c.txt is not valid UTF-8"):
    source[1]
  (folder / "b.txt").unlink()
  with pytest.raises(FileNotFoundError, match=r"b.txt has gone; restore it"):
    source[0]


def test_fingerprint_follows_contents_not_place(tmp_path, cache_dir):
  for name in ("here", "there"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("same")
  here = _load(tmp_path / "here", cache_dir).fingerprint
  assert here == _load(tmp_path / "there", cache_dir).fingerprint
  # Same size, and maybe the same time stamp: seen nevertheless.
  (tmp_path / "here" / "a.txt").write_text("diff")
  assert here != _load(tmp_path / "here", cache_dir).fingerprint


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_settled_files_are_hashed_once_and_again_when_changed(
  tmp_path, cache_dir, monkeypatch, suffix
):
  path = tmp_path / f"a.{suffix}"

  def load(text):
    path.write_text(json.dumps({"text": text}))
    os.utime(path, (len(text), len(text)))
    return _load(tmp_path, cache_dir, pattern=f"*.{suffix}").fingerprint

  first = load("a")
  assert len(list(cache_dir.glob("*.npz"))) == 1
  hashed = files.hashlib.file_digest
  monkeypatch.setattr(files.hashlib, "file_digest", None)
  if suffix == "txt":
    assert load("a") == first
  monkeypatch.setattr(files.hashlib, "file_digest", hashed)
  assert load("bb") != first
  next(cache_dir.glob("*.npz")).write_bytes(b"PK\x03\x04 torn")
  assert load("a") == first


def test_stdlib_has_a_long_tail_and_no_tests(cache_dir):
  source = _load("stdlib", cache_dir)
  names = [source.name(i) for i in range(len(source))]
  assert names == sorted(names)
  assert len(names) > 300
  assert "argparse.py" in names
  assert not any(
    {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))
    for name in names
  )
  assert "ArgumentParser" in source[names.index("argparse.py")]
