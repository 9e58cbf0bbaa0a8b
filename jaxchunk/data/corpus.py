"""Documents, tokenizer and length index together: what a run trains on."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from absl import logging
from jaxtyping import Int8

from jaxchunk.data.accounting import EXCLUSIONS, KEPT, count_documents
from jaxchunk.data.cache import cache_folder
from jaxchunk.data.config import DataConfig, validate
from jaxchunk.data.index import LengthIndex, load_index, read_tokens
from jaxchunk.data.sources import Source, load_source
from jaxchunk.data.split import held_out
from jaxchunk.data.tokenizers import Tokenizer, load_tokenizer
from jaxchunk.types import Example


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents, how they are tokenised, and what is known of each.

  Attributes:
    config: What it was opened with; a copy.
    source: The texts.
    tokenizer: Text to ids and back.
    index: The length of every document.
    reasons: `accounting.KEPT`, or the index into `accounting.EXCLUSIONS` of why
      a document is not trained on, `[documents]`.
  """

  config: DataConfig
  source: Source
  tokenizer: Tokenizer
  index: LengthIndex
  reasons: Int8[np.ndarray, " documents"]


def open_corpus(
  config: DataConfig, *, tokenizer: Tokenizer | None = None
) -> Corpus:
  """Opens the documents, gets the tokenizer and the length index.

  The first call on new data trains the tokenizer (if it is a BPE) and tokenises
  everything once; later ones read the cache.

  Args:
    config: What to open.
    tokenizer: Used in place of `config.tokenizer`: the one a run saved.

  Raises:
    ValueError: A value of the configuration or a document is bad, or nothing
      is left to train on. The message says what to do.
    FileNotFoundError: A path does not exist.
  """
  validate(config)
  config = dataclasses.replace(config)
  cache_dir = cache_folder(config.cache_dir)
  source = load_source(
    config.source,
    cache_dir=cache_dir,
    text_field=config.text_field,
    pattern=config.pattern,
    errors=config.errors,
  )
  if tokenizer is None:
    tokenizer = load_tokenizer(
      config.tokenizer,
      source,
      cache_dir=cache_dir,
      heldout_fraction=config.heldout_fraction,
      parse_special=config.parse_special,
    )
  index = load_index(
    source,
    tokenizer,
    bos=config.bos,
    eos=config.eos,
    cache_dir=cache_dir,
    cache_tokens=config.cache_tokens,
  )
  corpus = Corpus(
    config, source, tokenizer, index, _exclusion_reasons(index, config)
  )
  whole = count_documents(index.lengths, corpus.reasons)
  if whole.trained == 0:
    raise ValueError(
      f"data.source {config.source!r} leaves nothing to train on: of"
      f" {whole.documents} documents these are excluded:"
      f" {dict(whole.excluded_documents)}; raise data.max_document_tokens or"
      " lower data.heldout_fraction"
    )
  if config.heldout_fraction > 0 and "held_out" not in whole.excluded:
    logging.warning(
      "data.heldout_fraction=%g of %d documents holds out none",
      config.heldout_fraction,
      whole.documents,
    )
  return corpus


def describe(corpus: Corpus) -> str:
  """Size, tail and fate of the documents, for the head of a run's log."""
  lengths = corpus.index.lengths
  median, tail = np.percentile(lengths, [50, 99])
  return (
    f"{len(lengths):,} documents, {corpus.index.byte_lengths.sum():,} bytes,"
    f" {lengths.sum():,} tokens; median {median:,.0f}, 99th percentile"
    f" {tail:,.0f}, longest {lengths.max():,}\n"
    + count_documents(lengths, corpus.reasons).table()
  )


def read_examples(corpus: Corpus, documents: Iterable[int]) -> list[Example]:
  """Reads documents as examples: inputs `t[:-1]`, targets `t[1:]`.

  Args:
    corpus: Where they are.
    documents: Their numbers; each must have 2 tokens or more.
  """
  examples = []
  for document in map(int, documents):
    tokens = read_tokens(
      corpus.index, corpus.source, corpus.tokenizer, document
    )
    examples.append(
      Example(
        tokens=tokens[:-1],
        targets=tokens[1:],
        weights=np.ones(len(tokens) - 1, np.float32),
        document_id=document,
      )
    )
  return examples


def heldout_examples(
  corpus: Corpus, *, max_tokens: int | None = None
) -> list[Example]:
  """The documents kept for evaluation, always in the same order.

  Those that training would have excluded (empty, too short, longer than
  `max_document_tokens`) are left out here too.

  Args:
    corpus: Where they are.
    max_tokens: Stop before this many positions are exceeded; `None` reads all.
  """
  index, config = corpus.index, corpus.config
  unsplit = dataclasses.replace(config, heldout_fraction=0.0)
  usable = _exclusion_reasons(index, unsplit) == KEPT
  chosen = np.flatnonzero(
    usable & (corpus.reasons == EXCLUSIONS.index("held_out"))
  )
  # By hash, so that a prefix is as good a sample as any.
  chosen = chosen[np.argsort(index.hashes[chosen], kind="stable")]
  if max_tokens is not None:
    chosen = chosen[np.cumsum(index.lengths[chosen] - 1) <= max_tokens]
  return read_examples(corpus, chosen)


def _exclusion_reasons(
  index: LengthIndex, config: DataConfig
) -> Int8[np.ndarray, " documents"]:
  enclosing = config.bos + config.eos
  longest = config.max_document_tokens
  excluded = {
    "held_out": held_out(index.hashes, config.heldout_fraction),
    # BOS and EOS around nothing would be a document of two tokens.
    "empty": index.lengths <= enclosing,
    "too_short": index.lengths < 2,
    "too_long": np.zeros(len(index), bool)
    if longest is None
    else index.lengths > longest,
  }
  reasons = np.full(len(index), KEPT, np.int8)
  for number, reason in reversed(list(enumerate(EXCLUSIONS))):
    reasons[excluded[reason]] = number
  return reasons
