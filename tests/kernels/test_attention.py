"""One suite over every implementation of attention, against plain NumPy."""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchunk.kernels.attention import api, xla
from jaxchunk.kernels.attention.api import (
  attention,
  grouped,
  merge,
  ungrouped,
)
from jaxchunk.kernels.attention.block_sizes import BlockSizes
from jaxchunk.kernels.attention.blocks import (
  Grid,
  full_blocks,
  live_blocks,
)
from jaxchunk.kernels.attention.mask import AttentionMask

IMPLEMENTATIONS = ("xla", "reference")
SMALL = BlockSizes(q=16, kv=8, q_bwd=8, kv_bwd=16)
every_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


class Outputs(NamedTuple):
  """What the op gives, and its gradient for cotangents of both results."""

  o: Any
  lse: Any
  dq: Any
  dk: Any
  dv: Any


class Inputs(NamedTuple):
  q: Any
  k: Any
  v: Any
  do: Any
  dlse: Any


class Seen(NamedTuple):
  """A mask, told twice: here for NumPy, in `mask` for the op."""

  causal: bool = False
  offset: int | None = None
  window: int | None = None
  ids: tuple[np.ndarray, np.ndarray] | None = None
  length: int | None = None
  sinks: int = 0
  table: tuple[np.ndarray, int, int] | None = None

  def mask(self) -> AttentionMask:
    mask = AttentionMask()
    if self.causal:
      mask &= AttentionMask.causal(self.offset)
    if self.window is not None:
      mask &= AttentionMask.window(self.window, sinks=self.sinks)
    if self.ids is not None:
      mask &= AttentionMask.segments(*(jnp.asarray(i) for i in self.ids))
    if self.length is not None:
      mask &= AttentionMask.valid_keys(self.length)
    if self.table is not None:
      table, q_block, kv_block = self.table
      mask &= AttentionMask.blocks(
        jnp.asarray(table), q_block=q_block, kv_block=kv_block
      )
    return mask

  def is_sink(self, b, s) -> bool:
    ids = np.zeros(s + 1) if self.ids is None else self.ids[1][b, : s + 1]
    start = max(np.flatnonzero(ids != ids[s]), default=-1) + 1
    return s - start < self.sinks

  def pairs(self, B, T, S) -> np.ndarray:
    """`[B,T,S]`, or `[B,K,T,S]` with a table."""
    seen = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(seen.shape):
      p = t + (self.offset or 0)
      seen[b, t, s] = not (
        (self.causal and s > p)
        or (
          self.window is not None
          and abs(p - s) >= self.window
          and not self.is_sink(b, s)
        )
        or (self.length is not None and s >= self.length)
        or (
          self.ids is not None
          and (self.ids[0][b, t] <= 0 or self.ids[0][b, t] != self.ids[1][b, s])
        )
      )
    if self.table is None:
      return seen
    table, q_block, kv_block = self.table
    chosen = np.zeros((*table.shape[:2], T, S), bool)
    for b, k, i, m in np.ndindex(table.shape):
      if (j := table[b, k, i, m]) >= 0:
        rows = slice(i * q_block, (i + 1) * q_block)
        chosen[b, k, rows, j * kv_block : (j + 1) * kv_block] = True
    return seen[:, None] & chosen


def draw(shape, seed=0, dtype="float64"):
  """Inputs of `(B, T, S, N, K, H)`; scores of a standard deviation of 2."""
  B, T, S, N, K, H = shape
  rng = np.random.default_rng(seed)
  shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H), (B, T, N))
  q, *rest = (rng.standard_normal(s) for s in shapes)
  return Inputs(*(jnp.asarray(a, dtype) for a in (2 * q, *rest)))


