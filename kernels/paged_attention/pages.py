"""A cache of keys and values in pages, and which of them each row reads."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
  """Pages of Z keys and values, for every layer and key head.

  A page has the same number in all layers and key heads, and may hold other
  tokens in each of them: after a selection or a compaction it does.

  Attributes:
    k: Keys `[L,K,P,Z,H]`; int8 or an 8-bit float with `k_scale`.
    v: Values, in k's shape and dtype.
    k_scale: What the keys are to be multiplied by, one number a key,
      `[L,K,P,Z]` fp32, or `None` for 1.
    v_scale: Likewise for the values.
    positions: Position of each key in its sequence, `[L,K,P,Z]` int32. `None`:
      the keys of a row stand in its view in order, the first at position 0.
    log_weights: Added to the scores after scale and soft-cap, `[L,K,P,Z]`
      fp32: `log(n)` for a key that stands for n keys. -inf is a hole: unseen,
      whatever k and v hold there. `None` is 0.
  """

  k: Array
  v: Array
  k_scale: Float[Array, "L K P Z"] | None = None
  v_scale: Float[Array, "L K P Z"] | None = None
  positions: Int[Array, "L K P Z"] | None = None
  log_weights: Float[Array, "L K P Z"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageView:
  """The pages that each row reads; a row is a sequence and a key head.

  Attributes:
    table: Numbers of pages `[B,K,M]` int32, in order. Behind the pages that a
      row has it may hold anything.
    lengths: How many keys a row has, `[B,K]` int32: all but its last page are
      full (a hole inside one is a log-weight of -inf). 0 is a row without keys.
  """

  table: Int[Array, "B K M"]
  lengths: Int[Array, "B K"]
