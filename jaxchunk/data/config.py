"""What to train on: the data half of a run's configuration."""

import dataclasses
import typing
from typing import Literal

from jaxchunk.data.chat import Format, TrainOn


@dataclasses.dataclass(kw_only=True)
class DataConfig:
  """Documents, tokenizer and batches. Mutable, so that flags can override.

  Attributes:
    source: `"stdlib"` (the sources of Python's standard library), or the path
      of a `.jsonl` file, a `.parquet` file or a folder.
    text_field: JSON field or parquet column that holds the text.
    pattern: Which files of a folder to take. `*.jsonl` and `*.parquet` files
      are read as shards; any other file is one document.
    format: `"text"`, or of records what they hold: `"messages"`, `"sharegpt"`
      or `"prompt_completion"` (see `jaxchunk.data.chat`).
    chat_template: Of conversations: `"chatml"`, the path of a jinja2
      template, or `None` for the one that the tokenizer brings along.
    train_on: Of conversations: what the `"assistant"` says, its `"last"` turn
      only, or `"all"`. Of `"prompt_completion"` the completion, or `"all"`.
    bad_records: `"raise"` stops at a record that cannot be laid out and names
      it; `"skip"` leaves it out and counts it by its reason.
    errors: `"strict"` makes invalid UTF-8 an error that names the document;
      `"replace"` puts U+FFFD in its place.
    tokenizer: `"byte"`, `"bpe:<vocabulary size>"` (trained on first use), or
      the path of a `tokenizer.json` or of a folder that holds one.
    parse_special: Whether the text `<|eos|>` in a document means the special
      token. Off, documents cannot smuggle such tokens in; a record that
      contains one is then a bad record (chat templates use them freely).
    bos: Put the tokenizer's BOS before every document, unless a chat template
      lays it out.
    eos: Put the tokenizer's EOS behind every document, likewise.
    batch_tokens: Most positions (document tokens - 1) in a global batch. A
      longer document forms a batch of its own.
    max_document_tokens: Longest document (BOS and EOS count). `None` takes
      all.
    too_long: `"exclude"` leaves longer documents out, `"truncate"` cuts off
      their ends; both are counted and reported.
    heldout_fraction: Share of the documents kept for evaluation, chosen by a
      hash of their text: equal documents fall on the same side.
    seed: Of the shuffle, which is new in every epoch.
    length_stages: Bounds in tokens, ascending: an epoch first goes through
      the documents up to the first, then through those up to the second, and
      at last through the longer ones, shuffled within each stage. Empty is
      one stage.
    num_epochs: How often to go through the documents; `None` is for ever.
    prefetch: Batches read ahead by a background thread; 0 turns it off.
    cache_dir: Where indexes and trained tokenizers are kept; `None` means
      `$JAXCHUNK_CACHE`, or else `~/.cache/jaxchunk`.
    cache_tokens: Keep the tokens themselves too (2 bytes each up to a
      vocabulary of 65,536, else 4), so that no epoch tokenises again.
  """

  source: str = "stdlib"
  text_field: str = "text"
  pattern: str = "**/*.txt"
  format: Format = "text"
  chat_template: str | None = None
  train_on: TrainOn = "assistant"
  bad_records: Literal["raise", "skip"] = "raise"
  errors: str = "strict"
  tokenizer: str = "bpe:4096"
  parse_special: bool = False
  bos: bool = True
  eos: bool = True
  batch_tokens: int = 65_536
  max_document_tokens: int | None = None
  too_long: Literal["exclude", "truncate"] = "exclude"
  heldout_fraction: float = 0.02
  seed: int = 0
  length_stages: tuple[int, ...] = ()
  num_epochs: int | None = None
  prefetch: int = 2
  cache_dir: str | None = None
  cache_tokens: bool = True


def validate(config: DataConfig) -> None:
  """Checks the values that can be checked without reading anything.

  Raises:
    ValueError: Names the field, its value and what it may be.
  """
  if config.batch_tokens < 1:
    raise ValueError(
      f"data.batch_tokens is {config.batch_tokens}; it must be at least 1"
    )
  if config.max_document_tokens is not None and config.max_document_tokens < 2:
    raise ValueError(
      f"data.max_document_tokens is {config.max_document_tokens}; it must be at"
      " least 2 (a document of 1 token has no target), or None"
    )
  if not 0 <= config.heldout_fraction < 1:
    raise ValueError(
      f"data.heldout_fraction is {config.heldout_fraction}; it must be at least"
      " 0 and less than 1"
    )
  if config.num_epochs is not None and config.num_epochs < 1:
    raise ValueError(
      f"data.num_epochs is {config.num_epochs}; it must be at least 1, or None"
      " to go on for ever"
    )
  if config.prefetch < 0:
    raise ValueError(f"data.prefetch is {config.prefetch}; 0 turns it off")
  if config.seed < 0:
    raise ValueError(f"data.seed is {config.seed}; it must not be negative")
  stages = list(config.length_stages)
  if stages != sorted(set(stages)) or any(bound < 2 for bound in stages):
    raise ValueError(
      f"data.length_stages is {config.length_stages!r}; it holds ascending "
      "lengths of at least 2 tokens"
    )
  for name in ("format", "train_on", "bad_records", "too_long"):
    value = getattr(config, name)
    known = typing.get_args(typing.get_type_hints(DataConfig)[name])
    if value not in known:
      raise ValueError(f"data.{name} is {value!r}; it is one of {list(known)}")
  if config.errors not in ("strict", "replace"):
    raise ValueError(
      f"data.errors is {config.errors!r}; it is 'strict' or 'replace'"
    )
