"""What the TPU kernel for pages is given: its form, its rows, its limits."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.tpu.work import LANES
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView

_HEAD_DIMS = (64, 128, 256)
_PAGE_SIZES = (16, 32, 64, 128, 256)
# Of the 1 MB of scalar memory: entries of one row's table, of which there are
# four copies, and rows, of which each has `FIELDS` words.
_MAX_ENTRIES = 32 * 1024
_MAX_ROWS = 16 * 1024
# Query heads of a key head; their scores of a step must fit vector memory.
_MAX_GROUP = 64
# Rows of what stands beside the keys in a tile.
TILE = 8
# Words of a row: its first page, how many it reads, steps of all rows before,
# keys, and the lowest and the highest position of its queries.
START, COUNT, BEFORE, LENGTH, LOW, HIGH, FIELDS = range(7)
# What may stand beside the keys.
BESIDE = ("k_scale", "v_scale", "positions", "log_weights")


@dataclasses.dataclass(frozen=True)
class TpuSteps:
  """The most that a step takes.

  Attributes:
    keys: Keys.
    queries: Queries, times the query heads of a key head.
  """

  keys: int = 512
  queries: int = 512


@dataclasses.dataclass(frozen=True)
class Form:
  """What the kernel knows of a call when it is traced.

  Attributes:
    heads: K and G: key heads, and query heads of each.
    queries: Of a row, without heads.
    blocks: Blocks of queries of a sequence.
    rows: Of a core.
    page: Z, keys of a page.
    step: R, pages of a step.
    pages: P, of the cache.
    turned: Keys lie along the lanes, heads' elements along the sublanes.
    beside: Names of what stands beside the keys.
    window: How many positions a query sees.
    scale: Factor on the scores.
    softcap: Cap on the scores.
    dtype: Of queries and products.
  """

  heads: tuple[int, int]
  queries: int
  blocks: int
  rows: int
  page: int
  step: int
  pages: int
  turned: bool
  beside: tuple[str, ...]
  window: int | None
  scale: float
  softcap: float | None
  dtype: Any

  @property
  def keys(self) -> int:
    """Of a step."""
    return self.step * self.page

  @property
  def in_place(self) -> bool:
    """Whether what stands beside the keys is read where it is."""
    return self.page % LANES == 0 and self.pages % TILE == 0

  def full(self, word: Any, n: Any) -> Any:
    """Whether every query sees every key of step n of a row."""
    if "positions" in self.beside or "log_weights" in self.beside:
      return False
    begin = (word(START) + n * self.step) * self.page
    end = begin + self.keys
    found = (end <= word(LENGTH)) & (end - 1 <= word(LOW))
    if self.window is not None:
      found &= word(HIGH) - begin < self.window
    return found

  def dot(self, a: Array, b: Array, axis: int) -> Array:
    """Product over a's last axis and one of b's, in fp32."""
    wide = self.dtype == jnp.float32
    return lax.dot_general(
      a,
      b,
      (((1,), (axis,)), ((), ())),
      precision=lax.Precision.HIGHEST if wide else None,
      preferred_element_type=jnp.float32,
    )


def row_words(
  form: Form,
  view: PageView,
  position: Int[Array, "B I Q"],
  ordered: bool,
) -> Int[Array, " words"]:
  """`FIELDS` words of each row, and of an empty one behind the last."""
  Z = form.page
  low, high = position.min(-1)[:, None], position.max(-1)[:, None]
  some = jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position)
  end = -(-view.lengths // Z)[:, :, None]
  end = jnp.where(high >= 0, end, 0)
  start = jnp.zeros_like(end)
  if ordered:
    end = jnp.minimum(end, high // Z + 1)
    if form.window is not None:
      first = jnp.maximum(some.min(-1)[:, None] - (form.window - 1), 0)
      start += first // Z
  count = jnp.maximum(end - start, 0)
  steps = -(-count // form.step).reshape(-1)
  before = jnp.cumsum(steps, dtype=jnp.int32) - steps
  before = before.reshape(count.shape)
  fields = (start, count, before, view.lengths[:, :, None], low, high)
  words = jnp.stack([jnp.broadcast_to(a, count.shape) for a in fields], -1)
  words = words.astype(jnp.int32).reshape(-1)
  return jnp.pad(words, (0, FIELDS))


def unsupported(
  q: Float[Array, "B K G T H"], pages: KVPages, view: PageView
) -> str | None:
  """Why this kernel cannot serve the arguments; `None` if it can.

  Args:
    q: Queries, like the others arrays or shapes and dtypes.
    pages: The cache.
    view: Which pages each row reads.

  Returns:
    The reason, as the end of a sentence.
  """
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    return f"the dtype is {q.dtype}, not float32 or bfloat16"
  B, K, G, T, H = q.shape
  Z, M = pages.k.shape[3], view.table.shape[2]
  if H not in _HEAD_DIMS:
    return f"the head width H={H} is none of {_HEAD_DIMS}"
  if Z not in _PAGE_SIZES:
    return f"the page size Z={Z} is none of {_PAGE_SIZES}"
  if H % LANES and Z % LANES:
    return f"pages of H={H} need Z a multiple of {LANES}, got Z={Z}"
  if G > _MAX_GROUP:
    return (
      f"G={G} query heads for a key head are more than the {_MAX_GROUP} whose "
      "scores fit vector memory"
    )
  if M > _MAX_ENTRIES:
    return (
      f"a row's table has M={M} entries, more than the {_MAX_ENTRIES} that fit "
      "the scalar memory"
    )
  Q = min(T, max(1, TpuSteps().queries // G))
  rows = B * K * -(-T // Q)
  if rows > _MAX_ROWS:
    return f"{rows} rows are more than the {_MAX_ROWS} that fit scalar memory"
  return None
