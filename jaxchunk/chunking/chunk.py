"""Lanes and their chunks on the device: what the stage operations take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxchunk.kernels.state import ChunkPlace
from jaxchunk.models.dropout import DropoutKeys
from jaxchunk.models.transformer import RopeTables, Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lane:
  """Tokens that share one sequence state: chunks of a sequence, or a pack.

  Arrays are `[B,S]` with the meaning of `jaxchunk.types.Batch`; S is a
  multiple of the chunk size. `weights` are the cotangents of the tokens'
  negative log-likelihoods.
  """

  tokens: Int[Array, "B S"]
  targets: Int[Array, "B S"]
  weights: Float[Array, "B S"]
  segment_ids: Int[Array, "B S"]
  positions: Int[Array, "B S"]
  document_ids: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """One chunk of a lane, and what its layers share."""

  tokens: Int[Array, "B C"]
  targets: Int[Array, "B C"]
  weights: Float[Array, "B C"]
  place: ChunkPlace
  ropes: RopeTables
  dropout: DropoutKeys | None

  @property
  def valid(self) -> Bool[Array, "B C"]:
    """Which tokens are no padding."""
    return self.place.segment_ids > 0


def chunk_of(
  model: Transformer,
  lane: Lane,
  index: Any,
  size: int,
  rng: PRNGKeyArray | None = None,
) -> Chunk:
  """Chunk `index` (may be traced) of a lane, in chunks of `size` tokens."""
  index = jnp.asarray(index, jnp.int32)
  start = index * size

  def cut(a: Array) -> Array:
    return lax.dynamic_slice_in_dim(a, start, size, 1)

  positions = cut(lane.positions)
  keys = None
  if rng is not None and model.cfg.dropout:
    keys = DropoutKeys.of(rng, cut(lane.document_ids), positions)
  return Chunk(
    tokens=cut(lane.tokens),
    targets=cut(lane.targets),
    weights=cut(lane.weights),
    place=ChunkPlace(index, start, cut(lane.segment_ids), lane.segment_ids),
    ropes=model.rope_tables(positions),
    dropout=keys,
  )
