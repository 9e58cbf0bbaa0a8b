"""Keys and values outside of the device: the memory of the host.

Copies arrive from the device while steps go on, are checked by a checksum when
they come back, and make room for newer ones. A tier may have another below it,
as a disk or another host would be: what has no room goes there, and what is not
found is asked for there.

Source: the chunks of LMCache (256 tokens; device, host, disk, remote).
"""

import collections
import concurrent.futures
import dataclasses
import threading
import zlib
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

Key = Hashable


class Tier(Protocol):
  """Keeps copies of pages by name."""

  def put(self, key: Key, copies: Any) -> None:
    """Keeps a pytree of arrays; may forget it at any time."""

  def get(self, key: Key) -> Any | None:
    """The same arrays on the host, or `None`."""

  def has(self, key: Key) -> bool:
    """Whether it was kept and not forgotten."""

  def takes(self) -> bool:
    """Whether it would take copies in now."""

  def drop(self, key: Key) -> None:
    """Forgets a name, if it is known."""


@dataclasses.dataclass
class TierStats:
  """Counts since the tier was made.

  Attributes:
    kept: Entries that were taken in.
    found: Entries that were given back.
    missed: Names that were not known.
    forgotten: Entries whose room was needed.
    refused: Copies not taken in, as too many were on their way.
    damaged: Entries whose checksum was wrong.
  """

  kept: int = 0
  found: int = 0
  missed: int = 0
  forgotten: int = 0
  refused: int = 0
  damaged: int = 0


@dataclasses.dataclass
class _Entry:
  leaves: list[np.ndarray]
  structure: Any
  checksum: int
  size: int


class HostTier:
  """Copies in the host's memory, the least recently used forgotten first.

  Args:
    capacity: Bytes.
    lower: Where entries go that have no room; `None` is nowhere.
    on_the_way: Copies from the device that may be under way at a time.
  """

  def __init__(
    self, capacity: int, *, lower: Tier | None = None, on_the_way: int = 64
  ):
    if capacity < 1:
      raise ValueError(f"capacity={capacity} bytes must be positive")
    self.capacity, self.size = capacity, 0
    self.stats = TierStats()
    self._lower, self._most = lower, on_the_way
    self._entries: collections.OrderedDict[Key, _Entry] = (
      collections.OrderedDict()
    )
    self._coming: dict[Key, concurrent.futures.Future[None]] = {}
    # Names that were dropped before their copies had come.
    self._unwanted: set[Key] = set()
    self._lock = threading.Lock()
    self._worker = concurrent.futures.ThreadPoolExecutor(
      1, thread_name_prefix="host-tier"
    )

  def put(self, key: Key, copies: Any) -> None:
    """Takes arrays of the device in, when they have come."""
    leaves, structure = jax.tree.flatten(copies)
    with self._lock:
      if key in self._entries or key in self._coming:
        self._unwanted.discard(key)
        return
      if len(self._coming) >= self._most:
        self.stats.refused += 1
        return
      for leaf in leaves:
        if isinstance(leaf, jax.Array):
          leaf.copy_to_host_async()
      self._coming[key] = self._worker.submit(
        self._take_in, key, leaves, structure
      )

  def _take_in(self, key: Key, leaves: Sequence[Any], structure: Any) -> None:
    try:
      # Copies of their own: on CPU an array may be the device's memory.
      arrays = [np.array(leaf) for leaf in leaves]
      entry = _Entry(
        arrays, structure, _checksum(arrays), sum(a.nbytes for a in arrays)
      )
      with self._lock:
        self._add(key, entry)
    finally:
      with self._lock:
        del self._coming[key]
        self._unwanted.discard(key)

  def _add(self, key: Key, entry: _Entry) -> None:
    if key in self._unwanted:
      return
    if entry.size > self.capacity:
      self.stats.refused += 1
      return
    while self.size + entry.size > self.capacity:
      name, oldest = self._entries.popitem(last=False)
      self.size -= oldest.size
      self.stats.forgotten += 1
      if self._lower is not None:
        arrays = jax.tree.unflatten(oldest.structure, oldest.leaves)
        self._lower.put(name, arrays)
    self._entries[key] = entry
    self.size += entry.size
    self.stats.kept += 1

  def takes(self) -> bool:
    """Whether fewer copies are on their way than may be."""
    return len(self._coming) < self._most

  def has(self, key: Key) -> bool:
    """Whether it is here, on its way, or below."""
    with self._lock:
      if key in self._entries or key in self._coming:
        return True
    return self._lower is not None and self._lower.has(key)

  def get(self, key: Key) -> Any | None:
    """The arrays; waits for those that are on their way."""
    coming = self._coming.get(key)
    if coming is not None:
      # If the copy has failed, there is none.
      concurrent.futures.wait([coming])
    with self._lock:
      entry = self._entries.get(key)
      if entry is not None:
        self._entries.move_to_end(key)
    if entry is None:
      self.stats.missed += 1
      return None if self._lower is None else self._lower.get(key)
    if _checksum(entry.leaves) != entry.checksum:
      self.stats.damaged += 1
      self.drop(key)
      return None
    self.stats.found += 1
    return jax.tree.unflatten(entry.structure, entry.leaves)

  def drop(self, key: Key) -> None:
    """Forgets a name, if it is known."""
    with self._lock:
      if key in self._coming:
        self._unwanted.add(key)
      entry = self._entries.pop(key, None)
      if entry is not None:
        self.size -= entry.size
    if self._lower is not None:
      self._lower.drop(key)

  def close(self) -> None:
    """Waits for what is on its way, and ends the thread."""
    self._worker.shutdown()


def _checksum(arrays: Sequence[np.ndarray]) -> int:
  value = 0
  for array in arrays:
    value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
  return value
