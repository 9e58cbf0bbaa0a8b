"""Linear attention against NumPy, and what a program of it holds."""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jaxchunk
from jaxchunk.kernels.linear_attention import api
from jaxchunk.kernels.linear_attention.api import (
  LinearMemory,
  linear_attention,
)
from jaxchunk.kernels.linear_attention.weights import Weights, tail_and_carry
from jaxchunk.sharding.mesh import Layout

every_implementation = pytest.mark.parametrize("name", api.IMPLEMENTATIONS)


class Inputs(NamedTuple):
  """What the op takes, and the cotangents of its results."""

  q: Any
  k: Any
  v: Any
  log_decay: Any
  matrix: Any
  do: Any
  dmatrix: Any


class Outputs(NamedTuple):
  """Results and gradients."""

  o: Any
  matrix: Any
  dq: Any
  dk: Any
  dv: Any
  dlog_decay: Any
  dstate: Any


def draw(B=2, T=37, N=4, K=2, H=8, *, dtype="float64", decay="token", seed=0):
  rng = np.random.default_rng(seed)
  log_decay = None
  if decay is not None:
    log_decay = -rng.exponential(0.2, (B, T, K))
    # Some tokens wipe out all before them.
    log_decay[rng.random(log_decay.shape) < 0.05] = -40
    log_decay = -rng.exponential(0.2, K) if decay == "head" else log_decay
  shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
  q, k, v = (rng.standard_normal(s) for s in shapes)
  matrix, dmatrix = rng.standard_normal((2, B, K, H, H))
  do = rng.standard_normal(q.shape)
  wide = jnp.promote_types(dtype, jnp.float32)
  q, k, v, do = (jnp.asarray(a, dtype) for a in (q, k, v, do))
  if log_decay is not None:
    log_decay = jnp.asarray(log_decay, wide)
  matrix, dmatrix = (jnp.asarray(a, wide) for a in (matrix, dmatrix))
  return Inputs(q, k, v, log_decay, matrix, do, dmatrix)


# Two rows of segments: a run in the middle of a chunk, of one token, padding in
# front, between and behind, an id that comes again.
IDS = np.zeros((2, 37), np.int32)
for _row, _a, _b, _n in (
  (0, 0, 5, 7),
  (0, 5, 6, 8),
  (0, 6, 30, 9),
  (1, 3, 20, 1),
  (1, 22, 30, 2),
  (1, 30, 37, 1),
):
  IDS[_row, _a:_b] = _n
BEFORE = np.asarray([7, 1], np.int32)


@functools.partial(jax.jit, static_argnames=("name", "chunk_size"))
def run(name, inputs, ids=None, before=None, *, chunk_size=8):
  before = jnp.ones(len(inputs.q), jnp.int32) if before is None else before

  def op(q, k, v, log_decay, matrix):
    o, end = linear_attention(
      q,
      k,
      v,
      log_decay=log_decay,
      segment_ids=ids,
      state=LinearMemory(matrix, before),
      chunk_size=chunk_size,
      implementation=name,
      return_state=True,
    )
    return o, end.matrix

  results, vjp = jax.vjp(op, *inputs[:5])
  return Outputs(*results, *vjp((inputs.do, inputs.dmatrix)))


