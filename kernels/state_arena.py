"""Keys and values of several lanes in one arena.

A pipeline stage has chunks of several lanes under way. Their keys and values
lie in one array, each lane's in a row of chunks wherever there was room, and so
do their gradients, which live shorter, somewhere else. Segment ids tell the
lanes apart; blocks of keys of other lanes cost nothing.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxchunk.kernels.attention import tables
from jaxchunk.kernels.attention.block_sizes import BlockSizes, look_up
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.state import Arrays, ChunkPlace, KVPrefix


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVArena(KVPrefix):
  """Keys and values of the lanes of a pipeline stage.

  A chunk's `ChunkPlace` says where it lies in the arena (`start`) and in that
  of the gradients (`cotangent_start`), both multiples of the chunk size;
  `lane_segment_ids` are of the whole arena, and differ between lanes. Rows of
  the gradients are zero until a lane comes and again when it has gone.

  Attributes:
    window: Number of keys that a token sees, itself included; `None` is all.
  """

  window: int | None = None

  def mask(self, place: ChunkPlace) -> AttentionMask:
    """What a chunk's queries see."""
    mask = super().mask(place)
    if self.window is None:
      return mask
    return mask & AttentionMask.window(self.window)

  @property
  def options(self) -> dict[str, Any]:
    """What both passes take; no block of keys reaches into another chunk."""
    options = super().options
    if self.implementation == "xla":
      options["blocks"] = aligned_blocks(self)
    return options

  def first_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace
  ) -> Any:
    """The key at row 0 of the cotangent; may be negative."""
    del state, cotangent
    return place.start - own_rows(place)

  def attend_bwd(
    self,
    state: Arrays,
    cotangent: Arrays,
    layer: Any,
    place: ChunkPlace,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    residual: Arrays,
    do: Array,
  ) -> tuple[tuple[Array, Array, Array], Arrays]:
    """See `SequenceState`; the chunk's own rows are zero afterwards."""
    gradients, cotangent = super().attend_bwd(
      state, cotangent, layer, place, q, k, v, o, residual, do
    )
    return gradients, cleared(cotangent, layer, place, self.chunk_size)


def aligned_blocks(state: KVPrefix) -> BlockSizes:
  """Blocks of "xla" that divide the chunk."""
  blocks = state.blocks or look_up(tables.XLA, state.head_dim, BlockSizes())
  size = state.chunk_size
  return dataclasses.replace(
    blocks, kv=math.gcd(blocks.kv, size), kv_bwd=math.gcd(blocks.kv_bwd, size)
  )


def own_rows(place: ChunkPlace) -> Array:
  """Where the chunk's own part of the cotangent begins."""
  if place.cotangent_start is None:
    return place.start
  return place.cotangent_start


def cleared(
  cotangent: Arrays, layer: Any, place: ChunkPlace, size: int
) -> Arrays:
  """With the chunk's own rows of a layer zero."""
  start = own_rows(place)
  at = [jnp.asarray(n, jnp.int32) for n in (layer, 0, 0, start, 0)]

  def clear(g: Array) -> Array:
    zeros = jnp.zeros((1, *g.shape[1:3], size, g.shape[4]), g.dtype)
    return lax.dynamic_update_slice(g, zeros, at)

  return tuple(clear(g) for g in cotangent)
