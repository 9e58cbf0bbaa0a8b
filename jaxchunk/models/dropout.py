"""Dropout that does not depend on how sequences are cut or packed.

A mask is drawn from a key made of (rng, document, position, layer, site), so
a token drops the same channels in every chunk size, packing and layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class DropoutKeys(NamedTuple):
  """One key per token."""

  keys: PRNGKeyArray

  @classmethod
  def of(
    cls,
    rng: PRNGKeyArray,
    document_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
  ) -> "DropoutKeys":
    """Keys `[B,T]` from the names of the documents and the positions."""

    def key(document: Array, position: Array) -> PRNGKeyArray:
      return jax.random.fold_in(jax.random.fold_in(rng, document), position)

    return cls(jax.vmap(jax.vmap(key))(document_ids, positions))

  def layer(self, index: int | Array) -> "DropoutKeys":
    """Keys for one layer."""
    fold = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, index)))
    return DropoutKeys(fold(self.keys))


def dropout(
  x: Float[Array, "B T D"],
  rate: float,
  keys: DropoutKeys | None,
  *,
  site: int,
) -> Float[Array, "B T D"]:
  """Zeroes channels with probability `rate` and scales up the others.

  Args:
    x: Activations.
    rate: In [0, 1).
    keys: One per token; `None` is no dropout.
    site: Tells apart several dropouts of one layer.

  Returns:
    As x.
  """
  if keys is None or rate == 0:
    return x

  def draw(key: PRNGKeyArray) -> Array:
    key = jax.random.fold_in(key, site)
    return jax.random.bernoulli(key, 1 - rate, x.shape[-1:])

  kept = jax.vmap(jax.vmap(draw))(keys.keys)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
