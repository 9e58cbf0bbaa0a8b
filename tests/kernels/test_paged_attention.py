"""One suite over every implementation of paged attention, against NumPy."""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import jaxchunk
from jaxchunk.kernels.attention.api import grouped, merge, ungrouped
from jaxchunk.kernels.paged_attention import api, pallas_tpu, reference, xla
from jaxchunk.kernels.paged_attention.api import paged_attention
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView


class Backend(NamedTuple):
  """An implementation, with steps so small that every case takes several.

  Attributes:
    forward: In the layout of the library.
    unsupported: Of q, pages and view: why it cannot, or `None`.
    checked: Whether it runs inside `shard_map(check_vma=True)`; the
      interpreter of kernels (jax 0.10.2) does not.
  """

  forward: Callable[..., Any]
  unsupported: Callable[..., str | None] = lambda *_: None
  checked: bool = True


BACKENDS = {
  "reference": Backend(reference.paged_reference),
  "xla": Backend(
    functools.partial(
      xla.paged_forward, sizes=xla.StepSizes(rows=2, keys=8, queries=8)
    )
  ),
  "pallas_tpu": Backend(
    functools.partial(
      pallas_tpu.tpu_paged_forward,
      sizes=pallas_tpu.TpuSteps(keys=8, queries=8),
      interpret=True,
    ),
    checked=False,
  ),
}
every_backend = pytest.mark.parametrize("name", BACKENDS)


class Problem(NamedTuple):
  """What the op takes."""

  q: Any
  pages: KVPages
  view: PageView
  q_positions: Any