def truth(inputs, seen, *, scale=None, softcap=None):
  """The op and its gradient in fp64, with every score held."""
  q, k, v, do, dlse = (np.asarray(a, np.float64) for a in inputs)
  H, K, G = q.shape[3], k.shape[2], q.shape[2] // k.shape[2]
  scale = H**-0.5 if scale is None else scale
  k_, v_ = (np.repeat(a, G, axis=2) for a in (k, v))
  s = np.einsum("btnh,bsnh->bnts", q, k_) * scale
  slope = np.ones_like(s)
  if softcap is not None:
    slope = 1 - np.tanh(s / softcap) ** 2
    s = softcap * np.tanh(s / softcap)
  seen = seen[:, None] if seen.ndim == 3 else np.repeat(seen, G, axis=1)
  s = np.where(seen, s, -np.inf)
  top = s.max(-1, keepdims=True)
  e = np.exp(s - np.where(np.isfinite(top), top, 0))
  z = e.sum(-1, keepdims=True)
  p = e / np.where(z > 0, z, 1)
  with np.errstate(divide="ignore"):
    lse = (np.where(np.isfinite(top), top, 0) + np.log(z))[..., 0]
  o = np.einsum("bnts,bsnh->btnh", p, v_)
  dp = np.einsum("btnh,bsnh->bnts", do, v_)
  delta = np.einsum("btnh,btnh->bnt", do, o) - dlse.transpose(0, 2, 1)
  ds = p * (dp - delta[..., None]) * slope * scale
  dk = np.einsum("bnts,btnh->bsnh", ds, q)
  dv = np.einsum("bnts,btnh->bsnh", p, do)
  dk, dv = (a.reshape(*a.shape[:2], K, G, H).sum(3) for a in (dk, dv))
  dq = np.einsum("bnts,bsnh->btnh", ds, k_)
  return Outputs(o, lse.transpose(0, 2, 1), dq, dk, dv)


@functools.partial(jax.jit, static_argnames=("name", "scale", "softcap"))
def public(name, inputs, mask, *, scale=None, softcap=None):
  """Through `attention`, with its own block sizes."""
  q, k, v, do, dlse = inputs

  def op(q, k, v):
    return attention(
      q,
      k,
      v,
      mask=mask,
      scale=scale,
      softcap=softcap,
      implementation=name,
      return_lse=True,
    )

  (o, lse), vjp = jax.vjp(op, q, k, v)
  return Outputs(o, lse, *vjp((do, dlse.astype(lse.dtype))))


@functools.partial(jax.jit, static_argnames=("softcap", "blocks"))
def blockwise(inputs, mask, *, softcap=None, blocks=SMALL):
  """The two passes of xla.py with small blocks."""
  q, k, v, do, dlse = inputs
  options = {"scale": q.shape[-1] ** -0.5, "softcap": softcap, "blocks": blocks}
  K = k.shape[2]
  q, do, dlse = (
    grouped(q, K),
    grouped(do, K),
    grouped(dlse[..., None], K)[..., 0],
  )
  k, v = (a.transpose(0, 2, 1, 3)[None] for a in (k, v))
  o, lse = xla.flash_forward(q, k, v, mask, **options)
  zero = jnp.zeros(k.shape, lse.dtype)
  dq, dk, dv = xla.flash_backward(
    q, k, v, mask, o, lse, do, zero, zero, dlse=dlse, **options
  )
  return Outputs(
    ungrouped(o),
    ungrouped(lse[..., None])[..., 0],
    ungrouped(dq),
    *(a[0].transpose(0, 2, 1, 3) for a in (dk, dv)),
  )


def run(name, inputs, mask, softcap=None):
  """Small blocks where the implementation has blocks."""
  if name == "xla":
    return blockwise(inputs, mask, softcap=softcap)
  return public(name, inputs, mask, softcap=softcap)


def assert_true(got, want, tolerance=1e-12):
  """In fp64, where rounding stays far below 1e-12."""
  for field, g, w in zip(Outputs._fields, got, want, strict=True):
    np.testing.assert_allclose(
      g, w, rtol=0, atol=tolerance * max(1, _top(w)), err_msg=field
    )


def _top(a):
  return np.abs(a, where=np.isfinite(a), out=np.zeros(a.shape)).max()


