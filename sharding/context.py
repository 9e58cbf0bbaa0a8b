"""Attention over a sequence that lies on several devices.

Inside `jax.shard_map` each device of the axis "context" holds a part of the
queries, keys and values, and gets its part of the output:

  o, lse = context_attention(q, k, v, scheme=Ring(order="zigzag"))

Exact, forward and backward, for packed documents that cross the borders. What
moves differs:

  AllGather   keys and values, to all at once; simple, and needs room for them.
  Ring        keys and values, one neighbour at a time, while the device works
              on those that it has (Li et al., Ring Self-Attention, arXiv
              2105.13120; Liu et al., Ring Attention, arXiv 2310.01889).
  TokenRing   queries one way around the ring, partial outputs the other way
              (arXiv 2412.20501): both directions of a link are used.
  Ulysses     heads: each device gets all tokens of some heads (Jacobs et al.,
              DeepSpeed-Ulysses, arXiv 2309.14509); at most as many devices as
              key heads.
  USP         Ulysses among neighbours, a ring around their groups (Fang and
              Zhao, arXiv 2405.07719).

With a causal mask the devices of a ring have equal work only if tokens are
dealt out: `order="zigzag"` gives each one part from either end (as Llama 3),
"striped" every P-th token (Brandon et al., arXiv 2311.09431), "contiguous"
leaves them as they are. `device_order` says which token lies where.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.api import grouped_attention, merge
from jaxchunk.kernels.attention.backends import BACKENDS, passes
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.vma import match_primal, vary_like
from jaxchunk.sharding.schemes import (
  USP,
  AllGather,
  Order,
  Ring,
  Scheme,
  TokenRing,
  Ulysses,
  device_order,
  ring_ranks,
)


class _Settings(NamedTuple):
  """What does not change on the way around.

  Attributes:
    axis: Of the mesh.
    ranks: P, places on the ring.
    shift: Devices between two of them.
    order: How tokens are dealt out.
    causal: Whether a query sees only what came before.
    window: Keys that it sees at most.
    backend: Of attention.
    scale: Factor on the scores.
    softcap: Cap on the scores.
  """

  axis: str
  ranks: int
  shift: int
  order: Order
  causal: bool
  window: int | None
  backend: str
  scale: float
  softcap: float | None

  def rank(self) -> Array:
    """This device's place on the ring."""
    return lax.axis_index(self.axis) // self.shift

  def send(self, tree: Any, distance: int) -> Any:
    """To the device so many places ahead."""
    count = self.ranks * self.shift
    step = distance * self.shift
    pairs = [(n, (n + step) % count) for n in range(count)]
    return jax.tree.map(lambda a: lax.ppermute(a, self.axis, pairs), tree)

  @property
  def options(self) -> dict[str, Any]:
    """Of the passes."""
    return {"scale": self.scale, "softcap": self.softcap}


class _Part(NamedTuple):
  """A stretch of what a rank holds.

  Attributes:
    span: Where it lies in the rank's arrays.
    start: Position of its first token, in units of the stride.
  """

  span: slice
  start: Any


def _parts(settings: _Settings, rank: Any, length: int) -> list[_Part]:
  """What a rank holds, as stretches of consecutive tokens."""
  if settings.order == "zigzag":
    half = length // 2
    last = 2 * settings.ranks - 1 - rank
    return [
      _Part(slice(0, half), rank * half),
      _Part(slice(half, length), last * half),
    ]
  return [_Part(slice(0, length), rank * length)]


class _Tile(NamedTuple):
  """Some of the queries with some of the keys: one call of attention."""

  q: slice
  kv: slice
  mask: AttentionMask


def _tiles(
  settings: _Settings,
  q_rank: Any,
  kv_rank: Any,
  lengths: tuple[int, int],
  q_ids: Array,
  kv_ids: Array,
) -> Iterator[_Tile]:
  """Together the queries of one rank with the keys of another."""
  for q in _parts(settings, q_rank, lengths[0]):
    for kv in _parts(settings, kv_rank, lengths[1]):
      if settings.order == "striped":
        # Token t of rank r has position t P + r: within a pair of ranks the
        # order is that of t, with ties by r.
        offset = (q_rank - kv_rank) // settings.ranks
      else:
        offset = q.start - kv.start
      mask = AttentionMask.segments(q_ids[:, q.span], kv_ids[:, kv.span])
      if settings.causal:
        mask &= AttentionMask.causal(jnp.asarray(offset, jnp.int32))
      if settings.window is not None:
        mask &= AttentionMask.window(settings.window)
      yield _Tile(q.span, kv.span, mask)


