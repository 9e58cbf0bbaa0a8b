"""The public op for linear attention."""

import functools
import logging
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.api import (
  check_operands,
  grouped,
  ungrouped,
)
from jaxchunk.kernels.linear_attention import xla
from jaxchunk.kernels.linear_attention.reference import (
  linear_attention_reference,
)
from jaxchunk.kernels.linear_attention.weights import (
  number_runs,
  without_starts,
)
from jaxchunk.kernels.values import known_values
from jaxchunk.kernels.vma import match_primal, vary_like

Implementation = Literal["xla", "reference"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "reference")


class LinearMemory(NamedTuple):
  """What tokens leave behind for those that follow.

  Attributes:
    matrix: The sum of decayed `k^T v`, in at least fp32.
    segment_ids: The segment it belongs to; 0 is none.
  """

  matrix: Float[Array, "B K H H"]
  segment_ids: Int[Array, " B"]


def linear_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  *,
  log_decay: Float[Array, "*B K"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  state: LinearMemory | None = None,
  scale: float | None = None,
  chunk_size: int = 128,
  implementation: Implementation | None = None,
  return_state: bool = False,
) -> Any:
  r"""Causal linear attention with decay and grouped heads, by chunks.

  With a memory for each key head, for query head n of key head
  `n // (N / K)` and the tokens of one segment,

      memory_t = exp(log_decay_t) * memory_{t-1} + k_t^T v_t
      o_t = scale * q_t memory_t

  Every segment starts with an empty memory. Time is linear in T. Memory beyond
  the arguments and results is a matrix `[H,H]` for each chunk and key head,
  twice in the backward pass, and the scores of one chunk. Differentiable in q,
  k, v, `log_decay` and the matrix of `state`.

  Args:
    q: Queries `[B,T,N,H]`, fp32, bf16, fp16 or fp64.
    k: Keys `[B,T,K,H]` in q's dtype; N must be a multiple of K.
    v: Values `[B,T,K,H]` in q's dtype.
    log_decay: Logarithm of the factor on the memory before each token, at most
      0: `[B,T,K]`, or `[K]` for the same at every token. `None` is 0, no
      decay.
    segment_ids: Of the tokens, `[B,T]` integers; 0 is padding, which gives 0
      and ends a segment. Every change begins a new one. One segment, 1, by
      default.
    state: What came before, as `return_state` gives it; nothing by default.
    scale: Factor on the output; `H ** -0.5` if `None`.
    chunk_size: Tokens that are computed together; of "xla".
    implementation: "xla" (by chunks, everywhere) or "reference" (holds every
      pair of tokens). `None` is "xla", which is logged once. A named
      implementation never falls back.
    return_state: Also return what the last token leaves behind.

  Returns:
    The output `[B,T,N,H]` in q's dtype; with `return_state` also the state
    (`LinearMemory`), in at least fp32.

  Raises:
    ValueError: Shapes or dtypes do not fit together, `chunk_size` is not
      positive, the implementation's name is unknown, or, where values are
      known (outside `jit`), a `log_decay` is positive.

  Sources: RetNet (arXiv 2307.08621), Lightning Attention-2 (arXiv 2401.04658),
  Mamba-2 (arXiv 2405.21060).
  """
  _check(q, k, v, segment_ids, state)
  if chunk_size < 1:
    raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
  B, T, _, H = q.shape
  K = k.shape[2]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scale = H**-0.5 if scale is None else float(scale)
  if segment_ids is None:
    segment_ids = jnp.ones((B, T), jnp.int32)
  if state is None:
    nothing = jnp.zeros((B, K, H, H), wide), jnp.zeros(B, jnp.int32)
    state = LinearMemory(*vary_like(nothing, q, k, v, log_decay, segment_ids))
  runs = number_runs(segment_ids, state.segment_ids)
  if log_decay is not None:
    log_decay = without_starts(_by_token(log_decay, B, T, K, wide), runs)
  matrix = state.matrix.astype(wide)
  match implementation:
    case None | "xla":
      if implementation is None:
        _log_choice("xla")
      keys = (x.transpose(0, 2, 1, 3) for x in (k, v))
      o, matrix = _by_chunks(
        scale, chunk_size, grouped(q, K), *keys, log_decay, runs, matrix
      )
      o = ungrouped(o)
    case "reference":
      o, matrix = linear_attention_reference(
        q, k, v, log_decay=log_decay, runs=runs, memory=matrix, scale=scale
      )
    case _:
      raise ValueError(
        f"unknown linear attention implementation {implementation!r}; there "
        f"are {list(IMPLEMENTATIONS)}"
      )
  if not return_state:
    return o
  return o, LinearMemory(matrix, segment_ids[:, -1])


