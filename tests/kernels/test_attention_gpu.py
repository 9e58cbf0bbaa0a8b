"""The GPU kernels: interpreted on the CPU, and lowered for CUDA.

The interpreter runs the three warpgroups as threads, with copies, barriers and
races; products stand in for wgmma (kernels/attention/pallas_gpu.py). What the
compiler for a Hopper says is in tests/aot/test_attention_gpu.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxchunk.kernels.attention import xla
from jaxchunk.kernels.attention.api import grouped, ungrouped
from jaxchunk.kernels.attention.block_sizes import BlockSizes, GpuBlocks
from jaxchunk.kernels.attention.hopper.problem import unsupported
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.pallas_gpu import (
  gpu_backward,
  gpu_forward,
)
from tests.kernels.test_attention import (
  Outputs,
  Seen,
  draw,
  sorted_ids,
  truth,
)

try:
  from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # private before jax 0.11
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

INTERPRET = InterpretGPUParams(detect_races=True)
LAYER = 1


class Case(NamedTuple):
  """Shape `(B, T, S, N, K, H)`, mask, and which keys the buffers hold."""

  shape: tuple[int, ...]
  seen: Seen
  softcap: float | None = None
  dtype: str = "bfloat16"
  first: int = 0
  rows: int | None = None
  # Pairs of blocks: forward, dq, and dk with dv.
  pairs: tuple[int, int, int] | None = None


def _segments(B, T, S, offset):
  kv = sorted_ids(np.random.default_rng(3), B, S, top=3)
  return kv[:, offset : offset + T], kv


TABLE = np.array([[[[0, 2], [3, 1]]]], np.int32)
CASES = {
  # Two heads side by side; the third block of keys is dead.
  "prefix": Case(
    (1, 64, 384, 2, 1, 64), Seen(causal=True, offset=150), pairs=(2, 2, 2)
  ),
  # One head and 128 queries; everything at once; two lanes.
  "all conditions": Case(
    (2, 128, 256, 1, 1, 64),
    Seen(
      causal=True,
      offset=100,
      window=70,
      sinks=3,
      ids=_segments(2, 128, 256, 100),
      length=220,
    ),
    softcap=3.0,
  ),
  # The buffers hold the last 128 keys; the window hides the others.
  "window of a chunk": Case(
    (1, 64, 256, 4, 2, 64),
    Seen(causal=True, offset=190, window=60),
    first=128,
    rows=128,
    pairs=(2, 2, 2),
  ),
  "no mask": Case(
    (1, 64, 256, 2, 1, 128), Seen(), dtype="float16", pairs=(2, 4, 2)
  ),
  # Too wide for dk and dv to be summed at once.
  "wide heads": Case(
    (1, 64, 128, 2, 1, 256), Seen(causal=True, offset=60), pairs=(2, 2, 1)
  ),
  "nothing": Case(
    (1, 64, 128, 2, 1, 64), Seen(length=0), softcap=3.0, pairs=(0, 0, 0)
  ),
  # Workers of a program have different rows of the table.
  "block table": Case(
    (1, 128, 256, 1, 1, 64),
    Seen(causal=True, offset=128, table=(TABLE, 64, 64)),
    pairs=(4, 4, 4),
  ),
}


def _passes(forward, backward, case, options):
  """Both passes, from a cache of two layers into buffers of two layers."""

  @jax.jit
  def passes(inputs, mask, layer, first, dk, dv):
    q, k, v, do, dlse = inputs
    K = k.shape[2]
    shared = {"layer": layer, "scale": q.shape[-1] ** -0.5, **options}
    shared["softcap"] = case.softcap
    q, do = grouped(q, K), grouped(do, K)
    dlse = grouped(dlse[..., None].astype(jnp.float32), K)[..., 0]
    # The other layer, and keys that no query sees, must not be looked at.
    caches = []
    for a in (k, v):
      a = a.transpose(0, 2, 1, 3)
      caches.append(jnp.stack([jnp.full_like(a, jnp.nan), a]))
    o, lse, *n = forward(q, *caches, mask, **shared)
    dq, dk, dv, *n_bwd = backward(
      *(q, *caches, mask, o, lse, do, dk, dv),
      dlse=dlse,
      dkv_start=first,
      **shared,
    )
    o, dq = ungrouped(o), ungrouped(dq)
    lse = ungrouped(lse[..., None])[..., 0]
    return Outputs(o, lse, dq, dk, dv), (*n, *n_bwd)

  return passes


def _run(case, inputs, forward, backward, **options):
  B, _, S, _, K, H = case.shape
  shape = (2, B, K, case.rows or S, H)
  rng = np.random.default_rng(1)
  old = [jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for _ in "kv"]
  mask = jax.tree.map(jnp.asarray, case.seen.mask())
  passes = _passes(forward, backward, case, options)
  got, counts = passes(inputs, mask, LAYER, case.first, *old)
  sums = []
  for new, before in zip(got[3:], old, strict=True):
    np.testing.assert_array_equal(new[1 - LAYER], before[1 - LAYER])
    sums.append((new - before)[LAYER].transpose(0, 2, 1, 3))
  return got._replace(dk=sums[0], dv=sums[1]), counts


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_err_at_most_twice_as_much_as_xla(name):
  case = CASES[name]
  inputs = draw(case.shape, dtype=case.dtype)
  pairs = case.seen.pairs(*case.shape[:3])
  want = truth(inputs, pairs, softcap=case.softcap)
  keys = slice(case.first, case.first + (case.rows or case.shape[2]))
  for grad in (want.dk, want.dv):
    assert np.count_nonzero(grad) == np.count_nonzero(grad[:, keys])
  want = want._replace(dk=want.dk[:, keys], dv=want.dv[:, keys])
  peer, _ = _run(
    case,
    inputs,
    xla.flash_forward,
    xla.flash_backward,
    blocks=BlockSizes(q=64, kv=64, q_bwd=64, kv_bwd=64),
  )
  dead = ~pairs.reshape(-1, case.shape[2] // 128, 128).any((0, 2))
  dead = np.repeat(dead, 128)[None, :, None, None]
  hidden = [jnp.where(dead, jnp.nan, a) for a in (inputs.k, inputs.v)]
  inputs = inputs._replace(k=hidden[0], v=hidden[1])
  got, counts = _run(
    case,
    inputs,
    gpu_forward,
    gpu_backward,
    interpret=INTERPRET,
    count_blocks=True,
  )
  assert not get_races().races_found
  assert got.o.dtype == got.dq.dtype == case.dtype
  for field, g, p, w in zip(Outputs._fields, got, peer, want, strict=True):
    g, p = (np.asarray(a, np.float64) for a in (g, p))
    finite = np.isfinite(w)
    np.testing.assert_array_equal(np.isfinite(g), finite, field)
    errors = [np.linalg.norm(a[finite] - w[finite]) for a in (g, p)]
    # The lse goes to base 2 and back: one more rounding in fp32. Sums of the
    # buffers are rounded there, the same for both.
    slack = 2**-23 * np.linalg.norm(w[finite]) if field == "lse" else 0
    assert errors[0] <= 2 * errors[1] + slack, (field, errors)
  if case.pairs is not None:
    assert (int(counts[0]), *map(int, counts[1])) == case.pairs


def _shapes(shape, dtype=jnp.bfloat16):
  B, T, S, N, K, H = shape
  q = jax.ShapeDtypeStruct((B, K, N // K, T, H), dtype)
  return q, jax.ShapeDtypeStruct((2, B, K, S, H), dtype)


def _lower(function, *shapes):
  return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


@pytest.mark.fast
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_kernels_lower_for_cuda(width):
  q, k = _shapes((1, 256, 512, 4, 2, width))
  ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  sums = jax.ShapeDtypeStruct(k.shape, jnp.float32)

  def passes(q, k, v, ids, number, dk, dv):
    mask = AttentionMask.causal(number) & AttentionMask.window(90, sinks=2)
    mask &= AttentionMask.segments(ids[:, :256], ids)
    options = {"layer": number, "scale": 0.1, "softcap": 5.0}
    o, lse = gpu_forward(q, k, v, mask, **options)
    return gpu_backward(q, k, v, mask, o, lse, q, dk, dv, **options)

  text = _lower(passes, q, k, k, ids, number, sums, sums).as_text()
  # Forward, dq, and dk with dv, which wide heads do one after the other.
  assert text.count("mosaic_gpu_v2") == (4 if width > 128 else 3)


# Not in the part for the newest jax: 0.12 refuses Refs that vary.
def test_outputs_vary_over_the_mesh_axes_of_the_inputs():
  mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
  q, k = _shapes((2, 64, 128, 2, 1, 64))
  sums = jax.ShapeDtypeStruct(k.shape, jnp.float32)
  by_q, by_k = PartitionSpec("d"), PartitionSpec(None, "d")

  def passes(q, k, v, dk, dv):
    mask = AttentionMask.causal(64)
    o, lse = gpu_forward(q, k, v, mask, scale=0.1)
    return gpu_backward(q, k, v, mask, o, lse, q, dk, dv, scale=0.1)

  sharded = jax.shard_map(
    passes,
    mesh=mesh,
    in_specs=(by_q, by_k, by_k, by_k, by_k),
    out_specs=(by_q, by_k, by_k),
  )
  dq, dk, dv = jax.eval_shape(sharded, q, k, k, sums, sums)
  assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


@pytest.mark.fast
@pytest.mark.parametrize(
  "shape, options, message",
  [
    ((1, 64, 128, 2, 1, 64), {"dtype": "float32"}, "q has dtype float32, not"),
    ((1, 64, 128, 2, 1, 72), {}, r"head width is 72, not one of \[64, 80"),
    ((1, 96, 128, 2, 1, 64), {}, "T=96 queries, not a multiple of 64"),
    ((1, 64, 128, 3, 1, 64), {}, "T=64 queries, not a multiple of 128"),
    ((1, 64, 192, 2, 1, 64), {}, "S=192 keys, not a multiple of 128"),
    ((1, 64, 128, 2, 1, 64), {"scale": -1.0}, r"scale is -1\.0, not positive"),
    ((1, 64, 128, 2, 1, 64), {"q_block": 32}, "q_block=32, not a multiple"),
    ((1, 64, 128, 2, 1, 64), {"kv_block": 16}, "kv_block=16, not a multiple"),
  ],
)
def test_what_cannot_be_served_is_named(shape, options, message):
  mask = AttentionMask()
  if "q_block" in options or "kv_block" in options:
    sizes = {n: options.pop(n, 64) for n in ("q_block", "kv_block")}
    shape_of_table = (1, 1, shape[1] // sizes["q_block"], 1)
    mask = AttentionMask.blocks(jnp.zeros(shape_of_table, int), **sizes)
  q, k = _shapes(shape, jnp.dtype(options.pop("dtype", "bfloat16")))
  scale = options.pop("scale", 1.0)
  with pytest.raises(NotImplementedError, match=f"{message}.*'xla' can"):
    jax.eval_shape(
      functools.partial(gpu_forward, mask=mask, scale=scale), q, k, k
    )


@pytest.mark.fast
def test_what_can_be_served_has_no_reason():
  for H in (64, 80, 96, 128, 256):
    for N in (2, 3):
      q, k = _shapes((1, 256, 512, N, 1, H))
      assert unsupported(q, k, AttentionMask.causal()) is None


@pytest.mark.fast
def test_blocks_of_keys_shrink_to_those_of_the_table():
  table = jnp.zeros((1, 1, 2, 1), int)
  mask = AttentionMask.blocks(table, q_block=64, kv_block=64)
  fitted = GpuBlocks(kv=128, kv_dq=128).fit(mask, 512)
  assert (fitted.kv, fitted.kv_dq) == (64, 64)