class _Partial(NamedTuple):
  """Attention over some of the keys, to be merged: in at least fp32."""

  o: Float[Array, "B K G T H"]
  lse: Float[Array, "B K G T"]

  @classmethod
  def nothing(cls, q: Array) -> "_Partial":
    """Over no key."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    o = vary_like(jnp.zeros(q.shape, wide), q)
    return cls(o, vary_like(jnp.full(q.shape[:-1], -jnp.inf, wide), q))

  def merged(self, o: Array, lse: Array, span: slice) -> "_Partial":
    """With attention of the queries in `span` over other keys."""
    old_o, old_lse = self.o[..., span, :], self.lse[..., span]
    both, both_lse = merge(old_o, old_lse, o.astype(old_o.dtype), lse)
    return _Partial(
      self.o.at[..., span, :].set(both), self.lse.at[..., span].set(both_lse)
    )


class _Keys(NamedTuple):
  """What goes around a ring of keys."""

  k: Float[Array, "B K S H"]
  v: Float[Array, "B K S H"]
  ids: Int[Array, "B S"]


def _attended(
  settings: _Settings,
  q: Array,
  q_ids: Array,
  q_rank: Any,
  keys: _Keys,
  kv_rank: Any,
  partial: _Partial,
) -> _Partial:
  """`partial`, merged with attention over some rank's keys."""
  forward = passes(settings.backend).forward
  lengths = q.shape[-2], keys.k.shape[-2]
  for tile in _tiles(settings, q_rank, kv_rank, lengths, q_ids, keys.ids):
    o, lse = forward(
      q[..., tile.q, :],
      keys.k[None, ..., tile.kv, :],
      keys.v[None, ..., tile.kv, :],
      tile.mask,
      **settings.options,
    )
    partial = partial.merged(o, lse, tile.q)
  return partial


class _Queries(NamedTuple):
  """What the backward pass needs of queries."""

  q: Float[Array, "B K G T H"]
  o: Float[Array, "B K G T H"]
  lse: Float[Array, "B K G T"]
  do: Float[Array, "B K G T H"]
  dlse: Float[Array, "B K G T"]
  ids: Int[Array, "B T"]


class _Gradients(NamedTuple):
  """Sums so far, in at least fp32."""

  dq: Float[Array, "B K G T H"]
  dk: Float[Array, "B K S H"]
  dv: Float[Array, "B K S H"]


def _differentiated(
  settings: _Settings,
  queries: _Queries,
  q_rank: Any,
  keys: _Keys,
  kv_rank: Any,
  sums: _Gradients,
) -> _Gradients:
  """`sums`, with what some queries owe to some rank's keys added."""
  backward = passes(settings.backend).backward
  lengths = queries.q.shape[-2], keys.k.shape[-2]
  tiles = _tiles(settings, q_rank, kv_rank, lengths, queries.ids, keys.ids)
  for q_span, kv_span, mask in tiles:
    dq, dk, dv = backward(
      queries.q[..., q_span, :],
      keys.k[None, ..., kv_span, :],
      keys.v[None, ..., kv_span, :],
      mask,
      queries.o[..., q_span, :],
      queries.lse[..., q_span],
      queries.do[..., q_span, :],
      sums.dk[None, ..., kv_span, :],
      sums.dv[None, ..., kv_span, :],
      dlse=queries.dlse[..., q_span],
      **settings.options,
    )
    sums = _Gradients(
      sums.dq.at[..., q_span, :].add(dq.astype(sums.dq.dtype)),
      sums.dk.at[..., kv_span, :].set(dk[0]),
      sums.dv.at[..., kv_span, :].set(dv[0]),
    )
  return sums


def _no_gradients(q: Array, k: Array) -> _Gradients:
  wide = jnp.promote_types(q.dtype, jnp.float32)
  dq, dk, dv = (jnp.zeros(x.shape, wide) for x in (q, k, k))
  return _Gradients(*vary_like((dq, dk, dv), q, k))


# Forward of queries, keys and values with their segments: `(o, lse)`.
_Forward = Callable[[_Settings, Array, _Keys], _Partial]
# Backward: what is owed to this device's own queries, keys and values.
_Backward = Callable[[_Settings, _Queries, _Keys], _Gradients]


def _ring_forward(settings: _Settings, q: Array, keys: _Keys) -> _Partial:
  me = settings.rank()
  q_ids = keys.ids

  def step(carry: Any, distance: Array) -> tuple[Any, None]:
    keys, partial = carry
    # Sent before they are used: the copy runs beside the work.
    following = settings.send(keys, 1)
    owner = (me - distance) % settings.ranks
    partial = _attended(settings, q, q_ids, me, keys, owner, partial)
    return (following, partial), None

  partial = _Partial.nothing(q)
  last = settings.ranks - 1
  (keys, partial), _ = lax.scan(step, (keys, partial), jnp.arange(last))
  owner = (me - last) % settings.ranks
  return _attended(settings, q, q_ids, me, keys, owner, partial)


