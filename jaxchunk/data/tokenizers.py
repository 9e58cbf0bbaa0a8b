"""Text to token ids and back: bytes, a BPE trained on first use, any JSON file.

Special tokens are never read out of a document's text unless asked for.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from jaxchunk.data.bpe import SPECIALS, trained_bpe
from jaxchunk.data.cache import atomic_write, read_json, write_json
from jaxchunk.data.chat import Document
from jaxchunk.data.files import hash_parts
from jaxchunk.data.sources import Source

_KNOWN_BOS = ("<|bos|>", "<|begin_of_text|>", "<bos>", "<s>")
_KNOWN_EOS = ("<|eos|>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "</s>")
_KNOWN_PAD = ("<|pad|>", "<pad>", "<|finetune_right_pad_id|>")
_FORMS = (
  "'byte', 'bpe:<vocabulary size>', the path of a tokenizer.json, or of a"
  " folder that holds one"
)

Ids = Int32[np.ndarray, " T"]
Mask = Bool[np.ndarray, " T"]


class Tokenizer(Protocol):
  """What the library asks of a tokenizer. Ids are below `vocab_size`."""

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    ...

  @property
  def bos_id(self) -> int | None:
    """Begins a document; `None` if the vocabulary has no such token."""
    ...

  @property
  def eos_id(self) -> int | None:
    """Ends a document; `None` if the vocabulary has no such token."""
    ...

  @property
  def pad_id(self) -> int:
    """Fills what is masked anyway."""
    ...

  @property
  def specials(self) -> tuple[str, ...]:
    """The texts that stand for special tokens where they are parsed."""
    ...

  @property
  def fingerprint(self) -> str:
    """Hash of everything that decides which ids a text gets."""
    ...

  def encode(self, text: str) -> Ids:
    """Ids of the text, without BOS and EOS."""
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
    """`encode` of several texts, on all cores where that is possible."""
    ...

  def encode_with_bytes(self, text: str) -> tuple[Ids, Ids]:
    """`encode`, and how many bytes of the text each token stands for.

    The second sums to the bytes of the text as UTF-8, unless there is no
    token at all.
    """
    ...

  def encode_documents(
    self, documents: Sequence[Document]
  ) -> list[tuple[Ids, Mask]]:
    """Ids of each document, and which are trained on.

    Special tokens are read out of texts. A token is trained on if one of its
    characters is.
    """
    ...

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of the ids; special and unknown ones leave nothing behind."""
    ...

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes it into a folder that `load_tokenizer` reads back."""
    ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """Ids 0 to 255 are the bytes of UTF-8; then come pad, BOS and EOS."""

  vocab_size: int = 259
  pad_id: int = 256
  bos_id: int | None = 257
  eos_id: int | None = 258
  specials: tuple[str, ...] = ()
  fingerprint: str = "byte-259"

  def encode(self, text: str) -> Ids:
    """The bytes of the text."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
    """The bytes of each text."""
    return [self.encode(text) for text in texts]

  def encode_with_bytes(self, text: str) -> tuple[Ids, Ids]:
    """The bytes of the text, each of which is one."""
    ids = self.encode(text)
    return ids, np.ones_like(ids)

  def encode_documents(
    self, documents: Sequence[Document]
  ) -> list[tuple[Ids, Mask]]:
    """The bytes of each document, and which are trained on."""
    encoded = []
    for document in documents:
      ids = self.encode(document.text)
      sizes = [len(character.encode()) for character in document.text]
      owner = np.repeat(np.arange(len(sizes)), sizes)
      encoded.append((ids, _overlapping(document, owner, owner + 1)))
    return encoded

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of the bytes, with U+FFFD for what is not UTF-8."""
    values = np.asarray(ids, np.int64)
    values = values[(values >= 0) & (values < 256)]
    return values.astype(np.uint8).tobytes().decode("utf-8", "replace")

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes a folder that `load_tokenizer` reads back."""
    write_json(Path(folder) / "tokenizer_config.json", {"jaxchunk": "byte"})


