"""Which sequence holds which page, and which pages hold a known prefix.

Host only. A page holds the keys and values of Z tokens in all layers; several
sequences may hold one, which none of them writes to then. A full page is known
by the hash of everything its contents depend on: all tokens up to its end, the
adapter they ran with, and the policy that may have dropped some of them. When
its last holder lets go of it, it stays known until its room is needed; the one
that has been free longest goes first.

Sources: the block tables of PagedAttention (arXiv 2309.06180) and the prefix
cache of vLLM.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

PageHash = bytes


def chain(
  parent: PageHash, tokens: Sequence[int] | np.ndarray, extra: str = ""
) -> PageHash:
  """The name of a page's contents.

  Args:
    parent: Of the page before; `root` for the first.
    tokens: Of the page.
    extra: What else its contents depend on; only the first page needs it.
  """
  hasher = hashlib.blake2b(parent, digest_size=16)
  hasher.update(np.asarray(tokens, np.int32).tobytes())
  if extra:
    hasher.update(b"\0" + extra.encode())
  return hasher.digest()


def root(adapter: str | None, policy: str) -> PageHash:
  """The parent of a sequence's first page.

  Args:
    adapter: Of the sequence.
    policy: A name for how keys are chosen and dropped.
  """
  return chain(b"", (), f"{policy}\0{adapter or ''}\0{adapter is None}")


@dataclasses.dataclass
class PoolStats:
  """Counts since the pool was made, in pages.

  Attributes:
    asked: Full pages of sequences that began.
    found: Of these, those that were known.
    evicted: Known pages whose room was needed.
  """

  asked: int = 0
  found: int = 0
  evicted: int = 0


class PagePool:
  """Hands out pages and takes them back.

  Args:
    num_pages: How many there are.
    page_size: Z, tokens in each.
    caching: Whether full pages stay known after their last holder.
  """

  def __init__(
    self,
    num_pages: int,
    page_size: int,
    *,
    caching: bool = True,
  ):
    if num_pages < 1 or page_size < 1:
      raise ValueError(
        f"num_pages={num_pages} and page_size={page_size} must be positive"
      )
    self.num_pages, self.page_size = num_pages, page_size
    self.caching = caching
    self.stats = PoolStats()
    self._empty = list(range(num_pages - 1, -1, -1))
    self._holders = [0] * num_pages
    self._known: dict[PageHash, int] = {}
    self._names: dict[int, PageHash] = {}
    # Known pages that nobody holds, the one that is longest so first.
    self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()

  @property
  def free(self) -> int:
    """Pages that can be had."""
    return len(self._empty) + len(self._idle)

  @property
  def held(self) -> int:
    """Pages that somebody holds."""
    return self.num_pages - self.free

  def allocate(self, number: int) -> list[int] | None:
    """So many pages to write to, or `None` if there are fewer."""
    if number > self.free:
      return None
    pages = [self._take() for _ in range(number)]
    for page in pages:
      self._holders[page] = 1
    return pages

  def _take(self) -> int:
    if self._empty:
      return self._empty.pop()
    page, _ = self._idle.popitem(last=False)
    name = self._names.pop(page)
    del self._known[name]
    self.stats.evicted += 1
    return page

  def release(self, pages: Iterable[int]) -> None:
    """Lets go of pages; the last ones of a sequence are forgotten first."""
    for page in reversed(list(pages)):
      if self._holders[page] < 1:
        raise ValueError(f"page {page} is held by nobody")
      self._holders[page] -= 1
      if self._holders[page]:
        continue
      if page in self._names:
        self._idle[page] = None
      else:
        self._empty.append(page)

  def name(self, page: int, name: PageHash) -> None:
    """Makes a full page known. Where the name is taken, nothing changes."""
    if self.caching and name not in self._known and page not in self._names:
      self._known[name] = page
      self._names[page] = name

  def look_up(self, names: Sequence[PageHash]) -> list[int]:
    """Takes hold of the known pages that `names` begin with."""
    found = []
    for name in names:
      page = self._known.get(name)
      if page is None:
        break
      found.append(page)
    for page in found:
      self._holders[page] += 1
      self._idle.pop(page, None)
    return found

  def count_shared(self, names: Iterable[PageHash]) -> int:
    """How many of the pages of these names somebody holds now."""
    return sum(
      page is not None and self._holders[page] > 0
      for page in map(self._known.get, names)
    )

  def forget(self) -> None:
    """Makes all pages unknown; to be called when nobody holds any."""
    for page in self._idle:
      self._empty.append(page)
    self._idle.clear()
    self._known.clear()
    self._names.clear()

  def check(self, held: Iterable[Sequence[int]]) -> None:
    """Makes sure that no page leaks and none has two uses.

    Args:
      held: The pages of each sequence that holds some.

    Raises:
      ValueError: Something does not add up; says what.
    """
    count = collections.Counter(page for pages in held for page in pages)
    for page in range(self.num_pages):
      if count[page] != self._holders[page]:
        raise ValueError(
          f"page {page} counts {self._holders[page]} holders and has "
          f"{count[page]}"
        )
    free = [*self._empty, *self._idle]
    if len(set(free)) != len(free) or any(count[page] for page in free):
      raise ValueError("a page is free twice, or free and held")
    if len(free) + sum(n > 0 for n in count.values()) != self.num_pages:
      raise ValueError("pages are lost: neither free nor held")
    if any(self._known[name] != page for page, name in self._names.items()):
      raise ValueError("a page is known by another's name")