def sorted_ids(rng, B, T, top=4):
  """Non-decreasing from 1, then padding."""
  ids = np.sort(rng.integers(1, top + 1, (B, T)), axis=1).astype(np.int32)
  ends = rng.integers(T // 2, T + 1, (B, 1))
  return np.where(np.arange(T)[None] < ends, ids, 0)


def random_table(B, K, rows, J, M, seed=5):
  """Distinct blocks in any order, some of them -1."""
  rng = np.random.default_rng(seed)
  table = rng.permuted(np.broadcast_to(np.arange(J), (B, K, rows, J)), axis=-1)
  table = table[..., :M].astype(np.int32)
  return np.where(rng.random(table.shape) < 0.3, -1, table)


def _ids(B, T, S, *, ordered=True):
  rng = np.random.default_rng(7)
  if not ordered:
    return tuple(rng.integers(-1, 3, (B, n)).astype(np.int32) for n in (T, S))
  kv = sorted_ids(rng, B, S)
  return kv[:, S - T :], kv


# (B, T, S, N, K, H), the mask, scale, softcap.
CASES = {
  "one token": ((1, 1, 1, 1, 1, 4), Seen(causal=True), None, None),
  "everything": ((2, 5, 7, 4, 2, 8), Seen(), 0.7, None),
  "causal": ((2, 37, 37, 6, 2, 8), Seen(causal=True), None, None),
  "beyond a block": ((1, 700, 700, 2, 1, 4), Seen(causal=True), None, 5.0),
  "chunk after a prefix": (
    (1, 5, 700, 2, 2, 4),
    Seen(causal=True, offset=695, window=600),
    None,
    None,
  ),
  "one token after a prefix": (
    (2, 1, 33, 4, 1, 4),
    Seen(causal=True, offset=30, length=31),
    None,
    2.0,
  ),
  "window": ((1, 37, 37, 2, 1, 4), Seen(causal=True, window=9), None, None),
  "window both ways": ((1, 37, 41, 2, 1, 4), Seen(window=6), None, None),
  "segments": (
    (2, 37, 37, 4, 2, 4),
    Seen(causal=True, ids=_ids(2, 37, 37)),
    None,
    None,
  ),
  "segments in any order": (
    (2, 21, 37, 4, 2, 4),
    Seen(ids=_ids(2, 21, 37, ordered=False)),
    None,
    3.0,
  ),
  "all conditions": (
    (2, 21, 37, 4, 2, 4),
    Seen(causal=True, offset=16, window=12, ids=_ids(2, 21, 37), length=30),
    None,
    3.0,
  ),
  "window with sinks": (
    (1, 37, 37, 2, 1, 4),
    Seen(causal=True, window=9, sinks=3),
    None,
    None,
  ),
  "window and sinks of each segment": (
    (2, 21, 37, 4, 2, 4),
    Seen(causal=True, offset=16, window=5, sinks=2, ids=_ids(2, 21, 37)),
    None,
    None,
  ),
  "sinks both ways": (
    (1, 30, 41, 2, 1, 4),
    Seen(window=6, sinks=2),
    None,
    None,
  ),
  "block table": (
    (2, 24, 40, 4, 2, 4),
    Seen(table=(random_table(2, 2, 6, 5, 3), 4, 8)),
    None,
    None,
  ),
  "block table of many heads": (
    (1, 16, 2048, 22, 11, 4),
    Seen(
      causal=True, offset=2032, table=(random_table(1, 11, 2, 32, 20), 8, 64)
    ),
    None,
    3.0,
  ),
  "block table and all conditions": (
    (2, 20, 40, 4, 2, 4),
    Seen(
      causal=True,
      offset=20,
      window=12,
      sinks=3,
      ids=_ids(2, 20, 40),
      length=36,
      table=(random_table(2, 2, 5, 5, 4), 4, 8),
    ),
    None,
    3.0,
  ),
  "nothing": ((1, 5, 7, 2, 1, 4), Seen(length=0), None, 3.0),
}


@pytest.mark.fast
@every_implementation
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_true(name, case):
  shape, seen, scale, softcap = CASES[case]
  with jax.enable_x64(True):
    inputs = draw(shape)
    got = public(name, inputs, seen.mask(), scale=scale, softcap=softcap)
    want = truth(inputs, seen.pairs(*shape[:3]), scale=scale, softcap=softcap)
    assert_true(got, want)


@st.composite
def masks(draw, T, S, *, always_sorted=False):
  """Any composition; whatever may be traced is always there, and drawn."""
  rng = np.random.default_rng(draw(st.integers(0, 2**16)))
  offset = draw(st.integers(0, S - T))
  kv = sorted_ids(rng, 2, S, top=draw(st.integers(1, 6)))
  ids = (kv[:, offset : offset + T], kv)
  if not always_sorted and draw(st.booleans()):
    ids = tuple(rng.permuted(a, axis=1) for a in ids)
  return Seen(
    causal=draw(st.booleans()),
    offset=offset,
    window=draw(st.sampled_from([None, 7])),
    sinks=draw(st.sampled_from([0, 2])),
    ids=ids,
    length=draw(st.integers(0, S)),
  )


def traced(seen):
  """The mask with all numbers as arrays, so that drawing one is no retrace."""
  mask = seen.mask() & AttentionMask(
    q_offset=None if seen.causal else seen.offset
  )
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.int32), mask)


