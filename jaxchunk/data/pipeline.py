"""Global batches of documents, read ahead, resumable from a small cursor."""

import atexit
import dataclasses
import weakref
from typing import Any

import grain

from jaxchunk.data.accounting import KEPT, Accounting
from jaxchunk.data.corpus import Corpus, read_examples
from jaxchunk.data.plan import (
  EpochPlan,
  batch_documents,
  batch_end,
  plan_epoch,
)
from jaxchunk.types import Example

_CURSOR_VERSION = 1
_DEFAULTS = {
  "too_long": "exclude",
  "bad_records": "raise",
  "length_stages": [],
}


@dataclasses.dataclass(frozen=True)
class GlobalBatch:
  """The documents of one optimiser step, on all hosts together.

  Attributes:
    examples: One per document; `document_id` is its number in the source, the
      same in every epoch.
    epoch: From 0.
    accounting: The tokens read for this batch, passed-over documents included.
    epoch_accounting: The same since the epoch began, this batch included.
    total: The same since training began.
    last_of_epoch: Whether `epoch_accounting` is the epoch's total.
  """

  examples: list[Example]
  epoch: int
  accounting: Accounting
  epoch_accounting: Accounting
  total: Accounting
  last_of_epoch: bool


def training_batches(corpus: Corpus) -> grain.DatasetIterator:
  """Iterates over `GlobalBatch`es, from the start of the first epoch.

  `get_state()` is a JSON dictionary of under a kilobyte that describes what was
  delivered, whatever has been read ahead; `set_state()` with it makes the
  following batches come again exactly. It is a grain iterator, so Orbax can
  save it. `close()` ends the background thread.
  """
  batches = BatchIterator(corpus)
  if not corpus.config.prefetch:
    return batches
  return _ReadAhead(batches, corpus.config.prefetch)


class BatchIterator(grain.DatasetIterator):
  """Reads one batch after the other; the cursor is all its state."""

  def __init__(self, corpus: Corpus):
    super().__init__()
    self._corpus = corpus
    self._identity = _identity(corpus)
    self._epoch, self._place = 0, 0
    self._epoch_accounting, self._total = Accounting(), Accounting()
    self._plan: EpochPlan | None = None

  def __next__(self) -> GlobalBatch:
    corpus, config = self._corpus, self._corpus.config
    if config.num_epochs is not None and self._epoch >= config.num_epochs:
      raise StopIteration
    if self._plan is None or self._plan.epoch != self._epoch:
      self._plan = plan_epoch(
        corpus.lengths,
        corpus.reasons == KEPT,
        seed=config.seed,
        epoch=self._epoch,
        stages=config.length_stages,
      )
    plan, start = self._plan, self._place
    end = batch_end(plan, start, config.batch_tokens)
    examples = read_examples(corpus, batch_documents(plan, start, end))
    passed = plan.order[start:end]
    counted = corpus.count(passed).check()
    batch = GlobalBatch(
      examples=examples,
      epoch=self._epoch,
      accounting=counted,
      epoch_accounting=self._epoch_accounting + counted,
      total=self._total + counted,
      last_of_epoch=end == len(plan.order),
    )
    # Only now: a document that cannot be read leaves the cursor before it.
    self._total = batch.total
    if batch.last_of_epoch:
      self._epoch, self._place = self._epoch + 1, 0
      self._epoch_accounting = Accounting()
    else:
      self._place, self._epoch_accounting = end, batch.epoch_accounting
    return batch

  def get_state(self) -> dict[str, Any]:
    """The cursor: where the next batch begins, and what was read so far."""
    return {
      "version": _CURSOR_VERSION,
      "epoch": self._epoch,
      "place": self._place,
      "epoch_accounting": self._epoch_accounting.to_json(),
      "total": self._total.to_json(),
      "identity": self._identity,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a cursor.

    Raises:
      ValueError: It belongs to other documents, another order or another
        version; the message names what differs.
    """
    if state.get("version") != _CURSOR_VERSION:
      raise ValueError(
        f"the data cursor has version {state.get('version')}, this jaxchunk"
        f" reads {_CURSOR_VERSION}"
      )
    saved = state["identity"]
    differing = [
      f"{name} was {saved.get(name)!r} and is {value!r}"
      for name, value in self._identity.items()
      # A cursor of before there was the field means its default.
      if saved.get(name, _DEFAULTS.get(name)) != value
    ]
    if differing:
      raise ValueError(
        f"the data cursor belongs to other data: {'; '.join(differing)};"
        " restore the configuration, or start the data from the beginning"
      )
    if not 0 <= state["place"] < len(self._corpus.index):
      raise ValueError(
        f"the data cursor is at place {state['place']} of"
        f" {len(self._corpus.index)} documents"
      )
    self._epoch, self._place = int(state["epoch"]), int(state["place"])
    self._epoch_accounting = Accounting.from_json(state["epoch_accounting"])
    self._total = Accounting.from_json(state["total"])


class _ReadAhead(grain.experimental.ThreadPrefetchDatasetIterator):
  """Grain's prefetch, closed before the interpreter takes it apart.

  Left to the garbage collector at exit, or closed twice, its `close` fails on
  module globals that are gone by then, with a traceback at the end of a run.
  """

  def __init__(self, parent: BatchIterator, size: int):
    super().__init__(parent, size)
    self._ended = False
    atexit.register(_close, weakref.ref(self))

  def close(self) -> None:
    """Ends the background thread."""
    if not self._ended:
      self._ended = True
      super().close()


def _close(reference: "weakref.ref[_ReadAhead]") -> None:
  iterator = reference()
  if iterator is not None:
    iterator.close()


def _identity(corpus: Corpus) -> dict[str, Any]:
  """All that decides which documents follow a cursor, except the budget.

  `batch_tokens` may change at a cursor: the order goes on from its place.
  """
  config = corpus.config
  return {
    "source": corpus.source.fingerprint,
    "tokenizer": corpus.tokenizer.fingerprint,
    "bos": config.bos,
    "eos": config.eos,
    "seed": config.seed,
    "heldout_fraction": config.heldout_fraction,
    "max_document_tokens": config.max_document_tokens,
    "too_long": config.too_long,
    "bad_records": config.bad_records,
    "length_stages": list(config.length_stages),
  }
