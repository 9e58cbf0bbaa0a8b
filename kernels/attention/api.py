"""The public attention op."""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxchunk.kernels.attention.backends import BACKENDS, passes
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.reference import attention_reference
from jaxchunk.kernels.values import known_values
from jaxchunk.kernels.vma import match_primal

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "reference"]


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  mask: AttentionMask | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sink_logits: Float[Array, " N"] | None = None,
  implementation: Implementation | None = None,
  return_lse: bool = False,
) -> Any:
  r"""Exact attention with grouped heads, blockwise, at any length.

  Computes, for query head n of key head `n // (N / K)`,

      softmax(softcap * tanh(scale * q k^T / softcap) + mask) v

  with the soft-cap left out when `softcap` is `None`. Differentiable in q, k
  and v (in `sink_logits`, and through the log-sum-exp); the backward pass
  recomputes scores, so neither pass holds `[T,S]`, and blocks that the mask
  hides cost nothing.

  Args:
    q: Queries `[B,T,N,H]`, fp32, bf16, fp16 or fp64.
    k: Keys `[B,S,K,H]` in q's dtype; N must be a multiple of K.
    v: Values `[B,S,K,H]` in q's dtype.
    mask: Which keys each query sees (`AttentionMask`); all of them if `None`.
    scale: Factor on the scores; `H ** -0.5` if `None`.
    softcap: Bound on the scores' absolute value.
    sink_logits: One more logit for each query head, whose value is 0: it takes
      a share of the softmax and gives nothing (gpt-oss).
    implementation: "xla" (blockwise, everywhere), "pallas_tpu", "pallas_gpu"
      (Hopper), or "reference" (holds every score). `None` is "xla" so far,
      which is logged once: the kernels are compiled and interpreted in the
      tests, but have not run on hardware. A named implementation never falls
      back.
    return_lse: Also return the log-sum-exp of the scores.

  Returns:
    The output `[B,T,N,H]` in q's dtype; with `return_lse` also the lse
    `[B,T,N]` in at least fp32. A query that sees no key gives 0 and -inf.

  Raises:
    ValueError: Shapes or dtypes do not fit together, or the implementation's
      name is unknown.
    NotImplementedError: The named implementation cannot serve the arguments;
      it says why.
  """
  mask = AttentionMask() if mask is None else mask
  _check(q, k, v, mask)
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  if softcap is not None and not softcap > 0:
    raise ValueError(f"softcap must be positive, got {softcap}")
  o, lse = grouped_attention(
    grouped(q, k.shape[2]),
    *(x.transpose(0, 2, 1, 3)[None] for x in (k, v)),
    mask=mask,
    scale=scale,
    softcap=softcap,
    implementation=implementation,
  )
  o, lse = ungrouped(o), ungrouped(lse[..., None])[..., 0]
  if sink_logits is not None:
    if sink_logits.shape != q.shape[2:3]:
      raise ValueError(
        f"sink_logits has shape {sink_logits.shape}, not one for each of q's "
        f"N={q.shape[2]} heads"
      )
    sink = jnp.broadcast_to(sink_logits.astype(lse.dtype), lse.shape)
    o, lse = merge(o, lse, jnp.zeros_like(o), sink)
  return (o, lse) if return_lse else o


def merge(
  o1: Float[Array, "*B H"],
  lse1: Float[Array, "*B"],
  o2: Float[Array, "*B H"],
  lse2: Float[Array, "*B"],
) -> tuple[Float[Array, "*B H"], Float[Array, "*B"]]:
  """Attention over two disjoint sets of keys, from that over each.

  Args:
    o1: Output over the first set.
    lse1: Its log-sum-exp; -inf where it saw no key.
    o2: Output over the second set, in o1's dtype.
    lse2: Its log-sum-exp.

  Returns:
    The output over both in o1's dtype, and its log-sum-exp. Differentiable
    in all four.
  """
  top = jnp.maximum(lse1, lse2)
  # Neither saw a key: any finite number, so that nothing becomes NaN.
  top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
  w1, w2 = jnp.exp(lse1 - top), jnp.exp(lse2 - top)
  total = w1 + w2
  some = total > 0
  safe = jnp.where(some, total, 1)
  parts = (w1 / safe)[..., None] * o1 + (w2 / safe)[..., None] * o2
  lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
  return parts.astype(o1.dtype), lse


def grouped_attention(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "1 B K S H"],
  v: Float[Array, "1 B K S H"],
  *,
  mask: AttentionMask,
  scale: float,
  softcap: float | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
  """`attention` in the layout that the library uses inside; unchecked.

  Args:
    q: Queries.
    k: Keys, as a cache of one layer.
    v: Values.
    mask: Which keys each query sees.
    scale: Factor on the scores.
    softcap: Cap on the scores.
    implementation: As `attention`.

  Returns:
    The output and the log-sum-exp.

  Raises:
    ValueError: The implementation's name is unknown.
  """
  if implementation is None:
    implementation = "xla"
    _log_choice(implementation)
  if implementation in BACKENDS:
    return _flash(implementation, scale, softcap, q, k, v, mask)
  if implementation == "reference":
    o, lse = attention_reference(
      ungrouped(q),
      *(x[0].transpose(0, 2, 1, 3) for x in (k, v)),
      mask=mask,
      scale=scale,
      softcap=softcap,
    )
    K = k.shape[2]
    return grouped(o, K), grouped(lse[..., None], K)[..., 0]
  raise ValueError(
    f"unknown attention implementation {implementation!r}; there are "
    f"{[*BACKENDS, 'reference']}"
  )


