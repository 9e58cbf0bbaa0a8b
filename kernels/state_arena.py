"""Keys and values of several lanes in one arena.

A pipeline stage has chunks of several lanes under way. Their keys and values
lie in one array, each lane's in a row of chunks wherever there was room, and so
do their gradients, which live shorter, somewhere else. Segment ids tell the
lanes apart; blocks of keys of other lanes cost nothing.
"""

import dataclasses
import math
from typing import Any

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
  `lane_segment_ids` are of the whole arena, and differ between lanes. A lane's
  rows of the gradients are to be zero before its last chunk's backward pass.

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