def _by_token(
  log_decay: Array, B: int, T: int, K: int, dtype: Any
) -> Float[Array, "B K T"]:
  """Checked, in the internal layout."""
  if log_decay.shape not in ((K,), (B, T, K)):
    raise ValueError(
      f"log_decay has shape {log_decay.shape}, not [key heads] = {(K,)} or "
      f"[batch, length, key heads] = {(B, T, K)}"
    )
  values = known_values(log_decay)
  if values is not None and (worst := values.max()) > 0:
    raise ValueError(
      f"log_decay must be at most 0, got {worst:.4g}; it is a logarithm: for a "
      "decay of 0.9 give log(0.9)"
    )
  log_decay = jnp.asarray(log_decay, dtype)
  if log_decay.ndim == 1:
    return jnp.broadcast_to(log_decay[None, :, None], (B, K, T))
  return log_decay.transpose(0, 2, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_chunks(
  scale: float,
  chunk_size: int,
  q: Array,
  k: Array,
  v: Array,
  log_decay: Array | None,
  runs: Array,
  memory: Array,
) -> tuple[Array, Array]:
  return _forward(scale, chunk_size, q, k, v, log_decay, runs, memory)[0]


def _forward(
  scale: float,
  chunk_size: int,
  q: Array,
  k: Array,
  v: Array,
  log_decay: Array | None,
  runs: Array,
  memory: Array,
) -> tuple[tuple[Array, Array], Any]:
  decays = xla.Decays(runs, log_decay)
  memories, end = xla.memories_of(k, v, decays, memory, chunk_size=chunk_size)
  o = xla.outputs(
    q,
    k,
    v,
    decays,
    memories,
    scale=scale,
    chunk_size=chunk_size,
    dtype=q.dtype,
  )
  return (o, end), (q, k, v, decays, memory, memories)


def _backward(
  scale: float, chunk_size: int, saved: Any, cotangents: tuple[Array, Array]
) -> Any:
  q, k, v, decays, memory, memories = saved
  do, dend = cotangents
  behind, dmemory = xla.cotangents_of(
    q, do, decays, dend, scale=scale, chunk_size=chunk_size
  )
  grads = xla.gradients(
    q,
    k,
    v,
    decays,
    memories,
    do,
    behind,
    scale=scale,
    chunk_size=chunk_size,
    dtype=q.dtype,
  )
  dq, dk, dv, dlog_decay, dmemory = match_primal(
    (*grads, dmemory), (q, k, v, decays.log_decay, memory)
  )
  return dq, dk, dv, dlog_decay, None, dmemory


_by_chunks.defvjp(_forward, _backward)


def _check(
  q: Array,
  k: Array,
  v: Array,
  segment_ids: Array | None,
  state: LinearMemory | None,
) -> None:
  check_operands(q, k, v)
  B, T, N, H = q.shape
  K = k.shape[2]
  if k.shape != (B, T, K, H):
    raise ValueError(
      f"q has batch {B}, length {T} and head width {H}, k has batch "
      f"{k.shape[0]}, length {k.shape[1]} and head width {k.shape[3]}"
    )
  if N % K:
    raise ValueError(f"q has N={N} heads, not a multiple of k's K={K}")
  if segment_ids is not None and segment_ids.shape != (B, T):
    raise ValueError(
      f"segment_ids has shape {segment_ids.shape}, not [batch, length] = "
      f"{(B, T)}"
    )
  if state is None:
    return
  shapes = (state.matrix.shape, state.segment_ids.shape)
  if shapes != ((B, K, H, H), (B,)):
    raise ValueError(
      f"state has shapes {shapes}, not [batch, key heads, H, H] and [batch] = "
      f"{((B, K, H, H), (B,))}"
    )


@functools.cache
def _log_choice(implementation: str) -> None:
  logging.getLogger("jaxchunk").info(
    "linear attention: running %s", implementation
  )