def truth(inputs, ids=None, before=None):
  """Token by token in fp64, and backward by the adjoint of each step."""
  q, k, v, log_decay, matrix, do, dmatrix = (
    None if a is None else np.asarray(a, np.float64) for a in inputs
  )
  B, T, N, H = q.shape
  K = k.shape[2]
  ids = np.ones((B, T), np.int32) if ids is None else np.asarray(ids)
  before = np.ones(B) if before is None else np.asarray(before)
  decay = np.zeros((B, T, K)) if log_decay is None else log_decay
  decay = np.exp(np.broadcast_to(decay, (B, T, K)))
  out = Outputs(
    *(np.zeros_like(a) for a in (q, matrix, q, k, v, decay, matrix))
  )
  for b, h in np.ndindex(B, K):
    heads = slice(h * N // K, (h + 1) * N // K)
    memories = [matrix[b, h]]
    kept = np.zeros(T)
    for t in range(T):
      last = ids[b, t - 1] if t else before[b]
      kept[t] = ids[b, t] == last and last > 0
      real = ids[b, t] > 0
      memory = kept[t] * decay[b, t, h] * memories[-1]
      memory = memory + real * np.outer(k[b, t, h], v[b, t, h])
      memories.append(memory)
      out.o[b, t, heads] = real * H**-0.5 * q[b, t, heads] @ memory
    out.matrix[b, h] = memories[-1]
    owed = dmatrix[b, h]
    for t in reversed(range(T)):
      real = ids[b, t] > 0
      d = real * H**-0.5 * do[b, t, heads]
      out.dq[b, t, heads] = d @ memories[t + 1].T
      owed = owed + q[b, t, heads].T @ d
      out.dk[b, t, h] = real * owed @ v[b, t, h]
      out.dv[b, t, h] = real * k[b, t, h] @ owed
      factor = kept[t] * decay[b, t, h]
      out.dlog_decay[b, t, h] = factor * (owed * memories[t]).sum()
      owed = factor * owed
    out.dstate[b, h] = owed
  if log_decay is None:
    return out._replace(dlog_decay=None)
  if log_decay.ndim == 1:
    return out._replace(dlog_decay=out.dlog_decay.sum((0, 1)))
  return out


def assert_true(got, want, tolerance):
  for field, g, w in zip(Outputs._fields, got, want, strict=True):
    if w is None:
      assert g is None
      continue
    error = np.linalg.norm(np.asarray(g, np.float64) - w)
    assert error <= tolerance * np.linalg.norm(w), (field, error)


@pytest.mark.fast
@every_implementation
@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_outputs_and_gradients_are_true(name, decay, packed):
  ids, before = (IDS, BEFORE) if packed else (None, None)
  with jax.enable_x64(True):
    inputs = draw(decay=decay)
    assert_true(
      run(name, inputs, ids, before), truth(inputs, ids, before), 1e-12
    )


@pytest.mark.parametrize("chunk_size", [1, 5, 37, 64])
def test_any_chunk_size(chunk_size):
  with jax.enable_x64(True):
    inputs = draw(N=2)
    got = run("xla", inputs, IDS, BEFORE, chunk_size=chunk_size)
    assert_true(got, truth(inputs, IDS, BEFORE), 1e-12)


@given(
  ids=st.lists(st.integers(0, 3), min_size=12, max_size=12),
  before=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_segments(ids, before):
  ids, before = np.asarray([ids], np.int32), np.asarray([before], np.int32)
  with jax.enable_x64(True):
    inputs = draw(1, 12, 1, 1, 2)
    got = run("xla", inputs, ids, before, chunk_size=5)
    # Where nothing is seen both are 0.
    for g, w in zip(got, truth(inputs, ids, before), strict=True):
      np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)


@pytest.mark.fast
@every_implementation
def test_two_calls_are_one(name):
  with jax.enable_x64(True):
    inputs = draw()
    ids = jnp.asarray(IDS)

    def op(span, state):
      return linear_attention(
        *(a[:, span] for a in inputs[:3]),
        log_decay=inputs.log_decay[:, span],
        segment_ids=ids[:, span],
        state=state,
        chunk_size=8,
        implementation=name,
        return_state=True,
      )

    whole, end = op(slice(None), None)
    first, middle = op(slice(0, 26), None)
    second, last = op(slice(26, None), middle)
    parts = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-12)
    np.testing.assert_allclose(last.matrix, end.matrix, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(last.segment_ids, ids[:, -1])


@functools.cache
def _plain(dtype):
  """Decays, scores and products all in one dtype, and its own gradient."""

  def op(q, k, v, log_decay, matrix):
    G = q.shape[2] // k.shape[2]
    log_decay, matrix = log_decay.astype(dtype), matrix.astype(dtype)
    k, v, log_decay = (jnp.repeat(a, G, axis=2) for a in (k, v, log_decay))
    matrix = jnp.repeat(matrix, G, axis=1)
    T = q.shape[1]
    order = jnp.arange(T)
    after = (order[:, None] > order[None])[None, None]
    log_decay = log_decay.transpose(0, 2, 1)
    spans = jnp.cumsum(jnp.where(after, log_decay[..., None], 0), 2)
    seen = (order[:, None] >= order[None])[None, None]
    weights = jnp.exp(jnp.where(seen, spans, -jnp.inf))
    reach = jnp.exp(jnp.cumsum(log_decay, 2))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * weights
    o = jnp.einsum("BNTS,BSNH->BTNH", scores, v)
    o += jnp.einsum("BTNH,BNHE,BNT->BTNE", q, matrix, reach)
    end = jnp.einsum("BSNH,BSNE,BNS->BNHE", k, v, weights[:, :, -1])
    end += reach[:, :, -1, None, None] * matrix
    return o * jnp.asarray(q.shape[-1] ** -0.5, dtype), end[:, ::G]

  @jax.jit
  def outputs(inputs):
    results, vjp = jax.vjp(op, *inputs[:5])
    return Outputs(*results, *vjp((inputs.do, inputs.dmatrix.astype(dtype))))

  return outputs


@every_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_errors_are_at_most_twice_those_of_the_plain_computation(name, dtype):
  inputs = draw(T=96, N=4, H=16, dtype=dtype)
  got, want = run(name, inputs, chunk_size=32), truth(inputs)
  assert got.o.dtype == got.dq.dtype == dtype
  assert got.matrix.dtype == jnp.float32
  for field, g, p, w in zip(
    Outputs._fields, got, _plain(dtype)(inputs), want, strict=True
  ):
    # Root mean squares, as for attention.
    errors = [np.linalg.norm(np.asarray(a, np.float64) - w) for a in (g, p)]
    assert errors[0] <= 2 * errors[1], (field, errors)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 20.0])
