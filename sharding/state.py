"""The sequence state of chunks that lie on several devices.

Each device of an axis holds every P-th token of a lane, and the keys and values
of those: its own state is a prefix of a lane of 1/P of the length, and a chunk
of C tokens is C/P on each. Keys and values never move. The queries of a chunk
visit all devices, and what they found is brought home and merged, so what is
sent follows the chunk and not the prefix; "striped" order makes the work equal
in every chunk, whatever lies before it.

On its way back a chunk's queries visit once more, with what their gradient
needs, and add into the gradients of the keys that each device holds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.backends import passes
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.state import Arrays, ChunkPlace, KVPrefix
from jaxchunk.kernels.state_arena import own_rows
from jaxchunk.kernels.vma import vary_like


class _Visitors(NamedTuple):
  """Queries of all devices, `[P,...]`, with what a pass needs of them."""

  rank: Int[Array, " P"]
  ids: Int[Array, "P B C"]
  q: Float[Array, "P B K G C H"]
  more: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVContext(KVPrefix):
  """Keys and values of every P-th token: attention over all of an axis.

  To be used inside `jax.shard_map`, on lanes in `schemes.device_order` of a
  "striped" scheme. Memory per token, as of `KVPrefix`, is divided by P.

  Attributes:
    axis: Of the mesh.
    window: Number of keys that a token sees, itself included; `None` is all.
  """

  axis: str = "context"
  window: int | None = None

  def attend(
    self, state: Arrays, layer: Any, place: ChunkPlace, q: Array
  ) -> tuple[Array, Arrays]:
    """See `SequenceState`; the residual is the log-sum-exp."""
    k, v = state
    forward = passes(self.implementation).forward

    def visit(visitor: _Visitors) -> tuple[Array, Array]:
      def run(mask: AttentionMask) -> tuple[Array, Array]:
        o, lse = forward(visitor.q, k, v, mask, layer=layer, **self.options)
        return vary_like((o, lse), q, state)

      return self._masked(place, visitor, run)

    o, lse = lax.map(visit, self._gathered(place, q))
    return self._merged(o, lse)

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
    k_cache, v_cache = state
    backward = passes(self.implementation).backward

    def visit(cotangent: Arrays, visitor: _Visitors) -> tuple[Arrays, Array]:
      def run(mask: AttentionMask) -> tuple[Arrays, Array]:
        dq, *sums = backward(
          visitor.q,
          k_cache,
          v_cache,
          mask,
          *visitor.more,
          *cotangent,
          dkv_start=place.start - own_rows(place),
          layer=layer,
          **self.backward_options(place),
        )
        return vary_like((tuple(sums), dq), q, state)

      return self._masked(place, visitor, run)

    visitors = self._gathered(place, q, o, residual, do)
    cotangent, dq = lax.scan(visit, cotangent, visitors)
    wide = dq.astype(jnp.promote_types(dq.dtype, jnp.float32))
    dq = lax.psum_scatter(wide, self.axis).astype(q.dtype)
    start = own_rows(place)
    at = [jnp.asarray(n, jnp.int32) for n in (layer, 0, 0, start, 0)]
    dk, dv = (lax.dynamic_slice(g, at, (1, *k.shape))[0] for g in cotangent)
    return (dq, dk.astype(k.dtype), dv.astype(v.dtype)), cotangent

  def _gathered(self, place: ChunkPlace, q: Array, *more: Array) -> _Visitors:
    ids, q, *others = (
      lax.all_gather(a, self.axis) for a in (place.segment_ids, q, *more)
    )
    ranks = jnp.arange(lax.axis_size(self.axis), dtype=jnp.int32)
    return _Visitors(ranks, ids, q, tuple(others))

  def _masked(
    self,
    place: ChunkPlace,
    visitor: _Visitors,
    run: Callable[[AttentionMask], Any],
  ) -> Any:
    """Runs with what a device's queries see of the keys of this one.

    Token t of device r has position t P + r, so a query t of r sees the key s
    of r' if s <= t + (r - r') // P, and with a window W if also
    t - s <= (W - 1 - (r - r')) // P.
    """
    devices = lax.axis_size(self.axis)
    ahead = visitor.rank - lax.axis_index(self.axis)
    mask = AttentionMask.causal(place.start + ahead // devices)
    mask &= AttentionMask.segments(visitor.ids, place.lane_segment_ids)
    if self.window is None:
      return run(mask)

    sizes = [
      (self.window - 1 - n) // devices + n // devices + 1
      for n in range(1 - devices, devices)
    ]
    known = sorted(set(sizes))
    branches = [functools.partial(run, self._near(mask, n)) for n in known]
    chosen = jnp.asarray([known.index(n) for n in sizes], jnp.int32)
    return lax.switch(chosen[ahead + devices - 1], branches)

  def _near(self, mask: AttentionMask, size: int) -> AttentionMask:
    """With a window of so many keys; of none it sees nothing."""
    if size > 0:
      return mask & AttentionMask.window(size)
    return dataclasses.replace(mask, kv_length=jnp.zeros((), jnp.int32))

  def _merged(self, o: Array, lse: Array) -> tuple[Array, Array]:
    """A device's own queries over all keys, from each device's part."""
    o = lax.all_to_all(o, self.axis, 0, 0)
    lse = lax.all_to_all(lse, self.axis, 0, 0)
    top = jnp.max(lse, 0, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.exp(lse - top)
    total = jnp.sum(weights, 0)
    some = total > 0
    safe = jnp.where(some, total, 1)
    mean = jnp.sum(weights[..., None] * o.astype(lse.dtype), 0)
    whole = (mean / safe[..., None]).astype(o.dtype)
    return whole, jnp.where(some, top[0] + jnp.log(safe), -jnp.inf)
