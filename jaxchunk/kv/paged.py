"""Keys and values of all layers in pages, written and read by a step.

A step runs tokens of many sequences side by side, as one row. Each layer
writes their keys and values to the places they were given, then its queries
read through views: tables of pages, one for each sequence and key head, so
that heads may come to read different tokens. What a view shows is up to a
`Selector`; what pages hold, to a `Compactor` (`jaxchunk.kv.policies`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.paged_attention.api import paged_attention_grouped
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kernels.vma import vary_like
from jaxchunk.kv.policies import KeepAll, Selector
from jaxchunk.models.config import ModelConfig

PagedKV = tuple[KVPages, ...]
"""Pages of all layers, one `KVPages` for each position of the pattern."""

NARROW = ("int8", "float8_e4m3fn", "float8_e5m2")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Queries that read together: `R` rows of up to `Q` of one sequence.

  Attributes:
    index: Which of the step's tokens, `[R,Q]`; T or more is none.
    positions: Their positions, `[R,Q]`; -1 is none.
    owner: The sequence of each row, a row of the step's tables, `[R]`.
    number: How many rows there are; the others behind them have no query.
  """

  index: Int[Array, "R Q"]
  positions: Int[Array, "R Q"]
  owner: Int[Array, " R"]
  number: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepPlace:
  """Where the tokens of a step lie, and what they read.

  Attributes:
    slots: Where each token's key goes, `page * Z + place` `[T]`; beyond the
      pages is nowhere.
    tables: Pages of each sequence, `[W,1,M]` for all key heads alike or
      `[W,K,M]`.
    lengths: How many keys it has with those of the step, `[W,1]` or `[W,K]`.
    single: Sequences that run one token.
    several: Sequences that run more; none if `None`.
  """

  slots: Int[Array, " T"]
  tables: Int[Array, "W k M"]
  lengths: Int[Array, "W k"]
  single: Rows
  several: Rows | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedState:
  """What layers of one attention window do with pages.

  Attributes:
    num_kv_heads: K.
    head_dim: H.
    page_size: Z.
    dtype: Of queries, keys and values.
    kv_dtype: Of the pages; narrower ones (`NARROW`) have a scale for each key
      and value.
    beside: Whether positions and log-weights are kept beside the keys, as a
      compactor needs them.
    window: A query sees its own position and `window - 1` before.
    scale: Factor on the scores; `None` is `H ** -0.5`.
    softcap: Bound on the scores.
    selector: Chooses the pages that queries read.
    implementation: Of paged attention.
  """

  num_kv_heads: int
  head_dim: int
  page_size: int
  dtype: str
  kv_dtype: str
  beside: bool = False
  window: int | None = None
  scale: float | None = None
  softcap: float | None = None
  selector: Selector = dataclasses.field(default_factory=KeepAll)
  implementation: str = "xla"

  def init(self, layers: int, num_pages: int) -> KVPages:
    """Pages of nothing."""
    beside = (layers, self.num_kv_heads, num_pages, self.page_size)
    shape = (*beside, self.head_dim)

    # Not one array twice: each is donated.
    def scales() -> Array | None:
      if self.kv_dtype not in NARROW:
        return None
      return jnp.zeros(beside, jnp.float32)

    return KVPages(
      k=jnp.zeros(shape, self.kv_dtype),
      v=jnp.zeros(shape, self.kv_dtype),
      k_scale=scales(),
      v_scale=scales(),
      positions=jnp.zeros(beside, jnp.int32) if self.beside else None,
      log_weights=jnp.zeros(beside, jnp.float32) if self.beside else None,
    )

  def write(
    self,
    pages: KVPages,
    layer: Any,
    place: StepPlace,
    positions: Int[Array, " T"],
    k: Float[Array, "K T H"],
    v: Float[Array, "K T H"],
  ) -> KVPages:
    """Puts the keys and values of a step's tokens where they belong."""
    new = {}
    for name, values in (("k", k), ("v", v)):
      if self.kv_dtype in NARROW:
        values, new[f"{name}_scale"] = narrowed(values, self.kv_dtype)
      new[name] = values
    if self.beside:
      row = positions.astype(jnp.int32)
      new["positions"] = jnp.broadcast_to(row, k.shape[:2])
      new["log_weights"] = jnp.zeros(k.shape[:2], jnp.float32)
    changed = {
      name: put(getattr(pages, name), layer, place.slots, values)
      for name, values in new.items()
    }
    return dataclasses.replace(pages, **changed)

  def attend(
    self,
    pages: KVPages,
    layer: Any,
    place: StepPlace,
    q: Float[Array, "K G T H"],
  ) -> Float[Array, "K G T H"]:
    """Attention of a step's tokens, each over its own sequence."""
    o = jnp.zeros_like(vary_like(q, pages.k))
    for rows in (place.single, place.several):
      if rows is None:
        continue

      def read(o: Array, rows: Rows = rows) -> Array:
        return self._read(pages, layer, place, rows, q, o)

      o = lax.cond(rows.number > 0, read, lambda o: o, o)
    return o

  def _read(
    self,
    pages: KVPages,
    layer: Any,
    place: StepPlace,
    rows: Rows,
    q: Float[Array, "K G T H"],
    o: Float[Array, "K G T H"],
  ) -> Float[Array, "K G T H"]:
    """Puts the outputs of some rows into `o`."""
    asked = q.at[:, :, rows.index].get(mode="fill", fill_value=0)
    asked = jnp.moveaxis(asked, 2, 0)
    K = q.shape[0]

    def each_head(a: Array) -> Array:
      a = a[rows.owner]
      return jnp.broadcast_to(a, (a.shape[0], K, *a.shape[2:]))

    view = PageView(each_head(place.tables), each_head(place.lengths))
    view = self.selector.select(asked, pages, layer, view, rows.positions)
    given, _ = paged_attention_grouped(
      asked,
      pages,
      view,
      q_positions=rows.positions,
      layer=layer,
      window=self.window,
      scale=self.scale,
      softcap=self.softcap,
      implementation=self.implementation,
    )
    return o.at[:, :, rows.index].set(jnp.moveaxis(given, 0, 2), mode="drop")