def test_decays_of_any_strength_keep_their_precision(strength):
  """Against fp64: a sum over a chunk does not hide a small difference."""
  rng = np.random.default_rng(0)
  decay = -strength * rng.random((1, 1, 256))
  # A few strong ones among weak ones: differences are small beside the sums.
  decay[..., ::16] *= 16
  runs, before = jnp.zeros((1, 256), jnp.int32), jnp.zeros(1, jnp.int32)
  decay = decay.astype(np.float32)
  sums = np.cumsum(decay[0, 0].astype(np.float64))
  want = np.tril(np.exp(np.minimum(sums[:, None] - sums[None], 0)))
  got = Weights.of(jnp.asarray(decay), runs, before, jnp.float32)
  # exp of x has the error of x, of at least 2^-24 |x|, here of |x| < 16.
  np.testing.assert_allclose(got.inside[0, 0], want, rtol=1e-6, atol=1e-7)
  tail, carry = tail_and_carry(jnp.asarray(decay), runs, before, jnp.float32)
  np.testing.assert_allclose(tail, got.tail, rtol=4e-6, atol=1e-7)
  np.testing.assert_allclose(carry, got.carry, rtol=4e-6, atol=1e-7)


@pytest.mark.fast
@every_implementation
def test_running_twice_gives_the_same_bits(name):
  inputs = draw(dtype="float32")
  for a, b in zip(
    run(name, inputs, IDS, BEFORE), run(name, inputs, IDS, BEFORE), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.fast
@every_implementation
def test_segments_do_not_touch_each_other(name):
  inputs = draw(dtype="float32")
  own = np.zeros(IDS.shape, bool)
  own[0, 6:30] = own[1, 22:30] = True
  at = jnp.asarray(own)[..., None]
  changed = inputs._replace(
    **{
      field: jnp.where(at[..., None], 1e3, getattr(inputs, field))
      for field in ("q", "k", "v", "do")
    },
    log_decay=jnp.where(at, -0.7, inputs.log_decay),
  )
  before = run(name, inputs, IDS, BEFORE)
  after = run(name, changed, IDS, BEFORE)
  for field in ("o", "dq", "dk", "dv", "dlog_decay"):
    a, b = (np.asarray(getattr(x, field)) for x in (before, after))
    np.testing.assert_array_equal(a[~own], b[~own], err_msg=field)
    assert (a[own] != b[own]).any()
  np.testing.assert_array_equal(before.dstate, after.dstate)


@pytest.mark.fast
def test_a_document_that_overflows_does_not_reach_the_next():
  inputs = draw(dtype="float32", decay=None)
  own = jnp.asarray(IDS == 9)[..., None, None]
  huge = inputs._replace(k=jnp.where(own, 1e30, inputs.k))
  huge = huge._replace(v=jnp.where(own, 1e30, huge.v))
  ids = np.where(IDS == 0, 10, IDS)
  o = run("xla", huge, ids, BEFORE).o
  # The third begins at the border of a chunk, so it meets only the memory.
  assert np.isinf(o[0, 29]).any() or np.isnan(o[0, 29]).any()
  np.testing.assert_array_equal(
    o[0, 32:], run("xla", inputs, ids, BEFORE).o[0, 32:]
  )


@pytest.mark.parametrize("decay", [None, "head"])
def test_replicated_keys_inside_shard_map(decay):
  """Queries' heads on several devices, one key head and its decay on all."""
  with jax.enable_x64(True):
    inputs = draw(N=4, K=1, decay=decay)
    ids = jnp.asarray(IDS)

    def loss(q, do, k, v, log_decay):
      o = linear_attention(
        q, k, v, log_decay=log_decay, segment_ids=ids, chunk_size=8
      )
      return jnp.sum(o * do)

    grads = jax.grad(loss, (0, 2, 3) if decay is None else (0, 2, 3, 4))
    heads = P(None, None, "context")
    arguments = (inputs.q, inputs.do, inputs.k, inputs.v, inputs.log_decay)
    got = jax.jit(
      jax.shard_map(
        grads,
        mesh=Layout(context=4).mesh(jax.devices()[:4]),
        in_specs=(heads, heads, P(), P(), P()),
        out_specs=(heads, *[P()] * (2 if decay is None else 3)),
        check_vma=True,
      )
    )(*arguments)
    want = jax.jit(grads)(*arguments)
    for g, w in zip(got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=0, atol=1e-11)


def test_memory_grows_by_a_matrix_a_chunk():
  """Temporaries per token, not counting what goes in and comes out."""
  K, H, C = 2, 64, 64

  def temporaries(T):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    q, ids = array((1, K, 1, T, H)), jax.ShapeDtypeStruct((1, T), jnp.int32)
    k, memory = array((1, K, T, H)), array((1, K, H, H))
    decay = array((1, K, T))

    def both(q, k, v, decay, ids, memory, do):
      def op(*arrays):
        return api._by_chunks(1.0, C, *arrays, ids, memory)[0]

      return jax.vjp(op, q, k, v, decay)[1](do)

    lowered = jax.jit(both).lower(q, k, k, decay, ids, memory, q)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  growth = (temporaries(8192) - temporaries(2048)) / (8192 - 2048)
  # Memories and their cotangents, H*H*4 bytes for C tokens each; one array of
  # tokens is as much here, and decays are far less than another. A memory for
  # each token would be C times the first.
  assert growth <= 4 * K * H * H * 4 / C


def _arrays(**shapes):
  sizes = {"q": (2, 8, 4, 16), "k": (2, 8, 2, 16), "v": (2, 8, 2, 16)}
  return [jnp.ones(s, jnp.float32) for s in (sizes | shapes).values()]


@pytest.mark.fast
@pytest.mark.parametrize(
  "shapes, message",
  [
    ({"q": (2, 8, 4)}, r"q must be \[batch, length, heads, head width\]"),
    ({"v": (2, 8, 2, 8)}, r"k has shape .* and v \(2, 8, 2, 8\)"),
    (
      {"q": (2, 9, 4, 16)},
      r"q has batch 2, length 9 .* k has batch 2, length 8",
    ),
    ({"q": (2, 8, 3, 16)}, "N=3 heads, not a multiple of k's K=2"),
    ({"q": (2, 0, 4, 16)}, "empty attention"),
  ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
  with pytest.raises(ValueError, match=message):
    linear_attention(*_arrays(**shapes))


@pytest.mark.fast
def test_options_that_do_not_fit_are_named():
  q, k, v = _arrays()
  call = functools.partial(linear_attention, q, k, v)
  with pytest.raises(
    ValueError, match="one floating dtype, got q float32, v bf"
  ):
    linear_attention(q, k, v.astype("bfloat16"))
  with pytest.raises(ValueError, match=r"log_decay has shape \(4,\), not"):
    call(log_decay=jnp.zeros(4))
  with pytest.raises(ValueError, match=r"at most 0, got 0\.9; .*give log"):
    call(log_decay=jnp.full(2, 0.9))
  with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 7\)"):
    call(segment_ids=jnp.ones((2, 7), jnp.int32))
  with pytest.raises(ValueError, match=r"state has shapes .* not .*\(2, 2, 16"):
    call(state=LinearMemory(jnp.zeros((2, 4, 16, 16)), jnp.ones(2, jnp.int32)))
  with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
    call(chunk_size=0)
  with pytest.raises(ValueError, match=r"'pallas_tpu'; there are .*'xla'"):
    call(implementation="pallas_tpu")


@pytest.mark.fast
def test_what_was_picked_is_logged_once(caplog):
  api._log_choice.cache_clear()
  with caplog.at_level(logging.INFO, "jaxchunk"):
    for _ in range(2):
      jaxchunk.linear_attention(*_arrays())
  assert [r.message for r in caplog.records] == [
    "linear attention: running xla"
  ]
