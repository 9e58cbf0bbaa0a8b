"""How much of a token reaches another: segments and decay.

Tokens are numbered by runs: a run is a stretch of one segment. The memory that
comes from before the tokens belongs to run 0.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def number_runs(
  segment_ids: Int[Array, "B T"], before: Int[Array, " B"]
) -> Int[Array, "B T"]:
  """The number of each token's run.

  Args:
    segment_ids: Of the tokens; 0 is padding. Every change begins a run.
    before: Segment of the token before them, 0 where there is none.

  Returns:
    0 for tokens that go on with the segment before, then 1, 2, ... in order;
    -1 for padding.
  """
  # Ids that are constants would be summed, slowly, while XLA compiles.
  ids = jnp.concatenate([before[:, None], segment_ids], axis=1)
  ids = lax.optimization_barrier(ids)
  runs = jnp.cumsum(ids[:, 1:] != ids[:, :-1], axis=1, dtype=jnp.int32)
  return jnp.where(segment_ids > 0, runs, -1)


def without_starts(
  log_decay: Float[Array, "B K T"], runs: Int[Array, "B T"]
) -> Float[Array, "B K T"]:
  """Zero where a run begins: what would decay there is nothing."""
  before = jnp.pad(runs[:, :-1], ((0, 0), (1, 0)))
  return jnp.where((runs == before)[:, None], log_decay, 0)


class Weights(NamedTuple):
  """What a chunk's tokens give each other, take from before, and hand on.

  Attributes:
    same: Whether token t sees token s: both of one run, s not after t.
    inside: The part of token s that reaches token t; 0 where it is not seen.
    before: The part of the memory that reaches token t.
  """

  same: Bool[Array, "B 1 T S"]
  inside: Float[Array, "#B #K T S"]
  before: Float[Array, "#B #K T"]

  @property
  def tail(self) -> Float[Array, "#B #K S"]:
    """The part of token s that is left behind the last one."""
    return self.inside[:, :, -1]

  @property
  def carry(self) -> Float[Array, "#B #K"]:
    """The part of the memory that is left behind the last token."""
    return self.before[:, :, -1]

  @classmethod
  def of(
    cls,
    log_decay: Float[Array, "B K T"] | None,
    runs: Int[Array, "B T"],
    before: Int[Array, " B"],
    dtype: Any,
  ) -> "Weights":
    """Of a chunk whose memory belongs to run `before`."""
    size = runs.shape[1]
    real = runs >= 0
    same = (runs[:, :, None] == runs[:, None]) & real[:, None]
    same = (same & jnp.tril(jnp.ones((1, size, size), bool)))[:, None]
    seen = ((runs == before[:, None]) & real)[:, None]
    if log_decay is None:
      return cls(same, same.astype(dtype), seen.astype(dtype))
    # A difference of sums would lose what is small beside them. Multiples of
    # 2^-8 are summed without rounding (up to 2^16 in fp32), the rest is small.
    coarse = jnp.round(log_decay * 256) / 256
    parts = [_sums(same, part) for part in (coarse, log_decay - coarse)]
    spans = [part[..., None] - part[:, :, None] for part in parts]
    # Masked before exp: a span that is not seen may be positive and large.
    inside = jnp.exp(jnp.where(same, spans[0] + spans[1], -jnp.inf))
    reach = jnp.exp(jnp.where(seen, parts[0] + parts[1], -jnp.inf))
    return cls(same, inside, reach)

  def log_decay_cotangent(
    self, pairs: Float[Array, "B K T S"], taken: Float[Array, "B K T"]
  ) -> Float[Array, "B K T"]:
    """What is owed to the decays.

    The decay at token r stands between all pairs s < r <= t; added up as such,
    not as a difference of sums over rows and columns, which would cancel.

    Args:
      pairs: Cotangents of the logarithm of `inside`.
      taken: Likewise of `before`.
    """
    size = pairs.shape[-1]
    earlier = jnp.triu(jnp.ones((size, size), pairs.dtype), 1)
    owed = jnp.einsum("BKTS,SR->BKTR", pairs, earlier) + taken[..., None]
    return jnp.where(self.same, owed, 0).sum(2)


def scaled(weight: Array, x: Array) -> Array:
  """`weight * x`; 0 for no weight, whatever overflowed in x."""
  return jnp.where(weight > 0, weight * x, 0)


def _sums(
  same: Bool[Array, "B 1 T S"], a: Float[Array, "B K S"]
) -> Float[Array, "B K T"]:
  """Up to each token, over its own run only: bits do not know of others."""
  return jnp.where(same, a[:, :, None], 0).sum(-1)


def tail_and_carry(
  log_decay: Float[Array, "B K T"] | None,
  runs: Int[Array, "B T"],
  before: Int[Array, " B"],
  dtype: Any,
) -> tuple[Float[Array, "#B #K T"], Float[Array, "#B #K"]]:
  """`Weights.tail` and `Weights.carry`, without the rest."""
  last = runs[:, -1:]
  own = ((runs == last) & (last >= 0))[:, None]
  # Numbers of runs do not return: then all tokens are of this one.
  kept = ((before == last[:, 0]) & (last[:, 0] >= 0))[:, None]
  if log_decay is None:
    return own.astype(dtype), kept.astype(dtype)
  size = runs.shape[1]
  behind = jnp.triu(jnp.ones((1, 1, size, size), bool), 1)
  left = jnp.where(own[:, :, None] & behind, log_decay[:, :, None], 0).sum(-1)
  whole = jnp.where(own, log_decay, 0).sum(-1)
  return (
    jnp.exp(jnp.where(own, left, -jnp.inf)),
    jnp.exp(jnp.where(kept, whole, -jnp.inf)),
  )