def draw(
  lengths,
  *,
  T=1,
  N=4,
  K=2,
  H=16,
  Z=4,
  M=None,
  layers=2,
  dtype="float32",
  pages=None,
  positions=False,
  log_weights=False,
  seed=0,
) -> Problem:
  """Rows of the lengths `[B,K]`, in pages of no order.

  What belongs to nobody is NaN, and a number beyond all pages in the table.
  The last T positions of a sequence are queried; some queries are absent.
  """
  rng = np.random.default_rng(seed)
  lengths = np.asarray(lengths, np.int32)
  B = len(lengths)
  lengths = np.broadcast_to(lengths.reshape(B, -1), (B, K))
  need = -(-lengths // Z)
  M = M or max(1, need.max())
  P = max(1, need.sum(0).max()) + 2
  table = rng.choice([-5, 10**6], size=(B, K, M)).astype(np.int32)
  owned = np.zeros((K, P, Z), bool)
  for k in range(K):
    free = list(rng.permutation(P))
    for b in range(B):
      for m in range(need[b, k]):
        table[b, k, m] = page = free.pop()
        owned[k, page, : max(0, lengths[b, k] - m * Z)] = True
  top = lengths.max(1)
  at = rng.integers(0, max(1, top.max()), (layers, K, P, Z))
  weights = rng.standard_normal((layers, K, P, Z))
  weights[rng.random(weights.shape) < 0.2] = -np.inf
  k, v = _contents(rng, (layers, K, P, Z, H), pages or dtype, owned)
  hole = owned & ~np.isneginf(weights) if log_weights else owned
  scales = rng.uniform(0.02, 0.05, (2, layers, K, P, Z))
  fields = {
    "k_scale": scales[0] if pages else None,
    "v_scale": scales[1] if pages else None,
    "log_weights": weights if log_weights else None,
  }
  cache = KVPages(
    *(
      jnp.asarray(np.where(hole[..., None], a, _garbage(a.dtype)))
      for a in (k, v)
    ),
    **{
      name: None if a is None else jnp.asarray(_nan(a, owned), jnp.float32)
      for name, a in fields.items()
    },
    positions=jnp.asarray(at, jnp.int32) if positions else None,
  )
  q = jnp.asarray(2 * rng.standard_normal((B, T, N, H)), dtype)
  q_positions = top[:, None] - T + np.arange(T)
  q_positions = np.where(rng.random((B, T)) < 0.15, -1, q_positions)
  view = PageView(jnp.asarray(table), jnp.asarray(lengths))
  return Problem(q, cache, view, jnp.asarray(q_positions, jnp.int32))


def _contents(rng, shape, dtype, owned):
  dtype = jnp.dtype(dtype)
  if dtype == jnp.int8:
    return rng.integers(-127, 128, (2, *shape), np.int8)
  # 8 bits come with scales of a few hundredths.
  size = 30 if dtype.itemsize == 1 else 1
  return (size * rng.standard_normal((2, *shape))).astype(dtype)


def _garbage(dtype):
  return np.asarray(127 if dtype == jnp.int8 else np.nan).astype(dtype)


def _nan(a, owned):
  return np.where(owned, a, np.nan)


def truth(
  problem, *, layer=0, window=None, scale=None, softcap=None, sink=None
):
  """The op in fp64, row by row and key by key."""
  q, pages, view, q_positions = jax.tree.map(
    lambda a: np.asarray(
      a, np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else np.int64
    ),
    problem,
  )
  B, T, N, H = q.shape
  K, Z = pages.k.shape[1], pages.k.shape[3]
  scale = H**-0.5 if scale is None else scale
  o, lse = np.zeros(q.shape), np.full((B, T, N), -np.inf)
  for b, t, n in np.ndindex(B, T, N):
    k = n // (N // K)
    scores, values = [], []
    for s in range(view.lengths[b, k]):
      at = (layer, k, view.table[b, k, s // Z], s % Z)
      position = s if pages.positions is None else pages.positions[at]
      before = q_positions[b, t] - position
      weight = 0 if pages.log_weights is None else pages.log_weights[at]
      if q_positions[b, t] < 0 or before < 0 or weight == -np.inf:
        continue
      if window is not None and before >= window:
        continue
      score = scale * q[b, t, n] @ pages.k[at]
      if pages.k_scale is not None:
        score *= pages.k_scale[at]
      if softcap is not None:
        score = softcap * np.tanh(score / softcap)
      scores.append(score + weight)
      value = pages.v[at]
      values.append(value * (1 if pages.v_scale is None else pages.v_scale[at]))
    if sink is not None:
      scores.append(float(sink[n]))
      values.append(np.zeros(H))
    if scores:
      lse[b, t, n] = np.logaddexp.reduce(scores)
      o[b, t, n] = np.exp(scores - lse[b, t, n]) @ np.stack(values)
  return o, lse


# Most of the suite's time would go to optimising programs that run once; the
# public op, below, is compiled as it is for everybody.
CHEAP = {"xla_backend_optimization_level": 0}


def _attend(name, problem, layer, window, scale, softcap):
  K = problem.pages.k.shape[1]
  options = {"window": window, "softcap": softcap, "layer": layer}
  options["scale"] = problem.q.shape[-1] ** -0.5 if scale is None else scale
  q, *rest = problem
  o, lse = BACKENDS[name].forward(grouped(q, K), *rest, **options)
  return ungrouped(o), ungrouped(lse[..., None])[..., 0]


_run = jax.jit(_attend, static_argnums=(0, 3, 4, 5), compiler_options=CHEAP)


def run(name, problem, *, layer=0, window=None, scale=None, softcap=None):
  """An implementation by name; skips what it says it cannot do."""
  q, pages, view, _ = problem
  reason = BACKENDS[name].unsupported(grouped(q, pages.k.shape[1]), pages, view)
  if reason is not None:
    pytest.skip(f"{name}: {reason}")
  return _run(name, problem, layer, window, scale, softcap)


def assert_near(got, want, tolerance=4e-6):
  """In fp32: some hundred roundings of numbers of the size of the largest."""
  for field, g, w in zip(("o", "lse"), got, want, strict=True):
    top = np.abs(w, where=np.isfinite(w), out=np.zeros(w.shape)).max()
    np.testing.assert_allclose(
      np.asarray(g, np.float64),
      w,
      rtol=0,
      atol=tolerance * max(1, top),
      err_msg=field,
    )


RAGGED = [[17, 30], [0, 1], [1, 8], [16, 0], [5, 29]]
# Of `draw`, and of the op.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  "decode": ({"lengths": RAGGED}, {"layer": 1}),
  "many queries": ({"lengths": [[20], [9]], "T": 8, "M": 9}, {"scale": 0.3}),
  "one key head": ({"lengths": [11, 3], "T": 3, "K": 1}, {}),
  "no groups": ({"lengths": RAGGED, "N": 2, "T": 3}, {"softcap": 3.0}),
  "window": ({"lengths": RAGGED, "T": 3}, {"window": 6}),
  "window of one": ({"lengths": [[21], [1]], "T": 8}, {"window": 1}),
  "positions": (
    {"lengths": RAGGED, "T": 3, "positions": True},
    {"window": 9, "softcap": 5.0},
  ),
  "log-weights and holes": (
    {"lengths": RAGGED, "T": 3, "log_weights": True},
    {"layer": 1},
  ),
  "all but the kitchen sink": (
    {
      "lengths": RAGGED,
      "T": 8,
      "positions": True,
      "log_weights": True,
      "pages": "int8",
    },
    {"softcap": 5.0, "window": 11, "layer": 1},
  ),
  "int8": ({"lengths": RAGGED, "pages": "int8"}, {"softcap": 5.0}),
  "e4m3": ({"lengths": RAGGED, "T": 3, "pages": "float8_e4m3fn"}, {}),
  "e5m2": ({"lengths": RAGGED, "T": 3, "pages": "float8_e5m2"}, {}),
  "pages of one key": ({"lengths": [[3, 5], [4, 1]], "Z": 1}, {}),
  "pages longer than a step": ({"lengths": [[40, 5], [4, 33]], "Z": 16}, {}),
}


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_true(name, case):
  arguments, options = CASES[case]
  problem = draw(**arguments)
  assert_near(run(name, problem, **options), truth(problem, **options))


@pytest.mark.fast
@every_backend
def test_nothing_seen_is_zero_and_minus_infinity(name):
  problem = draw([[0, 0], [5, 0], [4, 4]], T=3)
  positions = jnp.asarray([[0, 1, 2], [-1, 4, -1], [-1, -1, -1]], jnp.int32)
  problem = problem._replace(q_positions=positions)
  o, lse = run(name, problem)
  blind = np.isneginf(lse)
  # The one query that sees keys, in the heads of the key head that has some.
  assert (~blind).sum() == 2
  assert not blind[1, 1, :2].any()
  assert (np.asarray(o)[blind] == 0).all()
  assert np.isfinite(o).all()


@every_backend
@pytest.mark.parametrize("pages", [None, "int8", "float8_e4m3fn"])
def test_errors_are_at_most_twice_those_of_the_plain_computation(name, pages):
  lengths = np.full((3, 2), 60)
  problem = draw(lengths, T=3, H=64, dtype="bfloat16", pages=pages)
  cap = {"softcap": 4.0}
  want, got = truth(problem, **cap), run(name, problem, **cap)
  assert got[0].dtype == jnp.bfloat16
  assert got[1].dtype == jnp.float32
  for g, p, w in zip(got, _plain(problem, 4.0), want, strict=True):
    # Absent queries have an lse of -inf in all three.
    some = np.isfinite(w)
    errors = [
      np.linalg.norm(np.asarray(a, np.float64)[some] - w[some]) for a in (g, p)
    ]
    assert errors[0] <= 2 * errors[1], errors


@functools.partial(jax.jit, static_argnums=1)
def _plain(problem, softcap):
  """Dequantised, then scores, softmax and products all in q's dtype."""
  q, pages, view, q_positions = problem
  B, K, _ = view.table.shape
  heads = jnp.arange(K)[None, :, None]

  def row(a, scale):
    a = a[0, heads, view.table].astype(q.dtype)
    if scale is not None:
      a = a * scale[0, heads, view.table][..., None].astype(q.dtype)
    return a.reshape(B, K, -1, a.shape[-1])

  k, v = row(pages.k, pages.k_scale), row(pages.v, pages.v_scale)
  place = jnp.arange(k.shape[2])[None, None]
  inside = (place < view.lengths[..., None])[:, :, None, None]
  seen = inside & (place <= q_positions[:, :, None])[:, None, None]
  s = jnp.einsum("BKGTH,BKSH->BKGTS", grouped(q, K), k)
  s = s * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  s = jnp.where(seen, softcap * jnp.tanh(s / softcap), -jnp.inf)
  top = jnp.maximum(s.max(-1, keepdims=True), -1e30)
  p = jnp.exp(s - top)
  total = p.sum(-1, keepdims=True)
  v = jnp.where(inside[:, :, 0, 0, :, None], v, 0)
  o = jnp.einsum("BKGTS,BKSH->BKGTH", p / jnp.maximum(total, 1), v)
  lse = jnp.log(total) + top
  return ungrouped(o), ungrouped(lse)[..., 0]


@every_backend
def test_a_key_of_log_weight_log_2_is_the_key_twice(name):
  twice, once = draw([6, 6], K=1), draw([5, 5], K=1)
  k, v = (np.array(a) for a in (twice.pages.k, twice.pages.v))
  weights = np.zeros(once.pages.k.shape[:4], np.float32)
  for b in range(2):
    of_twice, of_once = (np.asarray(a.view.table)[b, 0] for a in (twice, once))
    for old, new in ((k, once.pages.k), (v, once.pages.v)):
      old[:, :, of_twice[0]] = new[:, :, of_once[0]]
      old[:, :, of_twice[1], :2] = np.asarray(new[:, :, of_once[1], :1])
    weights[:, :, of_once[1], 0] = np.log(2)
  twice = twice._replace(
    q=once.q,
    pages=KVPages(jnp.asarray(k), jnp.asarray(v)),
    q_positions=jnp.full((2, 1), 9, jnp.int32),
  )
  pages = KVPages(once.pages.k, once.pages.v, log_weights=jnp.asarray(weights))
  once = once._replace(pages=pages, q_positions=twice.q_positions)
  want = [np.asarray(a, np.float64) for a in run(name, twice)]
  assert_near(run(name, once), want)


@every_backend
def test_a_merge_of_two_views_is_one_view(name):
  problem = draw([[24, 13], [17, 20]], T=3, positions=True, log_weights=True)
  lengths = np.asarray(problem.view.lengths)
  first = np.minimum(lengths, 12)
  parts = (
    PageView(problem.view.table[:, :, :3], jnp.asarray(first)),
    PageView(problem.view.table[:, :, 3:], jnp.asarray(lengths - first)),
  )
  ends = [run(name, problem._replace(view=part)) for part in parts]
  assert_near(merge(*ends[0], *ends[1]), truth(problem))


def _in_order(B=2, T=5, S=24, N=4, K=2, H=16, Z=4):
  """A problem, and its keys and values `[B,S,K,H]`."""
  rng = np.random.default_rng(0)
  q, k, v = (
    rng.standard_normal(s).astype(np.float32)
    for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
  )

  def paged(a):
    a = a.reshape(B, S // Z, Z, K, H).transpose(3, 0, 1, 2, 4)
    return a.reshape(1, K, B * S // Z, Z, H)

  table = np.arange(B * S // Z, dtype=np.int32).reshape(B, 1, -1)
  view = PageView(np.repeat(table, K, 1), np.full((B, K), S, np.int32))
  q_positions = np.tile(np.arange(S - T, S, dtype=np.int32), (B, 1))
  pages = KVPages(paged(k), paged(v))
  problem = Problem(q, pages, view, q_positions)
  return jax.tree.map(jnp.asarray, (problem, k, v))


@pytest.mark.fast
@every_backend
def test_a_cache_in_order_is_attention(name):
  problem, k, v = _in_order()
  mask = jaxchunk.AttentionMask.causal(19) & jaxchunk.AttentionMask.window(7)
  plain = functools.partial(jaxchunk.attention, mask=mask, softcap=3.0)
  got = run(name, problem, window=7, softcap=3.0)
  want = jax.jit(plain)(problem.q, k, v)
  np.testing.assert_allclose(got[0], want, rtol=0, atol=2e-6)


def test_sink_logits_are_those_of_attention():
  problem, k, v = _in_order()
  sink = jnp.asarray([0.5, -1.0, 3.0, 0.0])
  mask = jaxchunk.AttentionMask.causal(19)
  plain = functools.partial(jaxchunk.attention, mask=mask)
  want = jax.jit(plain)(problem.q, k, v, sink_logits=sink)
  got = compiled_public(problem, sink_logits=sink)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@every_backend
def test_the_layer_may_be_traced_and_rows_share_pages(name):
  problem = draw([[9, 9], [9, 9]], T=3, layers=3)
  table = jnp.broadcast_to(problem.view.table[:1], problem.view.table.shape)
  problem = problem._replace(view=PageView(table, problem.view.lengths))
  for layer in range(3):
    got = run(name, problem, layer=jnp.int32(layer))
    assert_near(got, truth(problem, layer=layer))


@every_backend
def test_running_twice_gives_the_same_bits(name):
  problem = draw(RAGGED, T=3, log_weights=True)
  for one, two in zip(run(name, problem), run(name, problem), strict=True):
    np.testing.assert_array_equal(one, two)


@st.composite
def problems(draw_from):
  """Always of one shape, so that a program is compiled once."""
  lengths = draw_from(
    st.lists(st.integers(0, 20), min_size=6, max_size=6).map(
      lambda n: np.reshape(n, (3, 2))
    )
  )
  problem = draw(lengths, T=2, M=5, seed=draw_from(st.integers(0, 99)))
  positions = draw_from(st.lists(st.integers(-1, 25), min_size=6, max_size=6))
  # As many pages in all of them.
  pages = jax.tree.map(
    lambda a: np.pad(
      a,
      ((0, 0), (0, 0), (0, 17 - a.shape[2]), (0, 0), (0, 0)),
      constant_values=np.nan,
    ),
    problem.pages,
  )
  positions = jnp.asarray(np.reshape(positions, (3, 2)), jnp.int32)
  return problem._replace(pages=pages, q_positions=positions)


@every_backend
def test_any_table_and_any_positions(name):
  @given(problem=problems(), window=st.sampled_from([None, 7]))
  @settings(max_examples=15, deadline=None, derandomize=True)
  def check(problem, window):
    options = {"window": window}
    assert_near(run(name, problem, **options), truth(problem, **options))

  check()


@every_backend
def test_it_runs_in_a_shard_map(name):
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  problem = draw([[9, 17], [4, 20]], T=3, log_weights=True)
  # By key heads.
  by_head = PartitionSpec(None, "d")
  in_specs = Problem(
    PartitionSpec(None, None, "d"),
    jax.tree.map(lambda _: by_head, problem.pages),
    PageView(by_head, by_head),
    PartitionSpec(),
  )
  by_query_head = PartitionSpec(None, None, "d")
  split = jax.jit(
    jax.shard_map(
      lambda problem: _attend(name, problem, 1, None, None, None),
      mesh=mesh,
      in_specs=(in_specs,),
      out_specs=(by_query_head, by_query_head),
      check_vma=BACKENDS[name].checked,
    ),
    compiler_options=CHEAP,
  )
  assert_near(split(problem), truth(problem, layer=1))


@pytest.mark.fast
@pytest.mark.parametrize(
  "window, ordered", [(None, True), (9, True), (9, False)]
)
def test_xla_reads_only_pages_that_are_seen(window, ordered):
  problem, *_ = _in_order(T=2)
  positions = jnp.asarray([[-1, 13], [23, 21]], jnp.int32)
  view = problem.view
  options = (4, window, xla.StepSizes(), ordered)
  q = grouped(problem.q, 2)
  rows, place = jax.jit(
    lambda: xla._sorted_rows(q, view, positions, *options),
    compiler_options=CHEAP,
  )()
  start, count = (np.asarray(a)[place] for a in (rows.start, rows.number))
  if not ordered:
    np.testing.assert_array_equal((start, count), [[0] * 4, [6] * 4])
  elif window is None:
    np.testing.assert_array_equal((start, count), [[0] * 4, [4, 4, 6, 6]])
  else:
    # From the page of position 5, and from that of 13.
    want = [[1, 1, 3, 3], [3, 3, 3, 3]]
    np.testing.assert_array_equal((start, count), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_holds_a_few_pages_beside_the_cache(dtype):
  array, cache = jax.ShapeDtypeStruct, (2, 2, 256, 64, 128)
  pages = KVPages(array(cache, dtype), array(cache, dtype))
  integers = functools.partial(array, dtype=jnp.int32)
  view = PageView(integers((4, 2, 64)), integers((4, 2)))
  arguments = (array((4, 1, 8, 128), dtype), pages, view, integers((4, 1)))
  compiled = compiled_public.lower(Problem(*arguments)).compile()
  # The cache has 67 or 34 MB; a step takes two rows of 512 keys.
  assert compiled.memory_analysis().temp_size_in_bytes < 2**21


def public(problem, **options):
  q, pages, view, q_positions = problem
  return paged_attention(q, pages, view, q_positions=q_positions, **options)


@functools.partial(jax.jit, static_argnames=("return_lse", "implementation"))
def compiled_public(problem, **options):
  return public(problem, **options)


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_the_public_op(implementation, caplog):
  problem = draw(RAGGED, T=3, pages="int8")
  sink = jnp.asarray([0.5, -1.0, 3.0, 0.0])
  api._log_choice.cache_clear()
  with caplog.at_level(logging.INFO, "jaxchunk"):
    got = compiled_public(
      problem, sink_logits=sink, return_lse=True, implementation=implementation
    )
  assert ("paged attention: running xla" in caplog.messages) == (
    implementation is None
  )
  assert_near(got, truth(problem, sink=sink))
  only = jax.eval_shape(functools.partial(public, problem, sink_logits=sink))
  assert (only.shape, only.dtype) == (got[0].shape, got[0].dtype)


def test_lengths_and_tables_of_unsigned_integers():
  problem = draw(RAGGED)
  view = jax.tree.map(lambda a: a.astype(jnp.uint32), problem.view)
  got, want = (
    compiled_public(p) for p in (problem._replace(view=view), problem)
  )
  np.testing.assert_array_equal(got, want)


def test_a_derivative_is_refused():
  problem = draw([[5, 5]])

  def total(q, sink=None):
    return public(problem._replace(q=q), sink_logits=sink).sum()

  message = "paged_attention has no derivative.*jaxchunk.attention"
  with pytest.raises(NotImplementedError, match=message):
    jax.grad(total)(problem.q)
  with pytest.raises(NotImplementedError, match=message):
    jax.jit(jax.grad(total))(problem.q)
  with pytest.raises(NotImplementedError, match=message):
    jax.jvp(total, (problem.q,), (problem.q,))
  # What is not differentiated may stand beside what is.
  got = jax.jit(jax.grad(lambda sink: total(problem.q, sink)))(jnp.zeros(4))
  assert np.isfinite(got).all()


def _with(problem, **fields):
  """With other fields of the problem, the pages or the view."""
  own = {n: fields.pop(n) for n in Problem._fields if n in fields}
  pages = {n: fields.pop(n) for n in list(fields) if hasattr(problem.pages, n)}
  parts = {"pages": pages, "view": fields}
  return problem._replace(
    **{
      name: type(getattr(problem, name))(
        **{**vars(getattr(problem, name)), **changes}
      )
      for name, changes in parts.items()
    }
  )._replace(**own)


SHAPE = (2, 2, 8, 4, 16)
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
  "q": ({"q": jnp.zeros((2, 1, 4), int)}, {}, r"q must be floating .*int32"),
  "k and v": (
    {"v": jnp.zeros((2, 2, 8, 4, 8))},
    {},
    r"k and v must both be .*\(2, 2, 8, 4, 16\) and \(2, 2, 8, 4, 8\)",
  ),
  "dtype": (
    {"k": jnp.zeros(SHAPE, "bfloat16"), "v": jnp.zeros(SHAPE, "bfloat16")},
    {},
    "the pages must have q's dtype float32.*got k bfloat16, v bfloat16",
  ),
  "no scales": (
    {"k": jnp.zeros(SHAPE, "int8"), "v": jnp.zeros(SHAPE, "int8")},
    {},
    "pages of int8 need k_scale and v_scale",
  ),
  "positions' shape": (
    {"positions": jnp.zeros((2, 8, 4), jnp.int32)},
    {},
    r"positions has shape \(2, 8, 4\), .* \(2, 2, 8, 4\)",
  ),
  "positions' dtype": (
    {"positions": jnp.zeros(SHAPE[:4])},
    {},
    "positions must be int32, got float32",
  ),
  "width": ({"q": jnp.zeros((2, 1, 4, 8))}, {}, "q has head width H=8.* H=16"),
  "heads": ({"q": jnp.zeros((2, 1, 3, 16))}, {}, "N=3 heads.*the pages' K=2"),
  "no queries": ({"q": jnp.zeros((2, 0, 4, 16))}, {}, "empty attention"),
  "table": (
    {"table": jnp.zeros((2, 3), jnp.int32)},
    {},
    r"the table has shape \(2, 3\)",
  ),
  "lengths": (
    {"lengths": jnp.zeros((2, 3), jnp.int32)},
    {},
    r"lengths has shape \(2, 3\), not \(2, 2\)",
  ),
  "q_positions": (
    {"q_positions": jnp.zeros((2, 1))},
    {},
    "q_positions must be integers, got float32",
  ),
  "window": ({}, {"window": 0}, "window must be at least 1, got 0"),
  "soft-cap": ({}, {"softcap": 0.0}, "softcap must be positive, got 0.0"),
  "sinks": ({}, {"sink_logits": jnp.zeros(3)}, r"shape \(3,\).*N=4 heads"),
  "layer": ({}, {"layer": 2}, "layer 2 is outside the cache's L=2 layers"),
  "name": ({}, {"implementation": "cuda"}, "unknown paged.*'cuda'.*'xla'"),
  "negative": (
    {"lengths": jnp.full((2, 2), -1, jnp.int32)},
    {},
    "lengths must not be negative, got -1",
  ),
  "too long": (
    {"lengths": jnp.full((2, 2), 13, jnp.int32)},
    {},
    "a row has 13 keys, its table only 3 pages of 4",
  ),
  "no such page": (
    {"lengths": jnp.full((2, 2), 12, jnp.int32)},
    {},
    "the table names page .*, outside the cache's P=8 pages",
  ),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
  fields, options, message = WRONG[case]
  # Three pages a row, of which the last is nobody's.
  problem = draw([[8, 7], [3, 5]], M=3)
  assert problem.pages.k.shape[2] <= 8
  fill = ((0, 0), (0, 0), (0, 8 - problem.pages.k.shape[2]), (0, 0), (0, 0))
  whole = {n: jnp.pad(getattr(problem.pages, n), fill) for n in ("k", "v")}
  problem = _with(problem, **whole)
  with pytest.raises(ValueError, match=message):
    public(_with(problem, **fields), **options)
