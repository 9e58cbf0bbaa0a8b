"""Chunk-wise linear attention in plain XLA.

The memory runs over the chunks once, one matrix a head for each chunk; what a
chunk's tokens give each other, and take from the memory before them, does not
depend on other chunks then. The backward pass is the same in reverse: the
cotangent of the memory runs back over the chunks, the rest is local.

Queries are `[B,K,G,T,H]`, keys and values `[B,K,T,H]`. Memory beyond these is
`T / C` matrices `[H,H]` a key head, and one chunk's scores.

Sources: Sun et al., RetNet (arXiv 2307.08621), the chunk-wise form; Dao and Gu,
Mamba-2 (arXiv 2405.21060), decay by token; Qin et al., Lightning Attention-2
(arXiv 2401.04658), the backward pass by chunks.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.linear_attention.weights import (
  Weights,
  scaled,
  tail_and_carry,
)
from jaxchunk.kernels.vma import vary_like


class Decays(NamedTuple):
  """What weighs the tokens.

  Attributes:
    runs: As `weights.number_runs` gives them.
    log_decay: Of what was before each token, in at least fp32; `None` for no
      decay.
  """

  runs: Int[Array, "B T"]
  log_decay: Float[Array, "B K T"] | None


class _Chunks(NamedTuple):
  """Tokens cut into equal chunks, the last filled up.

  Attributes:
    decays: Of all tokens; what fills up belongs to the last token's run and
      decays nothing, so that the memory stays.
    before: `[N,B]` the run of the memory before each chunk.
    size: C.
    length: T, without what fills up.
  """

  decays: Decays
  before: Int[Array, "N B"]
  size: int
  length: int

  @classmethod
  def of(cls, decays: Decays, chunk_size: int) -> "_Chunks":
    runs, log_decay = decays
    length = runs.shape[1]
    size = min(chunk_size, length)
    extra = -length % size
    runs = jnp.pad(runs, ((0, 0), (0, extra)), mode="edge")
    if log_decay is not None:
      log_decay = jnp.pad(log_decay, ((0, 0), (0, 0), (0, extra)))
    first = jnp.zeros_like(runs[:, :1])
    before = jnp.concatenate([first, runs[:, size - 1 : -1 : size]], axis=1)
    return cls(Decays(runs, log_decay), before.T, size, length)

  @property
  def total(self) -> int:
    return self.before.shape[0]

  def filled(self, x: Float[Array, "*B T H"]) -> Float[Array, "*B R H"]:
    """Tokens, filled up with zeros."""
    extra = -self.length % self.size
    return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, extra), (0, 0)))

  def cut(self, x: Float[Array, "*B R H"], n: Any) -> Float[Array, "*B C H"]:
    """The tokens of a chunk.

    The barrier keeps XLA from making all of a bf16 array fp32 before the loop.
    """
    x, n = lax.optimization_barrier((x, n))
    return lax.dynamic_slice_in_dim(x, n * self.size, self.size, x.ndim - 2)

  def put(self, x: Array, part: Array, n: Any) -> Array:
    """Writes the tokens of a chunk."""
    part = part.astype(x.dtype)
    return lax.dynamic_update_slice_in_dim(x, part, n * self.size, x.ndim - 2)

  def own(self, x: Float[Array, "*B R H"]) -> Float[Array, "*B T H"]:
    """Without what fills up."""
    return lax.slice_in_dim(x, 0, self.length, axis=x.ndim - 2)

  def decays_of(self, n: Any) -> tuple[Array | None, Array, Array]:
    """Of a chunk: log decays, runs, and the run of the memory before."""
    runs, log_decay = self.decays
    at = n * self.size
    if log_decay is not None:
      log_decay = lax.dynamic_slice_in_dim(log_decay, at, self.size, 2)
    runs = lax.dynamic_slice_in_dim(runs, at, self.size, 1)
    before = lax.dynamic_index_in_dim(self.before, n, keepdims=False)
    return log_decay, runs, before

  def weights(self, n: Any, dtype: Any) -> Weights:
    return Weights.of(*self.decays_of(n), dtype)


def memories_of(
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  decays: Decays,
  memory: Float[Array, "B K H H"],
  *,
  chunk_size: int,
) -> tuple[Float[Array, "N B K H H"], Float[Array, "B K H H"]]:
  """The memory before every chunk, and behind the last token.

  Args:
    k: Keys.
    v: Values.
    decays: Of the tokens.
    memory: Before the first token, of run 0, in at least fp32.
    chunk_size: C; fewer if there are fewer tokens.

  Returns:
    Both in memory's dtype.
  """
  chunks = _Chunks.of(decays, chunk_size)
  k, v = chunks.filled(k), chunks.filled(v)

  def step(memory: Array, n: Any) -> tuple[Array, Array]:
    tail, carry = tail_and_carry(*chunks.decays_of(n), memory.dtype)
    k_n = chunks.cut(k, n).astype(memory.dtype) * tail[..., None]
    added = _product("BKSH,BKSE->BKHE", k_n, chunks.cut(v, n))
    return scaled(carry[..., None, None], memory) + added, memory

  memory = vary_like(memory, k, v, decays)
  end, memories = lax.scan(step, memory, jnp.arange(chunks.total))
  return memories, end


def outputs(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  decays: Decays,
  memories: Float[Array, "N B K H H"],
  *,
  scale: float,
  chunk_size: int,
  dtype: Any,
) -> Float[Array, "B K G T H"]:
  """The output from the memory before every chunk.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    decays: Of the tokens.
    memories: The first result of `memories_of`, for the same chunk size.
    scale: Factor on the output.
    chunk_size: C.
    dtype: Of the output.
  """
  chunks = _Chunks.of(decays, chunk_size)
  q, k, v = map(chunks.filled, (q, k, v))

  def attend_chunk(n: Any, o: Array) -> Array:
    weights = chunks.weights(n, memories.dtype)
    q_n, k_n, v_n = (chunks.cut(x, n) for x in (q, k, v))
    scores = _product("BKGTH,BKSH->BKGTS", q_n, k_n)
    scores = scores * weights.inside[:, :, None]
    inside = _product("BKGTS,BKSE->BKGTE", scores.astype(v.dtype), v_n)
    past = _product("BKGTH,BKHE->BKGTE", q_n, memories[n])
    past = scaled(weights.before[:, :, None, :, None], past)
    return chunks.put(o, (inside + past) * scale, n)

  o = vary_like(jnp.zeros(q.shape, dtype), q, k, v, decays, memories)
  return chunks.own(lax.fori_loop(0, chunks.total, attend_chunk, o))


def cotangents_of(
  q: Float[Array, "B K G T H"],
  do: Float[Array, "B K G T H"],
  decays: Decays,
  cotangent: Float[Array, "B K H H"],
  *,
  scale: float,
  chunk_size: int,
) -> tuple[Float[Array, "N B K H H"], Float[Array, "B K H H"]]:
  """The cotangent of the memory behind every chunk, and before the first token.

  Args:
    q: Queries.
    do: Cotangent of the output.
    decays: Of the tokens.
    cotangent: Of the memory behind the last token, in at least fp32.
    scale: Factor on the output.
    chunk_size: C.

  Returns:
    Both in the dtype of `cotangent`.
  """
  chunks = _Chunks.of(decays, chunk_size)
  q, do = chunks.filled(q), chunks.filled(do)

  def step(cotangent: Array, n: Any) -> tuple[Array, Array]:
    weights = chunks.weights(n, cotangent.dtype)
    before = weights.before[:, :, None, :, None] * scale
    q_n = chunks.cut(q, n).astype(cotangent.dtype) * before
    added = _product("BKGTH,BKGTE->BKHE", q_n, chunks.cut(do, n))
    kept = scaled(weights.carry[..., None, None], cotangent)
    return kept + added, cotangent

  cotangent = vary_like(cotangent, q, do, decays)
  first, cotangents = lax.scan(
    step, cotangent, jnp.arange(chunks.total), reverse=True
  )
  return cotangents, first


class Gradients(NamedTuple):
  """Of everything that differs from token to token."""

  dq: Float[Array, "B K G T H"]
  dk: Float[Array, "B K T H"]
  dv: Float[Array, "B K T H"]
  dlog_decay: Float[Array, "B K T"] | None


def gradients(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  decays: Decays,
  memories: Float[Array, "N B K H H"],
  do: Float[Array, "B K G T H"],
  cotangents: Float[Array, "N B K H H"],
  *,
  scale: float,
  chunk_size: int,
  dtype: Any,
) -> Gradients:
  """The gradients from what is owed to the memory behind every chunk.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    decays: Of the tokens.
    memories: The first result of `memories_of`, for the same chunk size.
    do: Cotangent of the output.
    cotangents: The first result of `cotangents_of`.
    scale: Factor on the output.
    chunk_size: C.
    dtype: Of dq, dk and dv.
  """
  chunks = _Chunks.of(decays, chunk_size)
  log_decay = chunks.decays.log_decay
  q, k, v, do = map(chunks.filled, (q, k, v, do))

  def back_chunk(n: Any, so_far: Gradients) -> Gradients:
    weights = chunks.weights(n, memories.dtype)
    tokens = [chunks.cut(x, n) for x in (q, k, v, do)]
    part, pairs, taken = _chunk_gradient(
      tokens, weights, memories[n], cotangents[n], scale
    )
    decay = so_far.dlog_decay
    if decay is not None:
      owed = weights.log_decay_cotangent(pairs, taken)
      at = n * chunks.size
      decay = lax.dynamic_update_slice_in_dim(decay, owed, at, 2)
    return Gradients(
      chunks.put(so_far.dq, part.dq, n),
      chunks.put(so_far.dk, part.dk, n),
      chunks.put(so_far.dv, part.dv, n),
      decay,
    )

  zeros = Gradients(
    jnp.zeros(q.shape, dtype),
    jnp.zeros(k.shape, dtype),
    jnp.zeros(v.shape, dtype),
    None if log_decay is None else jnp.zeros_like(log_decay),
  )
  zeros = vary_like(zeros, q, k, v, decays, memories, do, cotangents)
  grads = lax.fori_loop(0, chunks.total, back_chunk, zeros)
  decay = grads.dlog_decay
  return Gradients(
    chunks.own(grads.dq),
    chunks.own(grads.dk),
    chunks.own(grads.dv),
    None if decay is None else decay[:, :, : chunks.length],
  )


def _chunk_gradient(
  tokens: list[Array],
  weights: Weights,
  memory: Float[Array, "B K H H"],
  cotangent: Float[Array, "B K H H"],
  scale: float,
) -> tuple[Gradients, Array, Array]:
  """Of one chunk, and what `Weights.log_decay_cotangent` takes.

  Args:
    tokens: q, k, v and do.
    weights: Of the chunk.
    memory: Before it.
    cotangent: Of the memory behind it.
    scale: Factor on the output.
  """
  q, k, v, do = tokens
  inside = weights.inside[:, :, None] * scale
  tail, before = weights.tail[..., None], weights.before[:, :, None, :, None]
  p = _product("BKGTH,BKSH->BKGTS", q, k) * inside
  dp = _product("BKGTE,BKSE->BKGTS", do, v)
  ds = dp * inside
  dq_past = _product("BKGTE,BKHE->BKGTH", do, memory)
  dq_past = scaled(before, dq_past) * scale
  dk_tail = scaled(tail, _product("BKSE,BKHE->BKSH", v, cotangent))
  dv_tail = scaled(tail, _product("BKSH,BKHE->BKSE", k, cotangent))
  ds_low, p_low = ds.astype(q.dtype), p.astype(q.dtype)
  dq = _product("BKGTS,BKSH->BKGTH", ds_low, k) + dq_past
  dk = _product("BKGTS,BKGTH->BKSH", ds_low, q) + dk_tail
  dv = _product("BKGTS,BKGTE->BKSE", p_low, do) + dv_tail
  # The cotangent of a weight's logarithm is that of the weight, times it. What
  # is handed on decays like what reaches the last token.
  pairs = (p * dp).sum(2).at[:, :, -1].add((k * dk_tail).sum(-1))
  kept = scaled(weights.carry, (memory * cotangent).sum((-2, -1)))
  taken = (q * dq_past).sum((2, 4)).at[..., -1].add(kept)
  return Gradients(dq, dk, dv, None), pairs, taken


def _product(spec: str, a: Array, b: Array) -> Array:
  """A product, summed and returned in at least fp32, as the wider factor."""
  dtype = jnp.promote_types(a.dtype, b.dtype)
  wide = jnp.promote_types(dtype, jnp.float32)
  a, b = a.astype(dtype), b.astype(dtype)
  return jnp.einsum(spec, a, b, preferred_element_type=wide)