class JsonTokenizer:
  """A tokenizer in the JSON format of the `tokenizers` library.

  Truncation and padding that the file asks for are switched off.

  Attributes:
    definition: The file's text.
  """

  def __init__(
    self,
    definition: str,
    *,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    parse_special: bool = False,
  ):
    backend = tokenizers.Tokenizer.from_str(definition)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not parse_special
    self._backend, self.definition = backend, definition
    added = backend.get_added_tokens_decoder().values()
    self.specials = tuple(token.content for token in added if token.special)
    self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
    self.bos_id, self.eos_id, pad_id = (
      _special_id(backend, kind, name) for kind, name in self._names.items()
    )
    # Any id will do for padding: it is masked.
    self.pad_id = next(
      (id for id in (pad_id, self.eos_id) if id is not None), 0
    )
    self.fingerprint = hash_parts(
      definition, *map(str, self._names.values()), str(parse_special)
    )

  def encode(self, text: str) -> Ids:
    """Ids of the text, without BOS and EOS."""
    ids = self._backend.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
    """Ids of each text, computed on all cores."""
    encodings = self._backend.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

  def encode_with_bytes(self, text: str) -> tuple[Ids, Ids]:
    """`encode`, and how many bytes of the text each token stands for.

    Exact for byte-level tokenizers. For others a token has the bytes from
    where the one before it ended to its own end, so that what normalisation
    drops counts as the next token's, and behind the last token as its own.
    """
    encoding = self._backend.encode(text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, np.int32)
    # One character of a byte-level token stands for one byte.
    if "".join(encoding.tokens) == _byte_alphabet(text):
      return ids, np.asarray([len(t) for t in encoding.tokens], np.int32)
    sizes = [len(character.encode()) for character in text]
    before = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ends = np.asarray([end for _, end in encoding.offsets], np.int64)
    ends = np.maximum.accumulate(ends)
    ends[-1:] = len(text)
    return ids, np.diff(before[ends], prepend=0).astype(np.int32)

  def encode_documents(
    self, documents: Sequence[Document]
  ) -> list[tuple[Ids, Mask]]:
    """Ids of each document, computed on all cores, and which are trained."""
    before = self._backend.encode_special_tokens
    self._backend.encode_special_tokens = False
    try:
      encodings = self._backend.encode_batch(
        [document.text for document in documents], add_special_tokens=False
      )
    finally:
      self._backend.encode_special_tokens = before
    encoded = []
    for document, encoding in zip(documents, encodings, strict=True):
      offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
      mask = _overlapping(document, offsets[:, 0], offsets[:, 1])
      encoded.append((np.asarray(encoding.ids, np.int32), mask))
    return encoded

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of the ids; special and unknown ones leave nothing behind."""
    values = np.asarray(ids, np.int64)
    values = values[(values >= 0) & (values < self.vocab_size)]
    return self._backend.decode(values.tolist(), skip_special_tokens=True)

  def piece(self, token: int) -> str:
    """The vocabulary's own word for an id; empty for one that it lacks."""
    return str(self._backend.id_to_token(token) or "")

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as others do."""
    with atomic_write(Path(folder) / "tokenizer.json") as file:
      file.write(self.definition.encode())
    write_json(Path(folder) / "tokenizer_config.json", dict(self._names))


def _overlapping(
  document: Document, starts: np.ndarray, stops: np.ndarray
) -> np.ndarray:
  """Which tokens, with characters [start, stop), have one that is trained."""
  if document.trained is None:
    return np.ones(len(starts), bool)
  mask = np.zeros(len(starts), bool)
  for start, stop in document.trained:
    mask |= (starts < stop) & (stops > start)
  return mask


# Characters that may be held back; what is so long is no text.
_LONGEST_RUN = 64


class StreamDecoder:
  """Decodes ids one by one and never emits half a character.

  All that `push` and the final `flush` return, joined, is the `decode` of all
  the ids. A run of bytes that is not UTF-8 is held back until a valid
  character follows it, it is long, or `flush` comes: only then is its text
  known.
  (A decoder with byte fallback makes U+FFFD of a whole run of bytes if it ends
  badly; characters of that run that were already shown are not taken back.)
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    # `ids[:context]` were emitted; they are kept because the text of a token
    # may depend on the one before it (a leading space, a byte fallback).
    self._ids: list[int] = []
    self._context = 0
    self._emitted = 0

  def push(self, token: int) -> str:
    """Takes the next id and returns the text that it completes, if any."""
    self._ids.append(int(token))
    text = self._tokenizer.decode(self._ids)
    sure = text.rstrip("\N{REPLACEMENT CHARACTER}")
    if len(text) - len(sure) > _LONGEST_RUN:
      sure = text
    new = sure[self._emitted :]
    self._emitted = max(self._emitted, len(sure))
    if text and len(sure) == len(text):
      self._ids = self._ids[self._context :]
      self._context = len(self._ids)
      self._emitted = len(self._tokenizer.decode(self._ids))
    elif not text:
      # Tokens without text, such as special ones: no need to keep them all.
      self._ids, self._context = self._ids[-1:], 0
    return new

  def flush(self) -> str:
    """Returns what was held back, and starts afresh."""
    rest = self._tokenizer.decode(self._ids)[self._emitted :]
    self._ids, self._context, self._emitted = [], 0, 0
    return rest


