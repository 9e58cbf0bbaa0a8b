"""Documents, tokenizer and length index together: what a run trains on."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int8, Int64

from jaxchunk.data.accounting import (
  EXCLUSIONS,
  KEPT,
  PROBLEMS,
  Accounting,
  count_documents,
)
from jaxchunk.data.bpe import SPECIALS
from jaxchunk.data.cache import cache_folder
from jaxchunk.data.chat import ChatTemplate, Layout, load_template
from jaxchunk.data.config import DataConfig, validate
from jaxchunk.data.index import LengthIndex, load_index, read_tokens
from jaxchunk.data.plan import stage_of
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
    lengths: Tokens of each document that are used, BOS and EOS included,
      `[documents]`; less than the index has where documents are truncated.
    targets: How many of those are trained on, `[documents]`.
    template: The chat template of conversations.
  """

  config: DataConfig
  source: Source
  tokenizer: Tokenizer
  index: LengthIndex
  reasons: Int8[np.ndarray, " documents"]
  lengths: Int64[np.ndarray, " documents"]
  targets: Int64[np.ndarray, " documents"]
  template: ChatTemplate | None = None

  @functools.cached_property
  def byte_lengths(self) -> Int64[np.ndarray, " documents"]:
    """Bytes of the text that is trained on, `[documents]`.

    Where a document is truncated, in proportion to its tokens.
    """
    share = self.targets / np.maximum(self.index.targets, 1)
    return np.rint(self.index.byte_lengths * share).astype(np.int64)

  def count(self, documents: Any = slice(None)) -> Accounting:
    """Accounts for documents, by default all."""
    return count_documents(
      self.index.lengths[documents],
      self.reasons[documents],
      used=self.lengths[documents],
      targets=self.targets[documents],
    )


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
  records = config.format != "text"
  layout = None
  if records:
    specials: tuple[str, ...] = SPECIALS
    if tokenizer is None and not config.tokenizer.startswith("bpe:"):
      tokenizer = load_tokenizer(
        config.tokenizer, parse_special=config.parse_special
      )
    if tokenizer is not None:
      specials = tokenizer.specials
    layout = _layout(config, () if config.parse_special else specials)
  source = load_source(
    config.source,
    cache_dir=cache_dir,
    layout=layout,
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
  # Only texts and plain completions are enclosed.
  enclosed = config.format in ("text", "prompt_completion")
  index = load_index(
    source,
    tokenizer,
    bos=config.bos and enclosed,
    eos=config.eos and enclosed,
    cache_dir=cache_dir,
    cache_tokens=config.cache_tokens,
    masked=records,
    skip_bad=config.bad_records == "skip",
  )
  lengths, targets = _used(index, source, tokenizer, config)
  corpus = Corpus(
    config,
    source,
    tokenizer,
    index,
    _exclusion_reasons(index, config, targets),
    lengths,
    targets,
    None if layout is None else layout.template,
  )
  whole = corpus.count()
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


def _layout(config: DataConfig, forbidden: tuple[str, ...]) -> Layout:
  """How the records become documents."""
  template = None
  try:
    template = load_template(config.chat_template, config.tokenizer)
  except ValueError:
    # Completions need one only where they are conversations.
    if config.format != "prompt_completion" or config.chat_template:
      raise
  return Layout(config.format, template, config.train_on, tuple(forbidden))


def _used(
  index: LengthIndex,
  source: Source,
  tokenizer: Tokenizer,
  config: DataConfig,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of each document that are used, and how many are trained on."""
  longest = config.max_document_tokens
  if longest is None or config.too_long == "exclude":
    return index.lengths, index.targets
  lengths = np.minimum(index.lengths, longest)
  targets = np.minimum(index.targets, longest - 1)
  if index.layout.masked:
    for document in np.flatnonzero(index.lengths > longest):
      _, trained = read_tokens(index, source, tokenizer, int(document))
      targets[document] = trained[1:longest].sum()
  return lengths, targets


def describe(corpus: Corpus) -> str:
  """Size, tail and fate of the documents, for the head of a run's log."""
  lengths = corpus.index.lengths
  median, tail = np.percentile(lengths, [50, 99])
  return (
    f"{len(lengths):,} documents, {corpus.index.byte_lengths.sum():,} bytes,"
    f" {lengths.sum():,} tokens; median {median:,.0f}, 99th percentile"
    f" {tail:,.0f}, longest {lengths.max():,}\n"
    + _describe_stages(corpus)
    + corpus.count().table()
  )


def _describe_stages(corpus: Corpus) -> str:
  """A line for each stage of lengths, if there are several."""
  bounds = corpus.config.length_stages
  if not bounds:
    return ""
  kept = corpus.lengths[corpus.reasons == KEPT]
  stages = stage_of(kept, bounds)
  lines = []
  for number, start in enumerate([0, *bounds]):
    own = kept[stages == number]
    end = f" to {bounds[number]:,}" if number < len(bounds) else " and more"
    lines.append(
      f"stage {number + 1} of {len(bounds) + 1}: {start + 1:,}{end} tokens,"
      f" {len(own):,} documents, {own.sum():,} tokens\n"
    )
  return "".join(lines)


def read_examples(corpus: Corpus, documents: Iterable[int]) -> list[Example]:
  """Reads documents as examples: inputs `t[:-1]`, targets `t[1:]`.

  What is not trained on of a document has the weight 0.

  Args:
    corpus: Where they are.
    documents: Their numbers; each must have 2 tokens or more.
  """
  examples = []
  for document in map(int, documents):
    tokens, trained = read_tokens(
      corpus.index, corpus.source, corpus.tokenizer, document
    )
    used = int(corpus.lengths[document])
    tokens, trained = tokens[:used], trained[:used]
    examples.append(
      Example(
        tokens=tokens[:-1],
        targets=tokens[1:],
        weights=trained[1:].astype(np.float32),
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
  usable = _exclusion_reasons(index, unsplit, corpus.targets) == KEPT
  chosen = np.flatnonzero(
    usable & (corpus.reasons == EXCLUSIONS.index("held_out"))
  )
  # By hash, so that a prefix is as good a sample as any.
  chosen = chosen[np.argsort(index.hashes[chosen], kind="stable")]
  if max_tokens is not None:
    chosen = chosen[np.cumsum(corpus.lengths[chosen] - 1) <= max_tokens]
  return read_examples(corpus, chosen)


def _exclusion_reasons(
  index: LengthIndex, config: DataConfig, targets: np.ndarray
) -> Int8[np.ndarray, " documents"]:
  layout = index.layout
  enclosing = (layout.bos_id is not None) + (layout.eos_id is not None)
  longest = config.max_document_tokens
  if config.too_long == "truncate":
    longest = None
  excluded = {
    "held_out": held_out(index.hashes, config.heldout_fraction),
    # BOS and EOS around nothing would be a document of two tokens.
    "empty": index.lengths <= enclosing,
    "too_short": index.lengths < 2,
    "too_long": np.zeros(len(index), bool)
    if longest is None
    else index.lengths > longest,
    "no_target": targets < 1,
    **{name: index.problems == n for n, name in enumerate(PROBLEMS)},
  }
  reasons = np.full(len(index), KEPT, np.int8)
  for number, reason in reversed(list(enumerate(EXCLUSIONS))):
    reasons[excluded[reason]] = number
  return reasons
