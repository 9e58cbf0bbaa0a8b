"""Linear attention over a sequence that lies on several devices (LASP-2).

Inside `jax.shard_map` each device of the axis "context" holds a stretch of
consecutive tokens:

  o = context_linear_attention(q, k, v, log_decay=g, segment_ids=ids)

What a device hands on is a matrix for each key head, whatever the length. All
devices gather all of them at once, and weigh those before them: one all-gather
forward, one of the matrices' cotangents backward. What a device's own tokens
give each other waits for neither, so the copies run beside it.

Exact, forward and backward, for packed documents that cross the borders: a
device that begins with another document gives the matrices before it no weight.

Source: Sun et al., LASP-2 (arXiv 2502.07563).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.linear_attention import xla
from jaxchunk.kernels.linear_attention.weights import (
  number_runs,
  scaled,
  without_starts,
)
from jaxchunk.kernels.vma import match_primal, vary_like


class _Settings(NamedTuple):
  """What is known before the program runs."""

  axis: str
  scale: float
  chunk_size: int


class _Shard(NamedTuple):
  """What a device's tokens take from before and leave behind.

  Run 0 is that of its first token, which may have begun on another device.

  Attributes:
    decays: Of the tokens.
    before: The part of what comes from other devices that reaches each token.
    tail: The part of each token that is left behind the last.
    log_carry: Logarithm of the part of what comes from other devices that is
      left behind the last token.
  """

  decays: xla.Decays
  before: Float[Array, "#B #K T"]
  tail: Float[Array, "#B #K T"]
  log_carry: Float[Array, "B K"]

  @classmethod
  def of(
    cls,
    segment_ids: Int[Array, "B T"],
    log_decay: Float[Array, "B K T"] | None,
    heads: int,
    dtype: Any,
  ) -> "_Shard":
    runs = number_runs(segment_ids, segment_ids[:, 0])
    first = (runs == 0)[:, None]
    last = ((runs == runs[:, -1:]) & (runs >= 0))[:, None]
    if log_decay is None:
      log_carry = jnp.where(first[:, :, -1], jnp.zeros((), dtype), -jnp.inf)
      log_carry = jnp.broadcast_to(log_carry, (runs.shape[0], heads))
      before, tail = first.astype(dtype), last.astype(dtype)
      return cls(xla.Decays(runs, None), before, tail, log_carry)
    decay = without_starts(log_decay, runs)
    reach = jnp.cumsum(jnp.where(first, decay, 0), axis=2)
    left = lax.cumsum(jnp.where(last, decay, 0), axis=2, reverse=True)
    # Without the token's own: it decays what was before it.
    left = jnp.pad(left[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return cls(
      xla.Decays(runs, decay),
      jnp.exp(jnp.where(first, reach, -jnp.inf)),
      jnp.exp(jnp.where(last, left, -jnp.inf)),
      jnp.where(first[:, :, -1], reach[:, :, -1], -jnp.inf),
    )

  def log_decay_cotangent(
    self, taken: Float[Array, "B K T"], given: Float[Array, "B K T"]
  ) -> Float[Array, "B K T"]:
    """What is owed to the decays by `before` and `tail`.

    Args:
      taken: Each token's cotangent of the logarithm of `before`.
      given: Likewise of `tail`.
    """
    runs = self.decays.runs
    first = (runs == 0)[:, None]
    last = (runs == runs[:, -1:])[:, None]
    reach = lax.cumsum(taken, axis=2, reverse=True)
    left = jnp.pad(jnp.cumsum(given, axis=2)[..., :-1], _BEHIND)
    return jnp.where(first, reach, 0) + jnp.where(last, left, 0)


# Padding by one token in front.
_BEHIND = ((0, 0), (0, 0), (1, 0))
# Numbers of 32 bits that a TPU keeps together.
_TILE = (8, 128)


class _End(NamedTuple):
  """What a device tells the others, forward."""

  memory: Float[Array, "B K H H"]
  log_carry: Float[Array, "B K"]
  first_id: Int[Array, " B"]
  last_id: Int[Array, " B"]


class _Saved(NamedTuple):
  """Of the forward pass, for the backward."""

  q: Float[Array, "B K G T H"]
  k: Float[Array, "B K T H"]
  v: Float[Array, "B K T H"]
  log_decay: Float[Array, "B K T"] | None
  segment_ids: Int[Array, "B T"]
  memories: Float[Array, "N B K H H"]
  incoming: Float[Array, "B K H H"]
  between: Float[Array, "P B K"]


def _all_gather(axis: str, tree: Any) -> Any:
  """All arrays of a tree in one all-gather, with an axis [P] in front."""
  leaves, treedef = jax.tree.flatten(tree)
  words = [lax.bitcast_convert_type(a, jnp.uint32) for a in leaves]
  flat = jnp.concatenate([w.ravel() for w in words])
  # In whole tiles: of others a TPU makes an all-reduce over a buffer of zeros.
  flat = jnp.pad(flat, (0, -flat.size % (_TILE[0] * _TILE[1])))
  flat = lax.all_gather(flat.reshape(-1, *_TILE), axis)
  flat = flat.reshape(flat.shape[0], -1)
  parts, at = [], 0
  for leaf, w in zip(leaves, words, strict=True):
    part = flat[:, at : at + w.size].reshape(-1, *w.shape)
    parts.append(lax.bitcast_convert_type(part, leaf.dtype))
    at += w.size
  return jax.tree.unflatten(treedef, parts)


def _between(axis: str, ends: _End) -> Float[Array, "P B K"]:
  """The part of a memory that is left between each device and this one.

  Forward from those before it, backward to those behind it: the product of
  the carries of all devices between the two, if one document runs on over
  every border; 0 for this device itself.
  """
  devices = ends.log_carry.shape[0]
  me, others = lax.axis_index(axis), jnp.arange(devices)
  low, high = jnp.minimum(me, others)[:, None], jnp.maximum(me, others)[:, None]
  inner = (low < others[None]) & (others[None] < high)
  borders = (low < others[None]) & (others[None] <= high)
  joined = (ends.last_id[:-1] == ends.first_id[1:]) & (ends.first_id[1:] > 0)
  joined = jnp.pad(joined, ((1, 0), (0, 0)))
  whole = (joined[None] | ~borders[:, :, None]).all(1)
  whole &= (others != me)[:, None]
  passed = jnp.where(inner[:, :, None, None], ends.log_carry[None], 0).sum(1)
  return jnp.exp(jnp.where(whole[:, :, None], passed, -jnp.inf))


def _weighed(
  weights: Float[Array, "P B K"],
  matrices: Float[Array, "P B K H H"],
  chosen: Any,
) -> Float[Array, "B K H H"]:
  """The sum over the chosen devices."""
  weights = jnp.where(chosen[:, None, None], weights, 0)
  return scaled(weights[..., None, None], matrices).sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_devices(
  settings: _Settings,
  q: Array,
  k: Array,
  v: Array,
  log_decay: Array | None,
  segment_ids: Array,
) -> Array:
  return _forward(settings, q, k, v, log_decay, segment_ids)[0]


def _forward(
  settings: _Settings,
  q: Array,
  k: Array,
  v: Array,
  log_decay: Array | None,
  segment_ids: Array,
) -> tuple[Array, _Saved]:
  axis, scale, chunk_size = settings
  B, K, _, H = k.shape
  wide = jnp.promote_types(q.dtype, jnp.float32)
  shard = _Shard.of(segment_ids, log_decay, K, wide)
  nothing = jnp.zeros((B, K, H, H), wide)
  memories, end = xla.memories_of(
    k, v, shard.decays, nothing, chunk_size=chunk_size
  )
  ids = segment_ids[:, 0], segment_ids[:, -1]
  ends = _all_gather(axis, _End(end, shard.log_carry, *ids))
  between = _between(axis, ends)
  devices = jnp.arange(lax.axis_size(axis))
  incoming = _weighed(between, ends.memory, devices < lax.axis_index(axis))
  o = xla.outputs(
    q,
    k,
    v,
    shard.decays,
    memories,
    scale=scale,
    chunk_size=chunk_size,
    dtype=wide,
  )
  past = jnp.einsum("BKGTH,BKHE->BKGTE", q.astype(wide), incoming)
  o += past * (scale * shard.before)[:, :, None, :, None]
  saved = _Saved(q, k, v, log_decay, segment_ids, memories, incoming, between)
  return o.astype(q.dtype), saved


def _backward(settings: _Settings, saved: _Saved, do: Array) -> Any:
  axis, scale, chunk_size = settings
  q, k, v, log_decay, segment_ids = saved[:5]
  wide = saved.incoming.dtype
  shard = _Shard.of(segment_ids, log_decay, k.shape[1], wide)
  options: dict[str, Any] = {"scale": scale, "chunk_size": chunk_size}
  nothing = jnp.zeros_like(saved.incoming)
  behind, owed = xla.cotangents_of(q, do, shard.decays, nothing, **options)
  devices = jnp.arange(lax.axis_size(axis))
  outgoing = _weighed(
    saved.between,
    _all_gather(axis, owed),
    devices > lax.axis_index(axis),
  )
  dq, dk, dv, decay = xla.gradients(
    q, k, v, shard.decays, saved.memories, do, behind, dtype=wide, **options
  )
  before = (scale * shard.before)[:, :, None, :, None]
  tail = shard.tail[..., None]
  q, k, v, do = (x.astype(wide) for x in (q, k, v, do))
  dq_past = jnp.einsum("BKGTE,BKHE->BKGTH", do, saved.incoming) * before
  dk_tail = jnp.einsum("BKSE,BKHE->BKSH", v, outgoing) * tail
  dv_tail = jnp.einsum("BKSH,BKHE->BKSE", k, outgoing) * tail
  if decay is not None:
    taken, given = (q * dq_past).sum((2, 4)), (k * dk_tail).sum(-1)
    carried = jnp.exp(shard.log_carry) * (saved.incoming * outgoing).sum(
      (-2, -1)
    )
    # What is handed on decays at every token, as the last one's share does.
    taken = taken.at[..., -1].add(carried)
    # Before the first token there is nothing on this device to decay.
    decay = without_starts(decay, shard.decays.runs).at[..., 0].set(0)
    decay += shard.log_decay_cotangent(taken, given)
  sums = (dq + dq_past, dk + dk_tail, dv + dv_tail)
  grads = tuple(g.astype(x.dtype) for g, x in zip(sums, saved[:3], strict=True))
  return (*match_primal((*grads, decay), saved[:4]), None)


_over_devices.defvjp(_forward, _backward)


def context_linear_attention(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  *,
  log_decay: Float[Array, "B K T"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  scale: float | None = None,
  chunk_size: int = 128,
  axis: str = "context",
) -> Float[Array, "B K G T H"]:
  """`linear_attention` of a sequence that lies on all devices of an axis.

  To be called inside `jax.shard_map`, with the tokens in contiguous order. A
  device sends `K * H * H` numbers of at least fp32 a row, once forward and once
  backward, and holds those of all devices.

  Args:
    q: Queries of this device's tokens.
    k: Their keys.
    v: Their values.
    log_decay: Logarithm of the factor on the memory before each token, at most
      0; `None` is no decay.
    segment_ids: Of this device's tokens; 0 is padding, which gives 0 and ends a
      segment. One segment by default.
    scale: Factor on the output; `H ** -0.5` by default.
    chunk_size: Tokens that a device computes together.
    axis: Of the mesh.

  Returns:
    The output in q's dtype, summed in at least fp32.
  """
  wide = jnp.promote_types(q.dtype, jnp.float32)
  if segment_ids is None:
    ones = jnp.ones((k.shape[0], k.shape[2]), jnp.int32)
    segment_ids = vary_like(ones, q, k, v)
  settings = _Settings(
    axis, q.shape[-1] ** -0.5 if scale is None else scale, chunk_size
  )
  if log_decay is not None:
    log_decay = log_decay.astype(wide)
  segment_ids = segment_ids.astype(jnp.int32)
  return _over_devices(settings, q, k, v, log_decay, segment_ids)
