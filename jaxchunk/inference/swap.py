"""Moves pages between the device and a tier below it.

Two reasons: a sequence that lost its pages finds them again (*parked*), and
full chunks of 256 tokens are kept under their hash for other sequences that
begin alike, after the device has forgotten them.
"""

import dataclasses
import itertools
from collections.abc import Sequence as Many
from typing import Any, Protocol

import numpy as np

from jaxchunk.inference.scheduler import Lost
from jaxchunk.inference.sequence import Sequence
from jaxchunk.kv.tiers import Key, Tier

CHUNK = 256
"""Tokens that are kept as one."""


class Copier(Protocol):
  """The device's pages; see `DeviceRunner`."""

  def read(self, numbers: np.ndarray) -> Any:
    """Copies of pages, behind the steps under way."""

  def write(self, numbers: np.ndarray, copies: Any) -> None:
    """Fills pages, before the steps to come."""


@dataclasses.dataclass
class SwapStats:
  """Counts since the engine began, in tokens.

  Attributes:
    parked: Whose keys were taken to the tier after a preemption.
    resumed: Of these, those that came back.
    restored: Of prompts, whose keys came back for another sequence.
  """

  parked: int = 0
  resumed: int = 0
  restored: int = 0


class PageSwap:
  """Pages of an engine in a tier.

  Args:
    copier: The device's pages.
    tier: Where they are kept.
    page_size: Z.
    num_pages: Pages of the device.
    sharing: Whether full chunks are kept for other sequences.
  """

  def __init__(
    self,
    copier: Copier,
    tier: Tier,
    *,
    page_size: int,
    num_pages: int,
    sharing: bool = True,
  ):
    self._copier, self._tier, self._sharing = copier, tier, sharing
    self._page_size, self._nowhere = page_size, num_pages
    self.group = max(CHUNK // page_size, 1)
    self.stats = SwapStats()
    # The number of its parking, and how many tokens.
    self._parked: dict[Sequence, tuple[int, int]] = {}
    self._parkings = itertools.count()
    self._offered: dict[Sequence, int] = {}

  @property
  def _tokens(self) -> int:
    """Of a group of pages."""
    return self.group * self._page_size

  def park(self, lost: Lost) -> None:
    """Keeps what a sequence had, until it begins again."""
    self._offered.pop(lost.sequence, None)
    taken, parking = 0, next(self._parkings)
    for number in range(-(-lost.computed // self._tokens)):
      if not self._tier.takes():
        # The rest is computed again.
        break
      pages = lost.pages[number * self.group : (number + 1) * self.group]
      copies = self._copier.read(self._padded(pages, pages[-1]))
      self._tier.put(_parked_key(parking, number), copies)
      taken = min((number + 1) * self._tokens, lost.computed)
    if taken:
      self._parked[lost.sequence] = parking, taken
      self.stats.parked += taken

  def offer(self, sequence: Sequence) -> None:
    """Keeps the chunks of a sequence that are full, for others."""
    if not self._sharing:
      return
    done = self._offered.get(sequence, 0)
    full = sequence.named // self.group
    for number in range(done, full):
      key = self._chunk_key(sequence, number)
      if not self._tier.has(key) and self._tier.takes():
        first = number * self.group
        pages = sequence.pages[first : first + self.group]
        self._tier.put(key, self._copier.read(self._padded(pages, 0)))
    if full > done:
      self._offered[sequence] = full

  def drop(self, sequence: Sequence) -> None:
    """A sequence has ended."""
    self._offered.pop(sequence, None)
    self._unpark(sequence)

  def restore(self, sequence: Sequence, pages: Many[int], known: int) -> int:
    """Fills pages with what is kept of a sequence; see `Stored`."""
    most = sequence.length - 1
    at = self._resume(sequence, pages, known)
    self.stats.resumed += at - known
    if not self._sharing:
      return at
    names = sequence.page_names(self._page_size, most)
    full = len(names) // self.group
    begin = at
    for number in range(at // self._tokens, full):
      end = (number + 1) * self._tokens
      copies = self._tier.get(self._chunk_key(sequence, number))
      if copies is None:
        break
      self._fill(pages, number, at, copies)
      at = end
    self.stats.restored += at - begin
    return at

  def _resume(self, sequence: Sequence, pages: Many[int], known: int) -> int:
    """Brings back what was parked; how many tokens are there then."""
    parking, taken = self._parked.get(sequence, (0, 0))
    computed = min(taken, sequence.length - 1)
    at = known
    for number in range(at // self._tokens, -(-computed // self._tokens)):
      copies = self._tier.get(_parked_key(parking, number))
      if copies is None:
        break
      self._fill(pages, number, at, copies)
      at = min((number + 1) * self._tokens, computed)
    self._unpark(sequence)
    return max(at, known)

  def _unpark(self, sequence: Sequence) -> None:
    parking, taken = self._parked.pop(sequence, (0, 0))
    for number in range(-(-taken // self._tokens)):
      self._tier.drop(_parked_key(parking, number))

  def _fill(self, pages: Many[int], number: int, at: int, copies: Any) -> None:
    """Writes a group, but not to pages that are known already."""
    first = number * self.group
    targets = list(pages[first : first + self.group])
    for place in range(max(at // self._page_size - first, 0)):
      targets[place] = self._nowhere
    self._copier.write(self._padded(targets, self._nowhere), copies)

  def _padded(self, pages: Many[int], filler: int) -> np.ndarray:
    short = self.group - len(pages)
    return np.asarray([*pages, *[filler] * short], np.int32)

  def _chunk_key(self, sequence: Sequence, number: int) -> Key:
    return "chunk", sequence.names[(number + 1) * self.group - 1]


def _parked_key(parking: int, number: int) -> Key:
  # Never the same again: copies of one that was dropped may still be coming.
  return "parked", parking, number
