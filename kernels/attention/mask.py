"""Which keys each query sees: one description that every backend honours."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# A scalar or an array, known now or inside a program.
_Index = int | np.integer | Array


class _Constructor:
  """A static method that refuses to be called on an instance.

  `mask.window(8)` would forget what `mask` already holds.
  """

  def __init__(self, function: Callable[..., "AttentionMask"]):
    # Undecorated, so that it can be traced like any function.
    self.function = getattr(function, "__func__", function)
    self.__doc__ = function.__doc__

  def __get__(self, instance: Any, owner: Any) -> Any:
    if instance is not None:
      name = self.function.__name__
      raise TypeError(
        f"AttentionMask.{name} starts a new mask; combine masks with &: "
        f"mask & AttentionMask.{name}(...)"
      )
    return self.function


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
  """A conjunction of conditions on the pair (query t, key s).

  With `p = q_offset + t` the position of query t in the order of the keys:

  - `is_causal`: s <= p
  - `window_size`: |p - s| < window_size
  - segments: `q_segment_ids[b,t] == kv_segment_ids[b,s] > 0`
  - `kv_length`: s < kv_length

  Build masks from the constructors and combine them with `&`:

      AttentionMask.causal(offset) & AttentionMask.segments(q_ids, kv_ids)

  Attributes:
    is_causal: A query sees itself and what came before.
    window_size: Number of keys up to and including the query's own (with
      `is_causal`), or `None`.
    q_offset: Position of query 0 in the order of the keys; may be traced.
    q_segment_ids: `[B,T]` int; 0 (or less) is padding, which sees nothing.
    kv_segment_ids: `[B,S]` int.
    kv_length: How many keys are valid; may be traced. `None` is all of them.
  """

  is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
  window_size: int | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  q_offset: _Index | None = None
  q_segment_ids: Int[Array, "B T"] | None = None
  kv_segment_ids: Int[Array, "B S"] | None = None
  kv_length: _Index | None = None

  @_Constructor
  @staticmethod
  def causal(q_offset: _Index | None = None) -> "AttentionMask":
    """Query t sees keys up to position `q_offset + t` (offset 0 if `None`).

    Args:
      q_offset: The position of the first query in the order of the keys: the
        length of the prefix when the queries are a chunk of a longer
        sequence. An integer or an integer scalar array.

    Returns:
      The mask.
    """
    return AttentionMask(is_causal=True, q_offset=q_offset)

  @_Constructor
  @staticmethod
  def window(size: int) -> "AttentionMask":
    """Keys nearer than `size`: |q - k| < size. With `causal`, the last `size`.

    Args:
      size: A positive Python integer.

    Returns:
      The mask.

    Raises:
      ValueError: `size` is not positive.
    """
    if size < 1:
      raise ValueError(f"window size must be at least 1, got {size}")
    return AttentionMask(window_size=int(size))

  @_Constructor
  @staticmethod
  def segments(
    q: Int[Array, "B T"], kv: Int[Array, "B S"] | None = None
  ) -> "AttentionMask":
    """Queries see only keys of their own segment; segment 0 is padding.

    Args:
      q: Segment ids of the queries, `[B,T]`.
      kv: Segment ids of the keys, `[B,S]`; by default those of the queries.

    Returns:
      The mask.

    Raises:
      ValueError: The ids are not two-dimensional.
    """
    # Signed, for the comparisons with 0 and -1.
    q = jnp.asarray(q).astype(jnp.int32)
    kv = q if kv is None else jnp.asarray(kv).astype(jnp.int32)
    for name, ids in (("q", q), ("kv", kv)):
      if jnp.ndim(ids) != 2:
        raise ValueError(
          f"{name} segment ids must be [batch, length], got shape "
          f"{jnp.shape(ids)}"
        )
    return AttentionMask(q_segment_ids=q, kv_segment_ids=kv)

  @_Constructor
  @staticmethod
  def valid_keys(length: _Index) -> "AttentionMask":
    """Only the first `length` keys are there; an integer or scalar array."""
    return AttentionMask(kv_length=length)

  def __and__(self, other: "AttentionMask") -> "AttentionMask":
    """Both conditions hold.

    Raises:
      ValueError: Both masks set the same array.
    """
    values: dict[str, Any] = {}
    for name in ("q_offset", "q_segment_ids", "kv_segment_ids", "kv_length"):
      mine, its = getattr(self, name), getattr(other, name)
      if mine is not None and its is not None and mine is not its:
        raise ValueError(f"both masks set {name}; set it in one of them")
      values[name] = its if mine is None else mine
    windows = [m.window_size for m in (self, other) if m.window_size]
    return AttentionMask(
      is_causal=self.is_causal or other.is_causal,
      window_size=min(windows, default=None),
      **values,
    )

  @property
  def offset(self) -> _Index:
    """`q_offset`, or 0."""
    return 0 if self.q_offset is None else self.q_offset

  def dense(self, batch: int, t: int, s: int) -> Bool[Array, "B T S"]:
    """The mask as booleans, for the reference and for tests."""
    p = self.offset + jnp.arange(t)[:, None]
    k = jnp.arange(s)[None]
    seen = jnp.ones((t, s), bool)
    if self.is_causal:
      seen &= k <= p
    if self.window_size is not None:
      seen &= jnp.abs(p - k) < self.window_size
    if self.kv_length is not None:
      seen &= k < self.kv_length
    seen = jnp.broadcast_to(seen, (batch, t, s))
    if self.q_segment_ids is not None and self.kv_segment_ids is not None:
      q, kv = self.q_segment_ids[:, :, None], self.kv_segment_ids[:, None]
      seen &= (q == kv) & (q > 0)
    return seen
