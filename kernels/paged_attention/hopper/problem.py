"""What the GPU kernel for pages is given, and how its work is cut."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxchunk.kernels.attention.hopper.problem import LOG2E, ROWS, WORKERS
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView

# Multiprocessors of an H100 or H200, each with one program at a time.
PROCESSORS = 132
# Steps of a worker below which a split would not pay for its merge.
_LEAST_STEPS = 4
# What TMA asks of an address in shared memory, in bytes.
_ALIGNED = 128
_SIZES = (16, 32, 64, 128, 192, 256)
_NARROW = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
_BESIDE = ("k_scale", "v_scale", "positions", "log_weights")


@dataclasses.dataclass(frozen=True)
class PageBlocks:
  """Keys of a step, and steps that are in flight.

  Attributes:
    kv: Keys of a step, at most, a multiple of 64: the compiler has no layout
      for an array of fewer rows.
    stages: Steps in shared memory, an even number.
  """

  kv: int
  stages: int

  def fit(self, Z: int) -> "PageBlocks":
    """Steps of whole pages or of equal parts of one."""
    fits = self.kv % Z == 0 or Z % self.kv == 0
    return dataclasses.replace(self, kv=self.kv if fits else ROWS)


# By head width and whether the pages have 8 bits a number: what fits into 227
# KiB of shared memory and the registers; never run.
BLOCKS = {
  (64, False): PageBlocks(kv=128, stages=4),
  (128, False): PageBlocks(kv=64, stages=4),
  (256, False): PageBlocks(kv=64, stages=2),
  (64, True): PageBlocks(kv=128, stages=6),
  (128, True): PageBlocks(kv=64, stages=6),
  (256, True): PageBlocks(kv=64, stages=2),
}


def unsupported(q: Any, pages: KVPages, view: PageView) -> str | None:
  """Why this backend cannot serve these inputs, or `None` if it can.

  Args:
    q: Queries `[B,K,G,T,H]`; only shape and dtype are looked at.
    pages: The cache, likewise.
    view: Which pages each row reads, likewise.

  Returns:
    A phrase that names what does not fit and its value.
  """
  H = q.shape[-1]
  Z = pages.k.shape[3]
  narrow = pages.k.dtype in _NARROW
  widths = sorted({width for width, _ in BLOCKS})
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q has dtype {q.dtype}, not bfloat16 or float16"
  if not narrow and pages.k.dtype != q.dtype:
    return f"the pages have dtype {pages.k.dtype}, not q's {q.dtype} or 8 bits"
  if narrow and q.dtype == jnp.float16:
    # A probability times a scale may be too small for it.
    return f"q has dtype float16, with pages of {pages.k.dtype}; bfloat16 can"
  if H not in widths:
    return f"the head width is {H}, not one of {widths}"
  if Z not in _SIZES:
    return f"the page size is {Z}, not one of {_SIZES}"
  if not view.table.shape[2]:
    return f"the table has the shape {view.table.shape}, without entries"
  beside = [n for n in _BESIDE if getattr(pages, n) is not None]
  if beside and 4 * Z % _ALIGNED:
    return f"the page size is {Z}, with {beside[0]} not a multiple of 32"
  return None


class PagedProblem(NamedTuple):
  """What is known when the kernel is traced.

  Attributes:
    B: Sequences.
    K: Key heads.
    G: Query heads of a key head.
    T: Queries of a sequence.
    H: Head width.
    Z: Keys of a page.
    dtype: Of the queries, and of what is multiplied.
    narrow: Whether the pages have 8 bits a number.
    scale: Factor on the products.
    softcap: Bound on the scores.
    window: How many positions a query sees.
    kv: Keys of a step.
    stages: Steps in shared memory.
    splits: Programs that share a row's keys.
    interpret: `InterpretGPUParams`, or False.
  """

  B: int
  K: int
  G: int
  T: int
  H: int
  Z: int
  dtype: Any
  narrow: bool
  scale: float
  softcap: float | None
  window: int | None
  kv: int
  stages: int
  splits: int
  interpret: Any

  @classmethod
  def of(
    cls,
    q: Array,
    pages: KVPages,
    view: PageView,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    splits: int | None,
    interpret: Any,
  ) -> "PagedProblem":
    """From what the caller gives, if it is supported."""
    B, K, G, T, H = q.shape
    Z = pages.k.shape[3]
    narrow = pages.k.dtype in _NARROW
    blocks = BLOCKS[H, narrow].fit(Z)
    P = cls(
      *(B, K, G, T, H, Z, q.dtype, narrow, scale, softcap, window),
      *(blocks.kv, blocks.stages, splits or 1, interpret),
    )
    if splits is not None:
      return P
    keys = view.table.shape[2] * Z
    if window is not None and pages.positions is None:
      keys = min(keys, window + T + P.kv)
    return P._replace(splits=count_splits(P.programs, keys, P.kv))

  @property
  def factor(self) -> float:
    """From products, or capped products, to exponents of 2."""
    return LOG2E * (self.scale if self.softcap is None else self.softcap)

  @property
  def rows(self) -> int:
    """Rows of a program that are queries: G * T in eights, or 64."""
    return min(ROWS, 8 * math.ceil(self.G * self.T / 8))

  @property
  def blocks(self) -> int:
    """Programs that share a row's queries."""
    return math.ceil(self.G * self.T / ROWS)

  @property
  def registers(self) -> tuple[int, int]:
    """Of a thread that works and of one that fetches: 2 * a + b = 3 * 168."""
    return (240, 24) if self.H > 128 else (224, 56)

  @property
  def programs(self) -> int:
    """How many there are."""
    return self.B * self.K * self.splits * self.blocks