def _ring_backward(
  settings: _Settings, queries: _Queries, keys: _Keys
) -> _Gradients:
  me = settings.rank()

  def step(carry: Any, distance: Array) -> tuple[Any, None]:
    keys, sums = carry
    following = settings.send(keys, 1)
    owner = (me - distance) % settings.ranks
    sums = _differentiated(settings, queries, me, keys, owner, sums)
    dk, dv = settings.send((sums.dk, sums.dv), 1)
    return (following, _Gradients(sums.dq, dk, dv)), None

  sums = _no_gradients(queries.q, keys.k)
  last = settings.ranks - 1
  (keys, sums), _ = lax.scan(step, (keys, sums), jnp.arange(last))
  owner = (me - last) % settings.ranks
  sums = _differentiated(settings, queries, me, keys, owner, sums)
  # One more step, and they are home.
  return _Gradients(sums.dq, *settings.send((sums.dk, sums.dv), 1))


def _token_forward(settings: _Settings, q: Array, keys: _Keys) -> _Partial:
  me = settings.rank()
  whole, visitor = _Partial.nothing(q), (q, keys.ids)
  everything = slice(0, q.shape[-2])
  for distance in range(settings.ranks):
    following = settings.send(visitor, 1)
    owner = (me - distance) % settings.ranks
    part = _Partial.nothing(q)
    part = _attended(settings, *visitor, owner, keys, me, part)
    home = settings.send(part, -distance) if distance else part
    whole = whole.merged(home.o, home.lse, everything)
    visitor = following
  return whole


def _token_backward(
  settings: _Settings, queries: _Queries, keys: _Keys
) -> _Gradients:
  me = settings.rank()
  sums, visitor = _no_gradients(queries.q, keys.k), queries
  mine = sums.dq
  for distance in range(settings.ranks):
    following = settings.send(visitor, 1)
    owner = (me - distance) % settings.ranks
    zero = sums._replace(dq=jnp.zeros_like(sums.dq))
    sums = _differentiated(settings, visitor, owner, keys, me, zero)
    mine += settings.send(sums.dq, -distance) if distance else sums.dq
    visitor = following
  return sums._replace(dq=mine)