def grouped(
  q: Float[Array, "B T N H"], num_kv_heads: int
) -> Float[Array, "B K G T H"]:
  """The internal layout of queries, with the query heads of a key head."""
  B, T, N, H = q.shape
  q = q.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
  return q.transpose(0, 2, 3, 1, 4)


def ungrouped(o: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
  """The inverse of `grouped`."""
  B, K, G, T, H = o.shape
  return o.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _flash(
  backend: str,
  scale: float,
  softcap: float | None,
  q: Array,
  k: Array,
  v: Array,
  mask: AttentionMask,
) -> tuple[Array, Array]:
  forward = passes(backend).forward
  return forward(q, k, v, mask, scale=scale, softcap=softcap)


def _flash_fwd(
  backend: str,
  scale: float,
  softcap: float | None,
  q: Array,
  k: Array,
  v: Array,
  mask: AttentionMask,
) -> tuple[tuple[Array, Array], Any]:
  o, lse = _flash(backend, scale, softcap, q, k, v, mask)
  return (o, lse), (q, k, v, mask, o, lse)


def _flash_bwd(
  backend: str,
  scale: float,
  softcap: float | None,
  saved: Any,
  cotangents: Any,
) -> Any:
  q, k, v, mask, o, lse = saved
  do, dlse = cotangents
  wide = jnp.promote_types(k.dtype, jnp.float32)
  zero = jnp.zeros(k.shape, wide)
  dq, dk, dv = passes(backend).backward(
    q,
    k,
    v,
    mask,
    o,
    lse,
    do,
    zero,
    zero,
    dlse=dlse,
    scale=scale,
    softcap=softcap,
  )
  grads = (dq, dk.astype(k.dtype), dv.astype(v.dtype))
  return (*match_primal(grads, (q, k, v)), None)


_flash.defvjp(_flash_fwd, _flash_bwd)


def check_operands(q: Array, k: Array, v: Array) -> None:
  """Whether these may be queries, keys and values, whatever their sizes.

  Raises:
    ValueError: Axes or dtypes are wrong, keys and values differ, or one is
      empty.
  """
  for name, x in (("q", q), ("k", k), ("v", v)):
    if x.ndim != 4:
      raise ValueError(
        f"{name} must be [batch, length, heads, head width], got shape "
        f"{x.shape}"
      )
    if x.dtype != q.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"q, k and v must have one floating dtype, got q {q.dtype}, "
        f"{name} {x.dtype}"
      )
  if k.shape != v.shape:
    raise ValueError(f"k has shape {k.shape} and v {v.shape}; they must agree")
  if 0 in q.shape or 0 in k.shape:
    raise ValueError(f"empty attention: q {q.shape}, k {k.shape}")


def _check(q: Array, k: Array, v: Array, mask: AttentionMask) -> None:
  check_operands(q, k, v)
  B, T, N, H = q.shape
  if (k.shape[0], k.shape[3]) != (B, H):
    raise ValueError(
      f"q has batch {B} and head width {H}, k has batch {k.shape[0]} and head "
      f"width {k.shape[3]}"
    )
  K = k.shape[2]
  if N % K:
    raise ValueError(f"q has N={N} heads, not a multiple of k's K={K}")
  if (mask.q_segment_ids is None) != (mask.kv_segment_ids is None):
    raise ValueError(
      "the mask has segment ids of only one side; build it with "
      "AttentionMask.segments(q_ids, kv_ids)"
    )
  for name, ids, length in (
    ("q", mask.q_segment_ids, T),
    ("kv", mask.kv_segment_ids, k.shape[1]),
  ):
    if ids is not None and ids.shape != (B, length):
      raise ValueError(
        f"{name} segment ids have shape {ids.shape}, not [batch, length] = "
        f"{(B, length)}"
      )
  if mask.block_table is not None:
    _check_table(mask, mask.block_table, B, K, T, k.shape[1])


def _check_table(
  mask: AttentionMask, table: Array, B: int, K: int, T: int, S: int
) -> None:
  for what, length, size in (
    ("T queries by q_block", T, mask.q_block),
    ("S keys by kv_block", S, mask.kv_block),
  ):
    if length % size:
      raise ValueError(
        f"the block table divides {what}: {length} is not a multiple of {size}"
      )
  wanted = (B, K, T // mask.q_block)
  if table.shape[:3] != wanted:
    raise ValueError(
      f"the block table has shape {table.shape}, not [batch, key heads, query "
      f"blocks, entries] = {(*wanted, 'M')}"
    )
  values = known_values(table)
  if values is None:
    return
  if (worst := int(values.max(initial=-1))) >= S // mask.kv_block:
    raise ValueError(
      f"the block table names block {worst}, outside the {S // mask.kv_block} "
      f"blocks of {mask.kv_block} that S={S} keys have"
    )


@functools.cache
def _log_choice(implementation: str) -> None:
  logging.getLogger("jaxchunk").info("attention: running %s", implementation)