@every_implementation
@given(seen=masks(21, 37))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_mask_is_honoured(name, seen):
  with jax.enable_x64(True):
    inputs = draw((2, 21, 37, 4, 2, 4))
    got = run(name, inputs, traced(seen), softcap=4.0)
    want = truth(inputs, seen.pairs(2, 21, 37), softcap=4.0)
    assert_true(got, want)


@given(seen=masks(45, 60))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_live_block_is_missed(seen):
  live, blocks = _live(Grid(45, 60, 8, 7), seen)
  assert not (blocks & ~live).any()


@given(seen=masks(45, 60, always_sorted=True), has_ids=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_dead_block_is_computed(seen, has_ids):
  if has_ids:
    seen = seen._replace(causal=True, length=None)
  else:
    seen = seen._replace(ids=None)
  live, blocks = _live(Grid(45, 60, 8, 7), seen)
  np.testing.assert_array_equal(live, blocks)


@given(
  seen=masks(45, 60),
  sizes=st.sampled_from([(8, 7), (9, 12), (45, 60), (15, 60)]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_block_is_full_if_it_hides_nothing(seen, sizes):
  grid = Grid(45, 60, *sizes)
  full, whole = _full(grid, seen)
  assert not (full & ~whole).any()
  # Without segments it is exact, but for a last block that overlaps.
  full, whole = _full(grid, seen._replace(ids=None))
  rows, columns = grid.T // grid.bq, grid.S // grid.bk
  np.testing.assert_array_equal(full[0], whole[0])
  assert not full[:, rows:].any() and not full[:, :, columns:].any()


def _full(grid, seen):
  """What is called full, and which whole blocks are visible throughout."""
  pairs = seen.pairs(2, grid.T, grid.S)
  rows, columns = grid.T // grid.bq, grid.S // grid.bk
  pairs = pairs[:, : rows * grid.bq, : columns * grid.bk]
  tiles = pairs.reshape(len(pairs), rows, grid.bq, columns, grid.bk)
  pad = ((0, 0), (0, grid.num_q() - rows), (0, grid.num_kv() - columns))
  full = np.asarray(_full_blocks(traced(seen), grid))
  return full, np.pad(tiles.all((2, 4)), pad)


_full_blocks = jax.jit(full_blocks, static_argnums=1)
_live_blocks = jax.jit(live_blocks, static_argnums=1)


def _live(grid, seen):
  """What is computed, and what a visible pair falls into."""
  pairs = seen.pairs(2, grid.T, grid.S).any(0)
  pad = ((0, -grid.T % grid.bq), (0, -grid.S % grid.bk))
  tiles = np.pad(pairs, pad).reshape(grid.num_q(), grid.bq, -1, grid.bk)
  return np.asarray(_live_blocks(traced(seen), grid).any(0)), tiles.any((1, 3))


@functools.cache
def _plain(dtype):
  """Scores, softmax and products all in one dtype, and its own gradient."""

  def op(q, k, v, pairs):
    G = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, G, axis=2) for a in (k, v))
    s = jnp.einsum("BTNH,BSNH->BNTS", q, k) * jnp.asarray(
      q.shape[-1] ** -0.5, dtype
    )
    s = 4 * jnp.tanh(s / 4)
    s = jnp.where(pairs[:, None], s, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    o = jnp.einsum("BNTS,BSNH->BTNH", jnp.exp(s - lse[..., None]), v)
    return o, lse.transpose(0, 2, 1)

  @jax.jit
  def outputs(inputs, pairs):
    (o, lse), vjp = jax.vjp(lambda *x: op(*x, pairs), *inputs[:3])
    return Outputs(o, lse, *vjp((inputs.do, inputs.dlse)))

  return outputs


@every_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_errors_are_at_most_twice_those_of_the_plain_computation(name, dtype):
  shape = (2, 64, 96, 4, 2, 16)
  seen = Seen(causal=True, offset=32, ids=_prefix_ids(64, 96))
  pairs = seen.pairs(*shape[:3])
  inputs = draw(shape, dtype=dtype)
  want = truth(inputs, pairs, softcap=4.0)
  got = run(name, inputs, seen.mask(), softcap=4.0)
  plain = _plain(dtype)(inputs, jnp.asarray(pairs))
  assert got.o.dtype == got.dq.dtype == dtype
  assert got.lse.dtype == jnp.float32
  for field, g, p, w in zip(Outputs._fields, got, plain, want, strict=True):
    # Root mean squares: which of two fp32 sums has the larger single error is
    # luck (0.4 to 2.6 times over seeds; the mean square 0.6 to 1.3 times).
    # That no single element is wrong is seen in fp64, above.
    errors = [np.linalg.norm(np.asarray(a, np.float64) - w) for a in (g, p)]
    assert errors[0] <= 2 * errors[1], (field, errors)


def _prefix_ids(T, S):
  """Two segments, without padding: every query sees itself."""
  kv = np.repeat([[1, 2], [4, 5]], [S // 3, S - S // 3], axis=1)
  return kv[:, S - T :].astype(np.int32), kv.astype(np.int32)


@pytest.mark.fast
@every_implementation
def test_running_twice_gives_the_same_bits(name):
  inputs = draw((2, 37, 37, 4, 2, 8), dtype="float32")
  mask = Seen(causal=True, ids=_ids(2, 37, 37)).mask()
  once, again = run(name, inputs, mask), run(name, inputs, mask)
  for one, two in zip(once, again, strict=True):
    np.testing.assert_array_equal(one, two)


@pytest.mark.fast
@every_implementation
def test_a_query_that_sees_nothing_gives_zero_and_no_nan(name):
  inputs = draw((2, 37, 37, 4, 2, 8), dtype="float32")
  ids = np.ones((2, 37), np.int32)
  ids[0, 20:], ids[1] = 0, 0
  mask = Seen(causal=True, ids=(ids, ids)).mask()
  got = run(name, inputs, mask, softcap=3.0)
  blind = ids == 0
  assert (np.asarray(got.o)[blind] == 0).all()
  assert (np.asarray(got.lse)[blind] == -np.inf).all()
  assert np.isfinite(np.asarray(got.lse)[~blind]).all()
  for grad in got[2:]:
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[blind] == 0).all()


@pytest.mark.fast
@every_implementation
@pytest.mark.parametrize("window", [None, 16])
def test_segments_do_not_touch_each_other(name, window):
  inputs = draw((1, 37, 37, 4, 2, 8), dtype="float32")
  ids = np.repeat([[1, 2, 3, 0]], [10, 12, 11, 4], axis=1).astype(np.int32)
  mask = Seen(causal=True, window=window, ids=(ids, ids)).mask()
  other = draw((1, 37, 37, 4, 2, 8), seed=1, dtype="float32")
  own = jnp.asarray(ids == 2)
  changed = jax.tree.map(
    lambda a, b: jnp.where(
      jnp.expand_dims(own, tuple(range(2, a.ndim))), 100 * b, a
    ),
    inputs,
    other,
  )
  before, after = run(name, inputs, mask), run(name, changed, mask)
  for field, one, two in zip(Outputs._fields, before, after, strict=True):
    one, two = np.asarray(one), np.asarray(two)
    np.testing.assert_array_equal(one[ids != 2], two[ids != 2], field)
    assert (one[ids == 2] != two[ids == 2]).any(), field


@pytest.mark.fast
@pytest.mark.parametrize("window", [None, 9])
def test_the_backward_pass_adds_into_a_part_of_the_callers_buffers(window):
  start, rows, layer = 8, 40, 1
  shape = (2, 13, 53, 4, 2, 4)
  # Keys before `start` are in no visible block of keys: 8 = SMALL.kv_bwd / 2,
  # so the blocks here are of 8 keys.
  blocks = BlockSizes(q=4, kv=8, q_bwd=4, kv_bwd=8)
  kv = np.where(np.arange(53) < 16, 1, 2)[None].repeat(2, 0).astype(np.int32)
  seen = Seen(
    causal=True, offset=30, window=window, ids=(kv[:, 30:43], kv), length=43
  )
  with jax.enable_x64(True):
    inputs = draw(shape)
    want = truth(inputs, seen.pairs(*shape[:3]))
    rng = np.random.default_rng(1)
    q, do = grouped(inputs.q, 2), grouped(inputs.do, 2)
    dlse = grouped(inputs.dlse[..., None], 2)[..., 0]
    fill = rng.standard_normal((3, 2, 2, 53, 4))
    k, v = (
      jnp.asarray(fill).at[layer].set(a.transpose(0, 2, 1, 3))
      for a in (inputs.k, inputs.v)
    )
    buffers = [rng.standard_normal((3, 2, 2, rows, 4)) for _ in range(2)]

    @jax.jit
    def passes(layer, start, dk, dv):
      options = {"scale": 0.5, "blocks": blocks, "layer": layer}
      mask = seen.mask()
      o, lse = xla.flash_forward(q, k, v, mask, **options)
      return xla.flash_backward(
        q,
        k,
        v,
        mask,
        o,
        lse,
        do,
        dk,
        dv,
        dlse=dlse,
        dkv_start=start,
        **options,
      )

    dq, dk, dv = passes(layer, start, *map(jnp.asarray, buffers))
    np.testing.assert_allclose(ungrouped(dq), want.dq, rtol=0, atol=1e-12)
    inside = slice(start, start + rows)
    for got, old, grad in zip((dk, dv), buffers, want[3:], strict=True):
      assert (grad[:, :start] == 0).all()
      expected = old.copy()
      expected[layer] += grad.transpose(0, 2, 1, 3)[:, :, inside]
      np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
      np.testing.assert_array_equal(got[::2], old[::2])


def test_temporaries_do_not_grow_with_the_scores():
  def shapes(T):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    q, kv = array((1, 2, 2, T, 16)), array((1, 1, 2, T, 16))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    mask = jax.eval_shape(AttentionMask.segments, ids)
    return q, kv, kv, AttentionMask.causal() & mask

  def forward(q, k, v, mask):
    return xla.flash_forward(q, k, v, mask, scale=0.25)

  def backward(q, k, v, mask, o, lse, do, dk, dv):
    return xla.flash_backward(q, k, v, mask, o, lse, do, dk, dv, scale=0.25)

  def temporaries(function, *arguments, **options):
    lowered = jax.jit(function, **options).lower(*arguments)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  sizes = []
  for T in (2048, 8192):
    q, k, v, mask = shapes(T)
    o, lse = jax.eval_shape(forward, q, k, v, mask)
    donate = {"donate_argnums": (7, 8)}
    both = (q, k, v, mask, o, lse, q, k, v)
    sizes.append(
      (temporaries(forward, *both[:4]), temporaries(backward, *both, **donate))
    )
  # Three fp32 numbers per query and head, where the scores would take 8192;
  # the lists of blocks are less than one.
  growth = (8192 - 2048) * 4 * 3 * 4
  for small, large in zip(*sizes, strict=True):
    assert large - small <= growth


@pytest.mark.parametrize("blocks", [None, 256], ids=["dense", "sparse"])
def test_a_cache_in_bf16_is_not_copied_as_fp32(blocks):
  array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  q, k = array((1, 1, 1, 512, 16)), array((32, 1, 1, 16384, 16))
  lse = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
  wide = jax.ShapeDtypeStruct(k.shape, jnp.float32)

  def passes(q, k, v, lse, dk, dv, table):
    mask = AttentionMask.causal(8192)
    if blocks is not None:
      mask &= AttentionMask.blocks(table, q_block=blocks, kv_block=blocks)
    o, _ = xla.flash_forward(q, k, v, mask, layer=3, scale=0.25)
    options = {"layer": 3, "scale": 0.25}
    return o, xla.flash_backward(q, k, v, mask, o, lse, q, dk, dv, **options)

  table = jax.ShapeDtypeStruct((1, 1, 512 // (blocks or 512), 4), jnp.int32)
  program = jax.jit(passes, donate_argnums=(4, 5))
  compiled = program.lower(q, k, k, lse, wide, wide, table).compile()
  cache = 2 * k.size * k.dtype.itemsize
  # Instead: a few blocks of scores in fp32, 1 to 4 MB each.
  assert compiled.memory_analysis().temp_size_in_bytes < cache


@every_implementation
def test_sink_logits_take_their_share(name):
  with jax.enable_x64(True):
    inputs = draw((2, 9, 9, 4, 2, 4))
    sinks = jnp.asarray([-1.0, 0.0, 2.0, 30.0])
    mask = AttentionMask.causal() & AttentionMask.valid_keys(5)

    def op(q, k, v, sinks):
      return attention(
        q,
        k,
        v,
        mask=mask,
        sink_logits=sinks,
        implementation=name,
        return_lse=True,
      )

    def plain(q, k, v, sinks):
      k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
      s = jnp.einsum("BTNH,BSNH->BNTS", q, k) / 2
      s = jnp.where(mask.dense(9, 9), s, -jnp.inf)
      last = jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))
      s = jnp.concatenate([s, last], axis=-1)
      p = jax.nn.softmax(s, axis=-1)[..., :-1]
      lse = jax.nn.logsumexp(s, axis=-1).transpose(0, 2, 1)
      return jnp.einsum("BNTS,BSNH->BTNH", p, v), lse

    got, vjp = jax.vjp(op, *inputs[:3], sinks)
    want, plain_vjp = jax.vjp(plain, *inputs[:3], sinks)
    jax.tree.map(
      lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12),
      (got, vjp((inputs.do, inputs.dlse))),
      (want, plain_vjp((inputs.do, inputs.dlse))),
    )


@pytest.mark.fast
@every_implementation
def test_merging_parts_is_attention_to_the_whole(name):
  with jax.enable_x64(True):
    q, k, v, do, dlse = draw((2, 9, 20, 4, 2, 4))
    ids = np.ones((2, 20), np.int32)
    ids[0, :8] = 2
    ids[1] = 0

    def part(keys, q, k, v):
      mask = AttentionMask.segments(
        jnp.ones((2, 9), jnp.int32), jnp.asarray(ids)[:, keys]
      )
      return attention(
        q,
        k[:, keys],
        v[:, keys],
        mask=mask,
        implementation=name,
        return_lse=True,
      )

    def merged(*qkv):
      # The first part of row 0 sees nothing, row 1 nothing in both.
      first, second = (part(s, *qkv) for s in (slice(8), slice(8, 20)))
      return merge(*first, *second)

    got, vjp = jax.vjp(merged, q, k, v)
    want, plain_vjp = jax.vjp(lambda *x: part(slice(20), *x), q, k, v)
    jax.tree.map(
      lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12),
      (got, vjp((do, dlse))),
      (want, plain_vjp((do, dlse))),
    )
    assert (got[0][1] == 0).all()
    assert (got[1][1] == -np.inf).all()


def _arrays(**shapes):
  """q, k and v of the right shape, unless said otherwise."""
  sound = {"q": (2, 3, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8)}
  return [jnp.zeros(shape) for shape in (sound | shapes).values()]


@pytest.mark.fast
@pytest.mark.parametrize(
  "shapes, message",
  [
    ({"k": (5, 2, 8)}, r"k must be \[batch, length, heads, .* \(5, 2, 8\)"),
    ({"v": (2, 6, 2, 8)}, r"k has shape .*5.* and v .*6.*; they must agree"),
    (
      {"k": (1, 5, 2, 8), "v": (1, 5, 2, 8)},
      "q has batch 2 and head width 8, k has batch 1 and head width 8",
    ),
    (
      {"k": (2, 5, 2, 6), "v": (2, 5, 2, 6)},
      "q has batch 2 and head width 8, k has batch 2 and head width 6",
    ),
    (
      {"k": (2, 5, 3, 8), "v": (2, 5, 3, 8)},
      "q has N=4 heads, not a multiple of k's K=3",
    ),
    ({"q": (2, 0, 4, 8)}, r"empty attention: q \(2, 0, 4, 8\), k"),
    (
      {"k": (2, 5, 0, 8), "v": (2, 5, 0, 8)},
      r"empty attention: .*, k \(2, 5, 0, 8\)",
    ),
  ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
  with pytest.raises(ValueError, match=message):
    attention(*_arrays(**shapes))


@pytest.mark.fast
def test_dtypes_that_do_not_fit_are_named():
  q, k, v = _arrays()
  with pytest.raises(ValueError, match=r"one floating dtype, .*, v bfloat16"):
    attention(q, k, v.astype("bfloat16"))
  with pytest.raises(ValueError, match="one floating dtype, got q int32, q in"):
    attention(*(a.astype("int32") for a in (q, k, v)))


@pytest.mark.fast
def test_masks_that_do_not_fit_are_named():
  ids = {n: jnp.ones((2, n), jnp.int32) for n in (3, 4, 5)}
  for mask, message in (
    (AttentionMask.segments(ids[3]), r"kv segment ids .*\(2, 3\).*\(2, 5\)"),
    (AttentionMask.segments(ids[4], ids[5]), r"q seg.*\(2, 4\), .*\(2, 3\)"),
    (AttentionMask(q_segment_ids=ids[3]), "segment ids of only one side"),
    (AttentionMask(kv_segment_ids=ids[5]), "segment ids of only one side"),
  ):
    with pytest.raises(ValueError, match=message):
      attention(*_arrays(), mask=mask)


@pytest.mark.fast
def test_options_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match=r"softcap must be positive, got 0\.0"):
    attention(*_arrays(), softcap=0.0)
  message = (
    r"unknown .* 'cudnn'; there are \['xla', 'pallas_tpu', .*'reference'"
  )
  with pytest.raises(ValueError, match=message):
    attention(*_arrays(), implementation="cudnn")


@pytest.mark.fast
@pytest.mark.parametrize("name, kind", [("tpu", "TPU"), ("gpu", "GPU")])
def test_a_named_kernel_never_falls_back(name, kind):
  with pytest.raises(NotImplementedError, match=f"the {kind} kernel.*'?xla"):
    attention(*_arrays(), implementation=f"pallas_{name}")


@pytest.mark.fast
def test_what_was_picked_is_logged_once(caplog):
  api._log_choice.cache_clear()
  with caplog.at_level(logging.INFO, "jaxchunk"):
    for _ in range(2):
      jax.eval_shape(attention, *_arrays())
    named = functools.partial(attention, implementation="reference")
    jax.eval_shape(named, *_arrays())
  assert caplog.messages == ["attention: running xla"]


@pytest.mark.fast
def test_masks_compose_to_the_stricter():
  ids = jnp.ones((2, 3), jnp.int32)
  mask = AttentionMask.window(8) & AttentionMask.causal(5)
  mask = mask & AttentionMask.window(6) & AttentionMask.segments(ids)
  assert (mask.is_causal, mask.window_size, mask.q_offset) == (True, 6, 5)
  assert mask.kv_segment_ids is ids
  assert (mask & mask) == mask
  with pytest.raises(ValueError, match="both masks set q_offset"):
    mask & AttentionMask.causal(4)


@pytest.mark.fast
def test_masks_refuse_what_cannot_be():
  with pytest.raises(ValueError, match="window size must be at least 1, got 0"):
    AttentionMask.window(0)
  with pytest.raises(ValueError, match=r"kv segment ids must be .* \(3,\)"):
    AttentionMask.segments(jnp.ones((2, 3), int), jnp.ones(3, int))
  message = r"combine masks with &: mask & AttentionMask\.window"
  with pytest.raises(TypeError, match=message):
    AttentionMask.causal().window(8)


@pytest.mark.fast
def test_the_layouts_are_inverse_and_group_neighbouring_heads():
  q = jnp.arange(2 * 3 * 6 * 4).reshape(2, 3, 6, 4)
  np.testing.assert_array_equal(ungrouped(grouped(q, 2)), q)
  np.testing.assert_array_equal(grouped(q, 2)[1, 1, 2, 0], q[1, 0, 5])


@pytest.mark.fast
def test_block_tables_that_do_not_fit_are_named():
  q, k, v = _arrays(q=(2, 8, 4, 8), k=(2, 12, 2, 8), v=(2, 12, 2, 8))

  def run(table, q_block=4, kv_block=4):
    mask = AttentionMask.blocks(
      jnp.asarray(table), q_block=q_block, kv_block=kv_block
    )
    return attention(q, k, v, mask=mask)

  with pytest.raises(ValueError, match=r"integers \[batch, .* float32"):
    run(np.zeros((2, 2, 2, 1), np.float32))
  with pytest.raises(ValueError, match=r"integers \[batch, .* \(2, 2, 1\)"):
    run(np.zeros((2, 2, 1), np.int32))
  with pytest.raises(ValueError, match=r"8 is not a multiple of 3"):
    run(np.zeros((2, 2, 2, 1), np.int32), q_block=3)
  with pytest.raises(ValueError, match=r"12 is not a multiple of 5"):
    run(np.zeros((2, 2, 2, 1), np.int32), kv_block=5)
  with pytest.raises(ValueError, match=r"kv_block must be at least 1, got 0"):
    run(np.zeros((2, 2, 2, 1), np.int32), kv_block=0)
  with pytest.raises(ValueError, match=r"\(2, 1, 2, 1\), not .* \(2, 2, 2,"):
    run(np.zeros((2, 1, 2, 1), np.int32))
  with pytest.raises(ValueError, match=r"names block 3, outside the 3 blocks"):
    run(np.full((2, 2, 2, 1), 3, np.int32))
  with pytest.raises(ValueError, match=r"sinks must be 0 or more, got -1"):
    AttentionMask.window(4, sinks=-1)
  with pytest.raises(ValueError, match=r"one of them with sinks"):
    _ = AttentionMask.window(4, sinks=1) & AttentionMask.window(3)
  with pytest.raises(ValueError, match=r"sink_logits has shape \(2,\)"):
    attention(q, k, v, sink_logits=jnp.zeros(2))
