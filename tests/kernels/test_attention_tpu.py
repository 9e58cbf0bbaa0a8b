"""The TPU kernels, interpreted on CPU, against plain NumPy; and lowered."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from jaxchunk.kernels.attention import pallas_tpu
from jaxchunk.kernels.attention.api import grouped, ungrouped
from jaxchunk.kernels.attention.block_sizes import TpuBlocks
from jaxchunk.kernels.attention.blocks import Grid, live_blocks
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.tpu.work import unsupported
from tests.kernels.test_attention import (
  Inputs,
  Outputs,
  Seen,
  _ids,
  _plain,
  _prefix_ids,
  draw,
  masks,
  traced,
  truth,
)

SMALL = TpuBlocks(q=16, kv=8, q_bwd=8, kv_bwd=16)


class Result(NamedTuple):
  outputs: Outputs
  forward: Any  # pairs of blocks executed, [B, K]
  backward: Any  # for dq, and for dk and dv, [2, B, K]


@functools.partial(jax.jit, static_argnames=("softcap", "blocks", "interpret"))
def run(inputs, mask, *, softcap=None, blocks=SMALL, interpret=True):
  q, k, v, do, dlse = inputs
  B, _, K, _ = k.shape
  options = {
    "scale": q.shape[-1] ** -0.5,
    "softcap": softcap,
    "blocks": blocks,
    "interpret": interpret,
    "count_blocks": True,
  }
  q, do = grouped(q, K), grouped(do, K)
  dlse = grouped(dlse[..., None], K)[..., 0]
  k, v = (a.transpose(0, 2, 1, 3)[None] for a in (k, v))
  o, lse, forward = pallas_tpu.tpu_forward(q, k, v, mask, **options)
  zero = jnp.zeros(k.shape, jnp.float32)
  dq, dk, dv, backward = pallas_tpu.tpu_backward(
    q, k, v, mask, o, lse, do, zero, zero, dlse=dlse, **options
  )
  outputs = Outputs(
    ungrouped(o),
    ungrouped(lse[..., None])[..., 0],
    ungrouped(dq),
    *(a[0].transpose(0, 2, 1, 3) for a in (dk, dv)),
  )
  return Result(outputs, forward.reshape(B, K), backward.reshape(2, B, K))


def true_by_head(inputs, seen, softcap=None):
  """`truth` for a mask `[B,K,T,S]`."""
  K = inputs.k.shape[2]
  G = inputs.q.shape[2] // K
  parts = []
  for k in range(K):
    own = slice(k * G, (k + 1) * G)
    q, do, dlse = (a[:, :, own] for a in (inputs.q, inputs.do, inputs.dlse))
    k_, v_ = (a[:, :, k : k + 1] for a in (inputs.k, inputs.v))
    parts.append(
      truth(Inputs(q, k_, v_, do, dlse), seen[:, k], softcap=softcap)
    )
  return Outputs(*(np.concatenate(a, 2) for a in zip(*parts, strict=True)))


def assert_near(got, want, tolerance=4e-6):
  """In fp32: some hundred roundings of numbers of the size of the largest."""
  for field, g, w in zip(Outputs._fields, got, want, strict=True):
    top = np.abs(w, where=np.isfinite(w), out=np.zeros(w.shape)).max()
    np.testing.assert_allclose(
      np.asarray(g, np.float64),
      w,
      rtol=0,
      atol=tolerance * max(1, top),
      err_msg=field,
    )


def _table(shape, blocks):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.integers(-1, blocks, shape), jnp.int32)


CAUSAL = AttentionMask.causal
# (B, T, S, N, K, H), the mask, soft-cap.
CASES = {
  "everything": ((2, 32, 48, 4, 2, 16), AttentionMask(), None),
  "one block": ((1, 16, 16, 1, 1, 128), CAUSAL(), 5.0),
  "chunk after a prefix, one key head": (
    (1, 32, 80, 4, 1, 128),
    CAUSAL(48) & AttentionMask.valid_keys(77),
    4.0,
  ),
  "window and sinks in segments": (
    (2, 64, 64, 4, 2, 80),
    CAUSAL()
    & AttentionMask.window(9, sinks=3)
    & AttentionMask.segments(*map(jnp.asarray, _ids(2, 64, 64))),
    None,
  ),
  "sinks without segments": (
    (1, 32, 64, 2, 2, 64),
    CAUSAL(32) & AttentionMask.window(5, sinks=2),
    None,
  ),
  "window both ways": (
    (1, 48, 48, 2, 1, 256),
    AttentionMask.window(6),
    None,
  ),
  "segments in any order": (
    (2, 16, 48, 4, 2, 96),
    AttentionMask.segments(*map(jnp.asarray, _ids(2, 16, 48, ordered=False))),
    3.0,
  ),
  "a table": (
    (2, 64, 64, 4, 2, 16),
    CAUSAL()
    & AttentionMask.blocks(_table((2, 2, 2, 2), 4), q_block=32, kv_block=16),
    None,
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_true(case):
  shape, mask, softcap = CASES[case]
  B, T, S, _, K, _ = shape
  inputs = draw(shape, dtype="float32")
  seen = np.broadcast_to(mask.dense(T, S), (B, K, T, S))
  got = run(inputs, mask, softcap=softcap).outputs
  assert_near(got, true_by_head(inputs, seen, softcap))


@given(seen=masks(16, 32))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_mask_is_honoured_and_only_live_blocks_are_executed(seen):
  inputs = draw((2, 16, 32, 4, 2, 8), dtype="float32")
  mask = traced(seen)
  got = run(inputs, mask, softcap=4.0, blocks=TpuBlocks(8, 8, 8, 4))
  want = truth(inputs, seen.pairs(2, 16, 32), softcap=4.0)
  assert_near(got.outputs, want)
  for counts, bk in ((got.forward, 8), (got.backward, 4)):
    live = live_blocks(mask, Grid(16, 32, 8, bk)).sum((1, 2))
    np.testing.assert_array_equal(
      counts, np.broadcast_to(live[:, None], counts.shape)
    )


def test_blocks_above_the_diagonal_are_not_executed():
  got = run(draw((2, 64, 64, 2, 1, 8), dtype="float32"), CAUSAL())
  # Blocks of (16, 8), and of (8, 16) in the backward pass.
  assert (np.asarray(got.forward) == 2 + 4 + 6 + 8).all()
  assert (np.asarray(got.backward) == 1 + 1 + 2 + 2 + 3 + 3 + 4 + 4).all()


def test_blocks_outside_a_table_are_not_executed():
  shape, mask, _ = CASES["a table"]
  got = run(draw(shape, dtype="float32"), mask, blocks=TpuBlocks())
  live = (
    mask.table_blocks(64) & live_blocks(mask, Grid(64, 64, 32, 16))[:, None]
  )
  want = np.asarray(live.sum((2, 3)))
  assert len(np.unique(want)) > 1
  np.testing.assert_array_equal(got.forward, want)
  np.testing.assert_array_equal(got.backward, np.stack([want, want]))


@pytest.mark.parametrize("H", [16, 128])
def test_errors_are_at_most_twice_those_of_the_plain_computation(H):
  shape = (2, 64, 96, 4, 2, H)
  seen = Seen(causal=True, offset=32, ids=_prefix_ids(64, 96))
  pairs = seen.pairs(*shape[:3])
  inputs = draw(shape, dtype="bfloat16")
  want = truth(inputs, pairs, softcap=4.0)
  got = run(inputs, seen.mask(), softcap=4.0).outputs
  plain = _plain("bfloat16")(inputs, jnp.asarray(pairs))
  assert got.o.dtype == got.dq.dtype == jnp.bfloat16
  for field, g, p, w in zip(Outputs._fields, got, plain, want, strict=True):
    errors = [np.linalg.norm(np.asarray(a, np.float64) - w) for a in (g, p)]
    assert errors[0] <= 2 * errors[1], (field, errors)


@pytest.mark.parametrize("H, dtype", [(16, "float32"), (128, "bfloat16")])
def test_the_backward_pass_adds_into_a_part_of_the_callers_buffers(H, dtype):
  layers, layer, start, rows = 3, 1, 16, 48
  shape = (2, 16, 80, 4, 2, H)
  ids = np.where(np.arange(80) < 16, 1, 2)[None].repeat(2, 0).astype(np.int32)
  seen = Seen(causal=True, offset=32, ids=(ids[:, 32:48], ids))
  inputs = draw(shape, dtype="float32")
  want = truth(inputs._replace(dlse=0 * inputs.dlse), seen.pairs(*shape[:3]))
  q, do = grouped(inputs.q, 2), grouped(inputs.do, 2)
  rng = np.random.default_rng(1)

  def among_others(a):
    fill = rng.standard_normal((layers, 2, 2, 80, H)).astype(np.float32)
    return jnp.asarray(fill).at[layer].set(a.transpose(0, 2, 1, 3))

  k, v = among_others(inputs.k), among_others(inputs.v)
  buffers = [
    jnp.asarray(rng.standard_normal((layers, 2, 2, rows, H)), dtype)
    for _ in range(2)
  ]

  @functools.partial(jax.jit, static_argnames="multiple")
  def passes(layer, start, offset, dk, dv, multiple=0):
    options = {"scale": H**-0.5, "blocks": SMALL, "layer": layer}
    options["interpret"] = True
    mask = seen._replace(offset=offset).mask()
    o, lse = pallas_tpu.tpu_forward(q, k, v, mask, **options)
    return pallas_tpu.tpu_backward(
      *(q, k, v, mask, o, lse, do, dk, dv),
      dkv_start=start,
      dkv_multiple=multiple,
      **options,
    )

  dq, *grads = passes(layer, start, 32, *buffers)
  np.testing.assert_allclose(ungrouped(dq), want.dq, rtol=0, atol=2e-5)
  for got, old, grad in zip(grads, buffers, want[3:], strict=True):
    assert got.dtype == old.dtype
    got, old = (np.asarray(a, np.float64) for a in (got, old))
    expected = (
      old[layer] + grad.transpose(0, 2, 1, 3)[:, :, start:][:, :, :rows]
    )
    atol = 2e-5 if dtype == "float32" else 2**-8 * np.abs(expected).max()
    np.testing.assert_allclose(got[layer], expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(got[::2], old[::2])
    # Keys that no query sees keep their bits: blocks of 16 from key 48 on.
    np.testing.assert_array_equal(got[layer, :, :, 32:], old[layer, :, :, 32:])
  # A start that no block has is not rounded to one in silence.
  assert all(np.isnan(a).any() for a in passes(layer, start - 8, 32, *buffers))
  # Blocks are smaller where starts are multiples of less.
  dq, *moved = passes(layer, start - 8, 32, *buffers, multiple=8)
  np.testing.assert_allclose(ungrouped(dq), want.dq, rtol=0, atol=2e-5)
  for got, other, old in zip(moved, grads, buffers, strict=True):
    got, other = (np.asarray(a - old, np.float64)[layer] for a in (got, other))
    atol = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(got[:, :, 8:40], other[:, :, :32], atol=atol)


def test_a_query_that_sees_nothing_gives_zero_and_no_nan():
  inputs = draw((2, 32, 32, 4, 2, 8), dtype="float32")
  ids = np.ones((2, 32), np.int32)
  ids[0, 20:], ids[1] = 0, 0
  got = run(inputs, Seen(causal=True, ids=(ids, ids)).mask(), softcap=3.0)
  blind, outputs = ids == 0, got.outputs
  assert (np.asarray(outputs.o)[blind] == 0).all()
  assert (np.asarray(outputs.lse)[blind] == -np.inf).all()
  assert np.isfinite(np.asarray(outputs.lse)[~blind]).all()
  for grad in outputs[2:]:
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[blind] == 0).all()
  assert (np.asarray(got.forward)[1] == 0).all()


def test_running_twice_gives_the_same_bits():
  inputs = draw((1, 32, 32, 4, 2, 16), dtype="float32")
  once, again = run(inputs, CAUSAL()), run(inputs, CAUSAL())
  for one, two in zip(once.outputs, again.outputs, strict=True):
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("H", [16, 128])
def test_no_races_on_two_cores(H, capfd):
  shape = (2, 16, 16, 2, 2, H)
  inputs = draw(shape, dtype="float32")
  ids = jnp.asarray(np.repeat([[1, 2], [3, 3]], 8, axis=1), jnp.int32)
  mask = CAUSAL() & AttentionMask.segments(ids)
  params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  blocks = TpuBlocks(8, 8, 8, 8)
  got = run(inputs, mask, blocks=blocks, interpret=params)
  jax.block_until_ready(got)
  # The interpreter reports a race by printing it.
  assert "RACE" not in "".join(capfd.readouterr())
  want = run(inputs, mask, blocks=blocks)
  for one, two in zip(got.outputs, want.outputs, strict=True):
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(got.backward, want.backward)


def test_it_runs_in_shard_map():
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  inputs = draw((2, 128, 256, 4, 2, 64), dtype="float32")
  ids = np.repeat([[1, 2], [1, 1]], 128, axis=1).astype(np.int32)
  mask = CAUSAL(128) & AttentionMask.segments(ids[:, 128:], ids)
  mask = jax.tree.map(jnp.asarray, mask)
  specs = jax.tree.map(lambda a: P("d") if a.ndim else P(), (inputs, mask))

  def split(interpret, check_vma):
    return jax.jit(
      jax.shard_map(
        lambda *a: run(*a, blocks=None, interpret=interpret).outputs,
        mesh=mesh,
        in_specs=specs,
        out_specs=P("d"),
        check_vma=check_vma,
      )
    )

  lowered = split(False, True).trace(inputs, mask)
  text = lowered.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 3
  # The interpreter itself (jax 0.10.2) does not pass the check.
  got = split(True, False)(inputs, mask)
  want = run(inputs, mask, blocks=None).outputs
  for one, two in zip(got, want, strict=True):
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


def test_it_runs_with_64_bit_integers():
  with jax.enable_x64(True):
    shape, seen = (1, 16, 32, 2, 2, 16), Seen(causal=True, offset=16, window=7)
    inputs = draw(shape, dtype="float32")
    got = run(inputs, seen.mask()).outputs
    assert_near(got, truth(inputs, seen.pairs(*shape[:3])))


def _shapes(H, dtype=jnp.bfloat16, G=2, T=256, S=1024):
  array = jax.ShapeDtypeStruct
  q, kv = array((1, 2, G, T, H), dtype), array((2, 1, 2, S, H), dtype)
  lse, grad = array((1, 2, G, T), jnp.float32), array(kv.shape, jnp.float32)
  number = array((), jnp.int32)
  ids = array((1, T), jnp.int32), array((1, S), jnp.int32)
  return (q, kv, kv, q, lse, q, grad, grad), (number, number, ids)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("H", [64, 80, 96, 128, 256])
def test_it_lowers_for_tpu(H, dtype):
  def both(arrays, numbers):
    q, k, v, *saved = arrays
    offset, layer, ids = numbers
    mask = CAUSAL(offset) & AttentionMask.segments(*ids)
    mask &= AttentionMask.window(300, sinks=4)
    options = {"layer": layer, "scale": 0.1, "softcap": 30.0}
    return (
      pallas_tpu.tpu_forward(q, k, v, mask, **options),
      pallas_tpu.tpu_backward(q, k, v, mask, *saved, **options),
    )

  traced = jax.jit(both).trace(*_shapes(H, dtype))
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 3


def test_a_table_lowers_for_tpu():
  def forward(q, k, v, table):
    mask = CAUSAL() & AttentionMask.blocks(table, q_block=128, kv_block=256)
    return pallas_tpu.tpu_forward(q, k, v, mask, scale=0.1)

  table = jax.ShapeDtypeStruct((1, 2, 2, 3), jnp.int32)
  traced = jax.jit(forward).trace(*_shapes(128)[0][:3], table)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 1


@pytest.mark.fast
@pytest.mark.parametrize(
  "shapes, options, message",
  [
    ({}, {}, None),
    ({"dtype": jnp.float16}, {}, "the dtype is float16, not float32 or bf"),
    ({"H": 72}, {}, r"the head width H=72 is none of \(64, 80, 96, 128, 256\)"),
    (
      {"G": 64},
      {},
      "G=64 query heads of H=128 .* 16384 bytes a token, at most",
    ),
    ({"T": 200}, {}, "T=200 is not a multiple of 128"),
    ({"S": 1000}, {}, "S=1000 is not a multiple of 128"),
    ({"rows": 200}, {}, "the rows of dk=200 is not a multiple of 128"),
    ({}, {"dkv_start": 256}, "dkv_start=256 is not a multiple of kv_bwd=512"),
    ({"rows": 768}, {"dkv_start": -256}, None),
    (
      {"T": 2**19, "S": 2**19},
      {},
      "are up to 524288 pairs of blocks of 1024 and 512, more than the 196608",
    ),
    ({"T": 2**19, "S": 2**19, "window": 2**14}, {}, None),
    ({"q_block": 64}, {}, "q_block=64 is not a multiple of 128"),
    ({"q_block": 128}, {}, None),
  ],
)
def test_what_is_not_supported_is_named(shapes, options, message):
  array = jax.ShapeDtypeStruct
  of = {"T": 256, "S": 1024, "H": 128, "G": 2, "dtype": jnp.bfloat16} | shapes
  q = array((1, 2, of["G"], of["T"], of["H"]), of["dtype"])
  k = array((2, 1, 2, of["S"], of["H"]), of["dtype"])
  mask = AttentionMask()
  if "window" in of:
    mask = CAUSAL() & AttentionMask.window(of["window"])
  if "q_block" in of:
    table = jnp.zeros((1, 2, of["T"] // of["q_block"], 2), jnp.int32)
    mask = AttentionMask.blocks(table, q_block=of["q_block"], kv_block=128)
  if "rows" in of:
    options["dk"] = array((2, 1, 2, of["rows"], of["H"]), jnp.float32)
  reason = unsupported(q, k, mask, **options)
  if message is None:
    assert reason is None
  else:
    assert re.search(message, reason)
    with pytest.raises(NotImplementedError, match=message):
      jax.eval_shape(
        lambda q, k: pallas_tpu.tpu_backward(
          *(q, k, k, mask, q, q[..., 0], q, *[options.get("dk", k)] * 2),
          scale=1.0,
          dkv_start=options.get("dkv_start", 0),
        ),
        q,
        k,
      )
