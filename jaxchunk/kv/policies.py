"""What queries read, what pages keep, what is used again: three interfaces.

Sparse prefill, compression and reuse of keys are implementations of these; the
ones here change nothing, and are what others are held against.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from jaxtyping import Array, Float, Int

from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kv.pool import PageHash, PagePool


class Policy(Protocol):
  """What all choices of keys have."""

  @property
  def name(self) -> str:
    """Of the policy, with all that changes what it does."""

  @property
  def beside(self) -> bool:
    """Whether it needs positions and log-weights beside the keys."""


class Selector(Policy, Protocol):
  """Chooses the pages that queries read."""

  def select(
    self,
    q: Float[Array, "R K G Q H"],
    pages: KVPages,
    layer: Any,
    view: PageView,
    q_positions: Int[Array, "R Q"],
  ) -> PageView:
    """Inside the program, before a layer's attention.

    Args:
      q: Queries of the layer, by rows of one sequence.
      pages: With the keys of these tokens.
      layer: Which of the pages' layers; may be traced.
      view: All pages of each row.
      q_positions: Of the queries, -1 for none.

    Returns:
      A view of some of these pages, for each row and key head. If it leaves
      pages out, it needs positions beside the keys.
    """


class Compactor(Policy, Protocol):
  """Makes fewer pages of those that a prompt has filled."""

  def compact(
    self,
    pages: KVPages,
    view: PageView,
    observed_q: Float[Array, "L K G Q H"] | None,
  ) -> tuple[KVPages, PageView]:
    """Behind a prompt's last chunk.

    Args:
      pages: With the prompt's keys.
      view: Of the prompt, one row a key head.
      observed_q: The last queries of the prompt in every layer, if asked for.

    Returns:
      Pages and view of what is kept.
    """


@dataclasses.dataclass(frozen=True)
class Segment:
  """Tokens whose keys are there already.

  Attributes:
    start: The first of them.
    pages: Where they are.
  """

  start: int
  pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reuse:
  """What of a prompt need not be computed.

  Attributes:
    segments: Of known keys, ascending.
    repair: Tokens of the segments that are computed again all the same.
  """

  segments: tuple[Segment, ...]
  repair: tuple[int, ...] = ()


class Reuser(Protocol):
  """Finds keys that earlier prompts left behind."""

  def find(self, names: Sequence[PageHash], pool: PagePool) -> Reuse:
    """Takes hold of what is known of a prompt.

    Args:
      names: Hashes of the prompt's full pages.
      pool: The pages.
    """


@dataclasses.dataclass(frozen=True)
class KeepAll:
  """Every page is read, and kept as it is: selector and compactor."""

  name: str = "all"
  beside: bool = False

  def select(
    self,
    q: Float[Array, "R K G Q H"],
    pages: KVPages,
    layer: Any,
    view: PageView,
    q_positions: Int[Array, "R Q"],
  ) -> PageView:
    """The view."""
    del q, pages, layer, q_positions
    return view

  def compact(
    self,
    pages: KVPages,
    view: PageView,
    observed_q: Float[Array, "L K G Q H"] | None,
  ) -> tuple[KVPages, PageView]:
    """The pages and the view."""
    del observed_q
    return pages, view


@dataclasses.dataclass(frozen=True)
class Prefix:
  """Uses the pages of an equal prefix again, and nothing else."""

  def find(self, names: Sequence[PageHash], pool: PagePool) -> Reuse:
    """The known pages that the names begin with."""
    pages = pool.look_up(names)
    return Reuse((Segment(0, tuple(pages)),) if pages else ())
