"""Attention over pages for Hopper GPUs, in Pallas (Mosaic GPU).

A program is a row (a sequence and a key head), 64 of its queries (all heads of
the group, and all T), and a part of its keys. It has three warpgroups. One
fetches: it reads the table and copies pages (TMA) into a ring in shared memory,
a step of 64 or 128 keys at a time. Two work, each on every other step, and each
with its own sums: so neither waits for the other, and one multiplies while the
other computes its softmax. What is left over is merged outside, in fp32: two
parts for each program. That a short batch fills the GPU is thus no case of its
own, only more parts (`count_splits`).

- Queries are the 64 rows of a wgmma, padded, as in FlashAttention's packing of
  grouped heads. The transposed product would pad to 8 only, but it reads 64
  rows of keys from shared memory for 8 columns, which takes a tensor core
  longer than 64 columns of keys for 64 queries; its probabilities would go
  through shared memory, and its row sums across warps.
- Steps in which every query sees every key come first and have no mask. In the
  others the values that nobody sees are set to 0 in shared memory, as 0 times
  NaN is NaN. Queries of a sequence are taken to be neighbours: a key between
  two of them that neither sees, by the window, counts as seen by some.
- Keys and values of 8 bits are converted in a place of the worker's own; their
  scales go to the scores and the probabilities. The probabilities are then not
  between 0 and 1, and fp16 may not hold them: `unsupported`.
- Side arrays (scales, positions, log-weights) of pages of 16 keys have 64 bytes
  a page; TMA writes at multiples of 128: `unsupported`.

What the interpreter cannot do: `jaxchunk.kernels.attention.pallas_gpu`.

Sources: Shah et al., FlashAttention-3 (arXiv 2407.08608): roles, packing, base
2. Dao et al., Flash-Decoding for long-context inference (2023): splits. Kwon et
al., PagedAttention (arXiv 2309.06180): pages.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.hopper.problem import ROWS, WORKERS
from jaxchunk.kernels.attention.hopper.warps import launch, like_all
from jaxchunk.kernels.paged_attention.hopper.body import (
  PagedScratch,
  paged_body,
)
from jaxchunk.kernels.paged_attention.hopper.problem import (
  Inputs,
  PagedProblem,
  make_ranges,
  unsupported,
)
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kernels.vma import output


def gpu_paged_forward(
  q: Float[Array, "B K G T H"],
  pages: KVPages,
  view: PageView,
  q_positions: Int[Array, "B T"],
  *,
  layer: Any = 0,
  window: int | None = None,
  scale: float,
  softcap: float | None = None,
  splits: int | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
  """`reference.paged_reference` on a Hopper GPU.

  Args:
    q: Queries, bf16 or fp16.
    pages: The cache, of q's dtype, or of 8 bits if q is bf16.
    view: Which pages each row reads.
    q_positions: Position of each query, -1 for none.
    layer: Which layer of the cache; may be traced.
    window: How many positions a query sees, its own the last.
    scale: Factor on the products.
    softcap: Bound on the scores.
    splits: Among how many programs a row's keys are divided; by default what
      fills the GPU.
    interpret: `InterpretGPUParams` to run on a CPU.

  Returns:
    The output in q's dtype and the log-sum-exp in fp32, 0 and -inf for a
    query that sees nothing.

  Raises:
    NotImplementedError: `unsupported` has a reason.
  """
  reason = unsupported(q, pages, view)
  if reason is not None:
    raise NotImplementedError(
      f"the GPU kernel cannot serve these pages: {reason}; "
      "implementation='xla' can"
    )
  P = PagedProblem.of(
    q,
    pages,
    view,
    window=window,
    scale=scale,
    softcap=softcap,
    splits=splits,
    interpret=interpret,
  )
  x = _inputs(P, q, pages, view, q_positions, layer)
  like = like_all(x)
  parts = P.splits * WORKERS
  out = {
    "o": output((parts, *x.q.shape), jnp.float32, like),
    "lse": output((parts, *x.q.shape[:2]), jnp.float32, like),
  }
  out = launch(
    functools.partial(paged_body, P),
    (x,),
    out=out,
    scratch=PagedScratch.of(P, x),
    programs=P.programs,
    name="paged_attention",
    interpret=interpret,
  )
  rows = P.G * P.T
  o, lse = _merged(out["o"][:, :, :rows], out["lse"][:, :, :rows])
  return o.astype(q.dtype).reshape(q.shape), lse.reshape(q.shape[:-1])


def _inputs(
  P: PagedProblem,
  q: Array,
  pages: KVPages,
  view: PageView,
  q_positions: Array,
  layer: Any,
) -> Inputs:
  """Queries in whole blocks of rows, and one axis for all pages."""

  def flat(a: Array | None) -> Array | None:
    return None if a is None else a.reshape(-1, *a.shape[3:])

  rows = P.G * P.T
  q = q.reshape(-1, rows, P.H)
  padding = P.blocks * P.rows - rows
  positions = None
  if P.T > 1:
    positions = jnp.tile(q_positions, (1, P.G))
    unused = P.blocks * ROWS - rows
    positions = jnp.pad(positions, ((0, 0), (0, unused)), constant_values=-1)
    positions = positions.reshape(-1, ROWS)
  return Inputs(
    q=jnp.pad(q, ((0, 0), (0, padding), (0, 0))),
    k=flat(pages.k),
    v=flat(pages.v),
    k_scale=flat(pages.k_scale),
    v_scale=flat(pages.v_scale),
    positions=flat(pages.positions),
    log_weights=flat(pages.log_weights),
    table=view.table.reshape(P.B * P.K, -1).astype(jnp.int32),
    ranges=make_ranges(P, pages, view, q_positions, layer),
    q_positions=positions,
  )


def _merged(o: Array, lse: Array) -> tuple[Array, Array]:
  """The result over all keys, from that over each of several parts."""
  top = lse.max(0)
  top = jnp.where(jnp.isfinite(top), top, 0)
  weights = jnp.exp(lse - top[None])
  total = weights.sum(0)
  some = total > 0
  weights = weights / jnp.where(some, total, 1)[None]
  o = (weights[..., None] * o).sum(0)
  return o, jnp.where(some, top + jnp.log(total), -jnp.inf)
