"""The sequence state of linear attention: a matrix, however long the prefix.

A chunk overwrites it, so the state before every chunk is kept: the snapshots
are what grows with the sequence, by one matrix a chunk.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxchunk.kernels.linear_attention import xla
from jaxchunk.kernels.linear_attention.weights import (
  number_runs,
  without_starts,
)
from jaxchunk.kernels.state import Arrays, ChunkPlace
from jaxchunk.kernels.vma import vary_like


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearState:
  """Decayed sums of `k^T v`: causal linear attention.

  Arrays: `memory [L,B,K,H,H]`; `snapshots [J,L,B,K,H,H]`, the memory before
  each of the J chunks of a lane; and `k`, `v [B,K,C,H]`, the chunk that was
  written last. Memory per chunk and layer: `K * H * H` elements of at least
  fp32; the cotangent is one memory. A new segment starts with an empty memory.

  Attributes:
    num_kv_heads: K.
    head_dim: H.
    chunk_size: C.
    scale: Factor on the output.
    log_decay: Of the K heads, at most 0; `None` is no decay.
    dtype: Of keys and values.
    block_size: Tokens that are computed together within a chunk.
  """

  num_kv_heads: int
  head_dim: int
  chunk_size: int
  scale: float
  log_decay: tuple[float, ...] | None = None
  dtype: str = "float32"
  block_size: int = 128

  def __post_init__(self) -> None:
    decay = self.log_decay
    if decay is None:
      return
    if len(decay) != self.num_kv_heads or max(decay) > 0:
      raise ValueError(
        f"log_decay={decay} must be num_kv_heads={self.num_kv_heads} numbers "
        "of at most 0; it is a logarithm: for a decay of 0.9 give log(0.9)"
      )

  def init(self, layers: int, batch: int, capacity: int) -> Arrays:
    """See `SequenceState`."""
    wide = jnp.promote_types(self.dtype, jnp.float32)
    heads, width = self.num_kv_heads, self.head_dim
    memory = (layers, batch, heads, width, width)
    chunk = (batch, heads, self.chunk_size, width)
    return {
      "memory": jnp.zeros(memory, wide),
      "snapshots": jnp.zeros((-(-capacity // self.chunk_size), *memory), wide),
      "k": jnp.zeros(chunk, self.dtype),
      "v": jnp.zeros(chunk, self.dtype),
    }

  def decays(self, place: ChunkPlace, dtype: Any) -> xla.Decays:
    """Of a chunk's tokens, by the segment of the token before it."""
    lane = place.lane_segment_ids
    before = lax.dynamic_index_in_dim(
      lane, jnp.maximum(place.start - 1, 0), 1, keepdims=False
    )
    runs = number_runs(place.segment_ids, jnp.where(place.start > 0, before, 0))
    if self.log_decay is None:
      return xla.Decays(runs, None)
    decay = jnp.asarray(self.log_decay, dtype)[None, :, None]
    shape = (runs.shape[0], self.num_kv_heads, runs.shape[1])
    decay = vary_like(jnp.broadcast_to(decay, shape), runs)
    return xla.Decays(runs, without_starts(decay, runs))

  def write(
    self, state: Arrays, layer: Any, place: ChunkPlace, k: Array, v: Array
  ) -> Arrays:
    """See `SequenceState`; `k` and `v` have room for one layer only."""
    memory = lax.dynamic_index_in_dim(state["memory"], layer, keepdims=False)
    _, memory = xla.memories_of(
      k,
      v,
      self.decays(place, memory.dtype),
      memory,
      chunk_size=self.block_size,
    )
    memories = lax.dynamic_update_index_in_dim(
      state["memory"], memory, layer, 0
    )
    keys, values = k.astype(self.dtype), v.astype(self.dtype)
    return state | {"memory": memories, "k": keys, "v": values}

  def attend(
    self, state: Arrays, layer: Any, place: ChunkPlace, q: Array
  ) -> tuple[Array, Arrays]:
    """See `SequenceState`; the residual is the memory before every block."""
    k, v, snapshots = state["k"], state["v"], state["snapshots"]
    before = lax.dynamic_index_in_dim(snapshots, place.index, keepdims=False)
    before = lax.dynamic_index_in_dim(before, layer, keepdims=False)
    decays = self.decays(place, before.dtype)
    memories, _ = xla.memories_of(
      k, v, decays, before, chunk_size=self.block_size
    )
    o = xla.outputs(
      q,
      k,
      v,
      decays,
      memories,
      scale=self.scale,
      chunk_size=self.block_size,
      dtype=q.dtype,
    )
    return o, memories

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
    """See `SequenceState`."""
    decays = self.decays(place, cotangent.dtype)
    options: dict[str, Any] = {
      "scale": self.scale,
      "chunk_size": self.block_size,
    }
    behind = lax.dynamic_index_in_dim(cotangent, layer, keepdims=False)
    cotangents, before = xla.cotangents_of(q, do, decays, behind, **options)
    grads = xla.gradients(
      q, k, v, decays, residual, do, cotangents, dtype=q.dtype, **options
    )
    cotangent = lax.dynamic_update_index_in_dim(cotangent, before, layer, 0)
    return (grads.dq, grads.dk, grads.dv), cotangent

  def reset(self, state: Arrays) -> Arrays:
    """See `SequenceState`; snapshots are not read before they are taken."""
    return state | {"memory": jnp.zeros_like(state["memory"])}

  def save(self, state: Arrays, index: Any) -> Arrays:
    """See `SequenceState`."""
    snapshots = lax.dynamic_update_index_in_dim(
      state["snapshots"], state["memory"], index, 0
    )
    return state | {"snapshots": snapshots}

  def restore(self, state: Arrays, index: Any) -> Arrays:
    """See `SequenceState`."""
    snapshots = state["snapshots"]
    memory = lax.dynamic_index_in_dim(snapshots, index, keepdims=False)
    return state | {"memory": memory}

  def zero_cotangent(self, state: Arrays) -> Arrays:
    """See `SequenceState`; of the memory behind the last chunk."""
    return jnp.zeros_like(state["memory"])

  def weigh_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace, factor: float
  ) -> Arrays:
    """See `SequenceState`; a chunk's own part cannot be told from the rest."""
    del state, place
    return cotangent * jnp.asarray(factor, cotangent.dtype)

  def skip_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace
  ) -> Arrays:
    """See `SequenceState`."""
    del state, place
    return jnp.zeros_like(cotangent)