def load_tokenizer(
  spec: str,
  source: Source | None = None,
  *,
  cache_dir: Path | None = None,
  heldout_fraction: float = 0.0,
  parse_special: bool = False,
) -> Tokenizer:
  """Makes the tokenizer that `spec` names.

  Args:
    spec: `"byte"`; `"bpe:4096"` (any size from 259), trained on the documents
      of `source` that are not held out and cached; the path of a
      `tokenizer.json`; or a folder, as `save` or Hugging Face writes it.
    source: The documents to train a BPE on; other forms do without.
    cache_dir: Where a trained BPE is kept; `None` keeps nothing.
    heldout_fraction: Share of the documents that training must not see.
    parse_special: Whether a special token's text in a document stands for
      that token.

  Raises:
    ValueError: The form is unknown, a BPE has no documents to learn from, or
      the file is no tokenizer.
    FileNotFoundError: There is no such file.
  """
  if spec == "byte":
    return ByteTokenizer()
  kind, _, size = spec.partition(":")
  if kind == "bpe":
    if not size.isdecimal():
      raise ValueError(
        f"data.tokenizer {spec!r} gives no vocabulary size; it is {_FORMS}"
      )
    if source is None:
      raise ValueError(
        f"data.tokenizer {spec!r} is trained on documents, and there is no"
        " source; name the folder where a trained one was saved"
      )
    definition = trained_bpe(
      int(size), source, cache_dir=cache_dir, heldout_fraction=heldout_fraction
    )
    pad, bos, eos = SPECIALS
    return JsonTokenizer(
      definition, pad=pad, bos=bos, eos=eos, parse_special=parse_special
    )
  path = Path(spec).expanduser()
  if not path.exists():
    raise FileNotFoundError(
      f"data.tokenizer {spec!r} does not exist; it is {_FORMS}"
    )
  return _from_files(path, parse_special)


def _from_files(path: Path, parse_special: bool) -> Tokenizer:
  file = path / "tokenizer.json" if path.is_dir() else path
  config_file = file.with_name("tokenizer_config.json")
  config = read_json(config_file) if config_file.exists() else {}
  if config.get("jaxchunk") == "byte":
    return ByteTokenizer()
  if not file.exists():
    raise FileNotFoundError(
      f"folder {path} has no tokenizer.json; data.tokenizer is {_FORMS}"
    )
  definition = file.read_text(encoding="utf-8")
  try:
    vocabulary = tokenizers.Tokenizer.from_str(definition).get_vocab()
  except Exception as error:  # The library raises no narrower class.
    raise ValueError(
      f"{file} is not a file of the `tokenizers` library ({error});"
      f" data.tokenizer is {_FORMS}"
    ) from None

  def name(kind: str, known: Sequence[str]) -> str | None:
    if kind in config:
      value = config[kind]
      return value.get("content") if isinstance(value, dict) else value
    return next((token for token in known if token in vocabulary), None)

  return JsonTokenizer(
    definition,
    bos=name("bos_token", _KNOWN_BOS),
    eos=name("eos_token", _KNOWN_EOS),
    pad=name("pad_token", _KNOWN_PAD),
    parse_special=parse_special,
  )


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
  """What a token stands for in a text, perhaps a part of a character.

  Args:
    tokenizer: Whose.
    token: An id.

  Returns:
    The bytes of UTF-8; of a special token those of its name if it has one.
  """
  if isinstance(tokenizer, ByteTokenizer):
    return bytes([token]) if 0 <= token < 256 else b""
  if not isinstance(tokenizer, JsonTokenizer):
    return tokenizer.decode([token]).encode()
  piece = tokenizer.piece(token)
  text = tokenizer.decode([token])
  if not text:
    return piece.encode()
  if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
    return bytes([int(fallback[1], 16)])
  if "\N{REPLACEMENT CHARACTER}" in text:
    values = _byte_values()
    if all(character in values for character in piece):
      return bytes(values[character] for character in piece)
  # A text does not begin with the space that a word brings along.
  begins = piece.startswith("\u2581") and not text.startswith(" ")
  return f"{' ' * begins}{text}".encode()


@functools.cache
def _byte_values() -> dict[str, int]:
  """Bytes by the printable alphabet of byte-level tokenizers."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in plain]
  others = {chr(256 + number): byte for number, byte in enumerate(rest)}
  return {chr(byte): byte for byte in plain} | others


def _byte_alphabet(text: str) -> str:
  """The text's bytes in the printable alphabet of byte-level tokenizers."""
  level = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  return "".join(part for part, _ in level.pre_tokenize_str(text))


def _special_id(
  backend: tokenizers.Tokenizer, kind: str, name: str | None
) -> int | None:
  if name is None:
    return None
  token = backend.token_to_id(name)
  if token is None:
    raise ValueError(f"the tokenizer has no token {name!r}, its {kind}")
  return token