def paged_states(
  cfg: ModelConfig,
  *,
  page_size: int,
  kv_dtype: str | None = None,
  beside: bool = False,
  selector: Selector | None = None,
  implementation: str = "xla",
) -> tuple[PagedState, ...]:
  """What the layers of each position of a model's window pattern do.

  Args:
    cfg: Of the model.
    page_size: Z.
    kv_dtype: Of the pages; `None` is the model's.
    beside: As in `PagedState`.
    selector: Likewise; `None` shows everything.
    implementation: Of paged attention.

  Raises:
    ValueError: The dtype is none that pages can have.
  """
  dtype = jnp.dtype(cfg.dtype).name
  known = (dtype, *NARROW)
  if kv_dtype is not None and kv_dtype not in known:
    raise ValueError(f"kv_dtype={kv_dtype!r} must be one of {list(known)}")
  return tuple(
    PagedState(
      num_kv_heads=cfg.kv_heads,
      head_dim=cfg.head_width,
      page_size=page_size,
      dtype=dtype,
      kv_dtype=kv_dtype or dtype,
      beside=beside,
      window=window,
      scale=cfg.score_scale,
      softcap=cfg.attention_softcap,
      selector=selector or KeepAll(),
      implementation=implementation,
    )
    for window in cfg.window_pattern
  )


def page_bytes(cfg: ModelConfig, states: tuple[PagedState, ...]) -> int:
  """Memory of one page in all layers."""
  pages = jax.eval_shape(lambda: init_pages(cfg, states, 1))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages))


def init_pages(
  cfg: ModelConfig, states: tuple[PagedState, ...], num_pages: int
) -> PagedKV:
  """Pages of nothing, for every layer."""
  return tuple(
    state.init(cfg.layers_of(position), num_pages)
    for position, state in enumerate(states)
  )


def narrowed(
  values: Float[Array, "K T H"], dtype: str
) -> tuple[Array, Float[Array, "K T"]]:
  """Values in a dtype of 8 bits, and the factor of each row."""
  if jnp.issubdtype(dtype, jnp.integer):
    most = float(jnp.iinfo(dtype).max)
  else:
    most = float(jnp.finfo(dtype).max)
  wide = values.astype(jnp.float32)
  scale = jnp.max(jnp.abs(wide), axis=-1) / most
  scaled = wide / jnp.where(scale > 0, scale, 1)[..., None]
  if jnp.issubdtype(dtype, jnp.integer):
    scaled = jnp.round(scaled)
  return scaled.astype(dtype), scale


def put(
  pages: Array, layer: Any, slots: Int[Array, " T"], values: Array
) -> Array:
  """Writes `values [K,T,...]` to places of a layer of `pages [L,K,P,Z,...]`."""
  _, K, P, Z, *rest = pages.shape
  # One row of numbers for each key: with key heads beside the places, TPUs
  # would turn all pages around for the update and back.
  first = (layer * K + jnp.arange(K, dtype=jnp.int32)) * (P * Z)
  inside = slots < P * Z
  rows = first[:, None] + slots[None]
  rows = jnp.where(inside[None], rows, math.prod(pages.shape[:4]))
  flat = pages.reshape(-1, *rest)
  flat = flat.at[rows.reshape(-1)].set(
    values.astype(pages.dtype).reshape(-1, *rest), mode="drop"
  )
  return flat.reshape(pages.shape)


def _over(pages: PagedKV, change: Callable[[Array], Array]) -> PagedKV:
  return jax.tree.map(change, pages)


def read_pages(pages: PagedKV, numbers: Int[Array, " n"]) -> PagedKV:
  """Copies of some pages, `[L,K,n,Z,...]`."""
  return _over(pages, lambda a: a.at[:, :, numbers].get(mode="clip"))


def write_pages(
  pages: PagedKV, numbers: Int[Array, " n"], copies: PagedKV
) -> PagedKV:
  """Pages with some of them replaced; a number beyond them is none."""
  return jax.tree.map(
    lambda a, new: a.at[:, :, numbers].set(new, mode="drop"), pages, copies
  )
