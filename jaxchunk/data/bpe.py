"""A byte-level BPE, trained on first use and cached."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from absl import logging

from jaxchunk.data.cache import atomic_write
from jaxchunk.data.chat import RecordError
from jaxchunk.data.files import hash_parts
from jaxchunk.data.sources import Source
from jaxchunk.data.split import held_out, text_hash

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>")
_SMALLEST = 256 + len(SPECIALS)
_TRAIN_BYTES = 256 << 20


def trained_bpe(
  size: int,
  source: Source,
  *,
  cache_dir: Path | None,
  heldout_fraction: float,
) -> str:
  """A byte-level BPE as JSON, from the cache or trained now.

  Training is deterministic: the same texts give the same bytes.

  Args:
    size: Vocabulary size, special tokens included. Few or small documents may
      give less.
    source: What to train on: its documents in order, up to 256 MiB.
    cache_dir: Where it is kept; `None` keeps nothing. A corrupt file is made
      anew, with a warning in the log.
    heldout_fraction: Share of the documents to leave out.

  Raises:
    ValueError: `size` cannot hold the bytes and the special tokens.
  """
  if size < _SMALLEST:
    raise ValueError(
      f"a byte-level BPE of {size} tokens cannot be: 256 bytes and"
      f" {len(SPECIALS)} special tokens make {_SMALLEST}; take 'bpe:4096'"
    )
  key = hash_parts("1", source.fingerprint, str(size), repr(heldout_fraction))
  cached = cache_dir / f"bpe-{size}-{key}.json" if cache_dir else None
  if cached and cached.exists():
    try:
      definition = cached.read_text(encoding="utf-8")
      tokenizers.Tokenizer.from_str(definition)
      return definition
    except Exception as error:  # The library raises no narrower class.
      logging.warning("Training anew: %s is corrupt (%s)", cached, error)
  logging.info("Training a BPE of %d tokens on %d documents", size, len(source))
  definition = train_bpe(size, _texts(source, heldout_fraction))
  if cached:
    with atomic_write(cached) as file:
      file.write(definition.encode())
  return definition


def _texts(source: Source, heldout_fraction: float) -> Iterator[str]:
  seen = 0
  for index in range(len(source)):
    try:
      text = source[index]
    except RecordError:
      continue  # The index raises it, or counts it.
    digest = np.asarray([text_hash(text)], np.uint64)
    if held_out(digest, heldout_fraction)[0]:
      continue
    seen += len(text)
    yield text
    if seen > _TRAIN_BYTES:
      logging.info("The BPE is trained on the first %d documents", index + 1)
      return


def train_bpe(
  size: int, texts: Iterable[str], specials: Sequence[str] = SPECIALS
) -> str:
  """Trains a byte-level BPE.

  Args:
    size: Of the vocabulary, special tokens included.
    texts: To learn from.
    specials: Texts of special tokens, which have the first ids.

  Returns:
    Its definition, as the `tokenizers` library writes it.
  """
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=list(specials),
    initial_alphabet=sorted(byte_level.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer.to_str()
