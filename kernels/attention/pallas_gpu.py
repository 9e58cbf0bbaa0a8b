"""Flash attention for Hopper GPUs, in Pallas (Mosaic GPU).

The calling convention is that of `xla.py`: queries `[B,K,G,T,H]`, keys and
values as one layer of a cache `[L,B,K,S,H]`, and a backward pass that adds
into the caller's fp32 `dk` and `dv` in place.

A program has three warpgroups. One fetches: it walks a list of the blocks that
the mask leaves and copies them (TMA) into a ring in shared memory. Two work:
each has 64 rows of its own, multiplies on the tensor cores (wgmma), and hands
the place in the ring back. A list is in two parts. Pairs of blocks in which
everything is visible come first, and no mask is computed in them; the others
follow. A pair without a visible token is on no list and is not loaded.

Forward and `dq`: the two workers take two query heads of one key head and the
same 64 queries, or, if a key head has an odd number of them, 128 queries of
one head. The list is of blocks of keys. `dk` and `dv`: 128 keys, and the list
is of blocks of queries, each for all heads of the group in turn; the sums stay
in registers, so the result does not depend on the order of programs.

What the API cannot do, and what follows:

- `plgpu.kernel` takes no Ref (0.10.2), `pl.kernel` on a `plgpu.Mesh`, which
  it wraps, does. So dk and dv are Refs, and nothing is copied.
- jax 0.12 refuses Refs that vary over a mesh axis: there the backward pass
  does not run inside a checked `shard_map`.
- The interpreter has wgmma only for two operands in shared memory, neither
  transposed, and no `run_state`. With `interpret` the products are therefore
  `dot_general`; all else is what is compiled: `dot`, `accumulate`.
- The interpreter blocks one of XLA's threads for each warpgroup. On two cores
  it hung; with eight forced host devices (`tests/conftest.py`) it runs.

Sources: Shah et al., FlashAttention-3 (arXiv 2407.08608): roles, softmax in
base 2, the workers' turns. Dao, FlashAttention-2 (arXiv 2307.08691): backward.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxchunk.kernels.attention.block_sizes import GpuBlocks
from jaxchunk.kernels.attention.blocks import Grid
from jaxchunk.kernels.attention.hopper.backward import (
  dkv_pass,
  dq_pass,
)
from jaxchunk.kernels.attention.hopper.forward import (
  ForwardScratch,
  forward_body,
)
from jaxchunk.kernels.attention.hopper.problem import (
  KEYS,
  LOG2E,
  ROWS,
  WORKERS,
  Problem,
  choose_blocks,
  make_inputs,
  make_lists,
  query_block,
)
from jaxchunk.kernels.attention.hopper.warps import (
  launch,
  like_all,
)
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.softmax import LOWEST
from jaxchunk.kernels.vma import output


def gpu_forward(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  v: Float[Array, "L B K S H"],
  mask: AttentionMask,
  *,
  layer: Any = 0,
  scale: float,
  softcap: float | None = None,
  blocks: GpuBlocks | None = None,
  interpret: Any = False,
  count_blocks: bool = False,
) -> Any:
  """`xla.flash_forward` on a Hopper GPU.

  Args:
    q: Queries, bf16 or fp16.
    k: Keys of every layer.
    v: Values of every layer.
    mask: Which keys each query sees.
    layer: Which layer of the cache; may be traced.
    scale: Factor on the scores, positive.
    softcap: Scores become `softcap * tanh(score / softcap)`.
    blocks: Block sizes; by default those of the table.
    interpret: `InterpretGPUParams` to run on a CPU.
    count_blocks: Also return how many pairs of blocks were gone through,
      counted in the kernel: of 64 or 128 queries (`GpuBlocks`) and `kv` keys.

  Returns:
    The output in q's dtype and the log-sum-exp in fp32, 0 and -inf for a
    query that sees nothing; with `count_blocks` also an int32.

  Raises:
    NotImplementedError: `unsupported` has a reason.
  """
  P = Problem.of(q, k, mask, scale, softcap, interpret)
  blocks = choose_blocks(P.H, mask, P.S, blocks)
  x = make_inputs(q, k, v, mask, layer)
  grid = Grid(P.T, P.S, query_block(P.G), blocks.kv)
  x = x._replace(lists=make_lists(mask, grid))
  programs = P.B * P.K * P.G * P.T // (ROWS * WORKERS)
  like = like_all(x)
  out = {
    "o": output(x.q.shape, q.dtype, like),
    "lse": output(x.q.shape[:2], jnp.float32, like),
    "done": output((programs,), jnp.int32, like),
  }
  out = launch(
    functools.partial(forward_body, P, blocks),
    (x,),
    out=out,
    scratch=ForwardScratch.of(P, blocks),
    programs=programs,
    name="flash_forward",
    interpret=interpret,
  )
  o, lse = out["o"].reshape(q.shape), out["lse"].reshape(q.shape[:-1])
  return (o, lse, out["done"].sum()) if count_blocks else (o, lse)


def gpu_backward(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  v: Float[Array, "L B K S H"],
  mask: AttentionMask,
  o: Float[Array, "B K G T H"],
  lse: Float[Array, "B K G T"],
  do: Float[Array, "B K G T H"],
  dk: Float[Array, "L B K R H"],
  dv: Float[Array, "L B K R H"],
  *,
  dlse: Float[Array, "B K G T"] | None = None,
  dkv_start: Any = 0,
  dkv_multiple: int = 0,
  layer: Any = 0,
  scale: float,
  softcap: float | None = None,
  blocks: GpuBlocks | None = None,
  interpret: Any = False,
  count_blocks: bool = False,
) -> Any:
  """`xla.flash_backward` on a Hopper GPU, adding into `dk` and `dv`.

  Args:
    q: As given to the forward pass, like k, v, mask, layer, scale, softcap.
    k: Keys of every layer.
    v: Values of every layer.
    mask: Which keys each query sees.
    o: Output of the forward pass.
    lse: Log-sum-exp of the forward pass.
    do: Cotangent of o, in q's dtype.
    dk: Accumulator for the gradient of k, fp32. It may hold a part of the
      keys only: key s is at row `s - dkv_start`. Every block of 128 keys with
      a visible key must lie inside.
    dv: Accumulator for the gradient of v.
    dlse: Cotangent of lse, or `None` for zero.
    dkv_start: The key at row 0 of dk and dv; may be traced, may be negative.
    dkv_multiple: What the rows of dk and dv begin and end at multiples of; 0
      is what they have by themselves.
    layer: Which layer; may be traced.
    scale: Factor on the scores.
    softcap: Cap on the scores.
    blocks: Block sizes; by default those of the table.
    interpret: `InterpretGPUParams` to run on a CPU.
    count_blocks: Also return how many pairs of blocks were gone through: for
      dq, and for dk and dv (blocks of `q_dkv` queries and 128 keys, each for
      all heads of the group).

  Returns:
    dq in q's dtype, and dk and dv with this gradient added, in place where
    the caller's buffers are not used again; with `count_blocks` also an int32
    array of two.

  Raises:
    NotImplementedError: `unsupported` has a reason, or dk or dv is not fp32.
  """
  P = Problem.of(q, k, mask, scale, softcap, interpret)
  if dk.dtype != jnp.float32 or dv.dtype != jnp.float32:
    raise NotImplementedError(
      f"the GPU kernel adds into fp32, not dk {dk.dtype} and dv {dv.dtype}; "
      "implementation='xla' can"
    )
  if dkv_multiple % KEYS:
    raise NotImplementedError(
      f"the GPU kernel adds {KEYS} keys at a time, which do not divide "
      f"{dkv_multiple}, after which another lane may come; "
      "implementation='xla' can"
    )
  blocks = choose_blocks(P.H, mask, P.S, blocks)
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
  if dlse is not None:
    delta = delta - dlse
  # exp2(s - 1e30) = 0 for a query that sees nothing.
  lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, -LOWEST)
  x = make_inputs(q, k, v, mask, layer, dkv_start)
  x = x._replace(
    do=do.astype(q.dtype).reshape(x.q.shape),
    lse=lse.reshape(x.q.shape[:2]),
    delta=delta.reshape(x.q.shape[:2]),
  )
  dq, n_dq = dq_pass(P, blocks, x, mask)
  dk, dv, n_dkv = dkv_pass(P, blocks, x, mask, dk, dv)
  dq = dq.reshape(q.shape)
  if count_blocks:
    return dq, dk, dv, jnp.stack([n_dq, n_dkv])
  return dq, dk, dv