class Inputs(NamedTuple):
  """What the kernel reads, with X = B * K rows and Y = L * K * P pages.

  Attributes:
    q: `[X,R,H]` queries, R = `blocks` times `rows`.
    k: `[Y,Z,H]`.
    v: `[Y,Z,H]`.
    k_scale: `[Y,Z]`, like the next three, or `None`.
    v_scale: Factors on the values.
    positions: Of the keys.
    log_weights: Added to the scores.
    table: `[X,M]` pages of a row.
    ranges: `[X,7]` numbers of a row (`Range`).
    q_positions: `[B * blocks,64]`, or `None` if there is one to a row.
  """

  q: Any
  k: Any
  v: Any
  k_scale: Any
  v_scale: Any
  positions: Any
  log_weights: Any
  table: Any
  ranges: Any
  q_positions: Any


class Beside(NamedTuple):
  """What stands beside the keys of a step, in shared memory, or `None`s."""

  k_scale: Any
  v_scale: Any
  positions: Any
  log_weights: Any


class Range(NamedTuple):
  """Which keys of a row can be seen, by their place in it.

  Attributes:
    begin: The first that some query sees.
    end: Behind the last.
    full_begin: The first from which every query sees every key.
    full_end: Up to where.
    lowest: Position of the first query.
    highest: Position of the last query.
    base: The first page of this layer and key head.
  """

  begin: Any
  end: Any
  full_begin: Any
  full_end: Any
  lowest: Any
  highest: Any
  base: Any

  def used(self, P: PagedProblem, place: Array, beside: Beside) -> Array:
    """Whether some query may see a key; what others hold is not looked at."""
    used = (place >= self.begin) & (place < self.end)
    if beside.positions is not None:
      position = beside.positions[...]
      used &= position <= self.highest
      if P.window is not None:
        used &= position > self.lowest - P.window
    if beside.log_weights is not None:
      used &= beside.log_weights[...] > -jnp.inf
    return used


def make_ranges(
  P: PagedProblem,
  pages: KVPages,
  view: PageView,
  q_positions: Int[Array, "B T"],
  layer: Any,
) -> Array:
  """The numbers of every row, `[X,7]`."""
  shape = (P.B, P.K)
  lengths = view.lengths.astype(jnp.int32)
  real = q_positions >= 0
  top = jnp.iinfo(jnp.int32).max // 2
  highest = q_positions.max(1)
  lowest = jnp.where(real, q_positions, top).min(1)
  begin = full_begin = jnp.zeros((P.B,), jnp.int32)
  end, full_end = jnp.where(real.any(1), top, 0), jnp.zeros_like(begin)
  if pages.positions is None:
    end = highest + 1
    if pages.log_weights is None:
      # A query that sees nothing has a position of -1.
      full_end = q_positions.min(1) + 1
    if P.window is not None:
      begin = jnp.maximum(lowest - P.window + 1, 0)
      full_begin = jnp.maximum(highest - P.window + 1, 0)
  base = (layer * P.K + jnp.arange(P.K)) * pages.k.shape[2]
  row = Range(
    *(begin[:, None], jnp.minimum(end[:, None], lengths)),
    *(full_begin[:, None], jnp.minimum(full_end[:, None], lengths)),
    *(lowest[:, None], highest[:, None], base[None]),
  )
  numbers = [jnp.broadcast_to(a, shape).astype(jnp.int32) for a in row]
  return jnp.stack(numbers, axis=-1).reshape(-1, len(row))


def count_splits(rows: int, keys: int, kv: int) -> int:
  """Among how many programs a row's keys are divided.

  The fewest that keep nine processors in ten busy, or as many as can be, if
  there are enough keys.

  Args:
    rows: Programs there are without.
    keys: The most that a row can have.
    kv: Keys of a step.
  """
  most = max(1, keys // (kv * WORKERS * _LEAST_STEPS))
  most = min(most, math.ceil(4 * PROCESSORS / rows))

  def busy(splits: int) -> float:
    waves = rows * splits / PROCESSORS
    return min(waves / math.ceil(waves), 0.9)

  return max(range(1, most + 1), key=lambda n: (busy(n), -n))