_RINGS: dict[str, tuple[_Forward, _Backward]] = {
  "keys": (_ring_forward, _ring_backward),
  "queries": (_token_forward, _token_backward),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _around(
  settings: _Settings, what: str, q: Array, k: Array, v: Array, ids: Array
) -> tuple[Array, Array]:
  """Attention with a ring on which `what` moves."""
  forward, _ = _RINGS[what]
  o, lse = forward(settings, q, _Keys(k, v, ids))
  return o.astype(q.dtype), lse


def _around_fwd(
  settings: _Settings, what: str, q: Array, k: Array, v: Array, ids: Array
) -> tuple[tuple[Array, Array], Any]:
  o, lse = _around(settings, what, q, k, v, ids)
  return (o, lse), (q, k, v, ids, o, lse)


def _around_bwd(
  settings: _Settings, what: str, saved: Any, cotangents: Any
) -> Any:
  q, k, v, ids, o, lse = saved
  do, dlse = cotangents
  _, backward = _RINGS[what]
  queries = _Queries(q, o, lse, do, dlse, ids)
  sums = backward(settings, queries, _Keys(k, v, ids))
  grads = tuple(g.astype(x.dtype) for g, x in zip(sums, (q, k, v), strict=True))
  return (*match_primal(grads, (q, k, v)), None)


_around.defvjp(_around_fwd, _around_bwd)


def context_attention(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  *,
  scheme: Scheme,
  segment_ids: Int[Array, "B T"] | None = None,
  causal: bool = True,
  window: int | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  implementation: str = "xla",
  axis: str = "context",
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
  """Attention of this device's tokens to those of all devices of an axis.

  To be called inside `jax.shard_map`; `attention` of the whole sequence is what
  it computes.

  Args:
    q: Queries of this device's tokens, dealt out as `device_order` says.
    k: Their keys.
    v: Their values.
    scheme: What moves.
    segment_ids: Of this device's tokens; 0 is padding, and tokens see only
      their own segment. One segment by default.
    causal: Whether a token sees only itself and those before it.
    window: Keys that a token sees at most, with `causal` its last ones.
    scale: Factor on the scores; `H ** -0.5` by default.
    softcap: Cap on the scores.
    implementation: Of attention on a device.
    axis: Of the mesh.

  Returns:
    The output in q's dtype and the log-sum-exp in at least fp32. Partial
    outputs are merged in at least fp32.

  Raises:
    ValueError: The scheme does not go with the number of devices or heads;
      names what does.
    NotImplementedError: A window with striped tokens.
  """
  devices = lax.axis_size(axis)
  ranks = ring_ranks(scheme, devices)
  if implementation not in BACKENDS:
    raise ValueError(
      f"implementation={implementation!r} is not one of {list(BACKENDS)}"
    )
  if window is not None and scheme.order == "striped":
    raise NotImplementedError(
      "a window over striped tokens: choose order='zigzag' or 'contiguous'"
    )
  if segment_ids is None:
    ones = jnp.ones((q.shape[0], q.shape[-2]), jnp.int32)
    segment_ids = vary_like(ones, q, k)
  settings = _Settings(
    axis,
    ranks,
    devices // ranks,
    scheme.order,
    causal,
    window,
    implementation,
    q.shape[-1] ** -0.5 if scale is None else scale,
    softcap,
  )
  match scheme:
    case AllGather():
      return _gathered(settings, q, k, v, segment_ids)
    case Ring():
      return _around(settings, "keys", q, k, v, segment_ids)
    case TokenRing():
      return _around(settings, "queries", q, k, v, segment_ids)
    case Ulysses():
      return _by_heads(settings, devices, q, k, v, segment_ids)
    case USP(heads=heads):
      return _by_heads(settings, heads, q, k, v, segment_ids)


def _gathered(
  settings: _Settings, q: Array, k: Array, v: Array, ids: Array
) -> tuple[Array, Array]:
  me, length = settings.rank(), q.shape[-2]
  total = settings.ranks * length
  # From the order of the devices to that of the positions.
  scheme = AllGather(order=settings.order)
  back = np.argsort(device_order(total, settings.ranks, scheme))
  k, v = (
    lax.all_gather(x, settings.axis, axis=2, tiled=True)[:, :, back]
    for x in (k, v)
  )
  kv_ids = lax.all_gather(ids, settings.axis, axis=1, tiled=True)[:, back]
  outputs = []
  for part in _parts(settings, me, length):
    mask = AttentionMask.segments(ids[:, part.span], kv_ids)
    if settings.causal:
      mask &= AttentionMask.causal(jnp.asarray(part.start, jnp.int32))
    if settings.window is not None:
      mask &= AttentionMask.window(settings.window)
    outputs.append(
      grouped_attention(
        q[..., part.span, :],
        k[None],
        v[None],
        mask=mask,
        implementation=settings.backend,
        **settings.options,
      )
    )
  o, lse = (jnp.concatenate(x, 3) for x in zip(*outputs, strict=True))
  return o, lse


def _by_heads(
  settings: _Settings, count: int, q: Array, k: Array, v: Array, ids: Array
) -> tuple[Array, Array]:
  """Among `count` neighbours heads are dealt out, and all tokens of them."""
  num_kv_heads = k.shape[1]
  if num_kv_heads % count:
    fits = [n for n in range(count, 0, -1) if num_kv_heads % n == 0]
    raise ValueError(
      f"{count} devices cannot share K={num_kv_heads} key heads; use "
      f"USP(heads={fits[0]}), or Ring()"
    )
  exchange = functools.partial(_exchange, settings.axis, count)
  q = exchange(q, 1, 3)
  k, v = (exchange(x, 1, 2) for x in (k, v))
  ids = _neighbours(settings.axis, count, ids)
  if settings.ranks > 1 and settings.shift == count:
    o, lse = _around(settings, "keys", q, k, v, ids)
  else:
    mask = AttentionMask.segments(ids, ids)
    if settings.causal:
      mask &= AttentionMask.causal()
    if settings.window is not None:
      mask &= AttentionMask.window(settings.window)
    o, lse = grouped_attention(
      q,
      k[None],
      v[None],
      mask=mask,
      implementation=settings.backend,
      **settings.options,
    )
  return exchange(o, 3, 1), exchange(lse, 3, 1)


def _groups(axis: str, count: int) -> list[list[int]] | None:
  """Neighbours along an axis; `None` is all of it."""
  devices = lax.axis_size(axis)
  if count == devices:
    return None
  return [list(range(n, n + count)) for n in range(0, devices, count)]


def _exchange(axis: str, count: int, x: Array, split: int, join: int) -> Array:
  """Splits an array along one of its axes and joins what comes on another."""
  return lax.all_to_all(
    x,
    axis,
    split,
    join,
    axis_index_groups=_groups(axis, count),
    tiled=True,
  )


def _neighbours(axis: str, count: int, ids: Array) -> Array:
  """All segment ids of a group."""
  return lax.all_gather(
    ids, axis, axis=1, tiled=True, axis_index_groups=_groups(axis, count)
  )
