"""Attention inside a checked shard_map, keys and values replicated.

A custom gradient over a replicated operand is where a missing sum over the
mesh shows: as an error with `check_vma=True`, as a wrong number without.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxchunk.kernels.attention.api import attention
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.vma import match_primal, vary_like, varying_axes

_B, _T, _S, _N, _H = 2, 16, 24, 4, 8


def mesh():
  return jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def draw(num_kv_heads, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    "q": (_B, _T, _N, _H),
    "k": (_B, _S, num_kv_heads, _H),
    "v": (_B, _S, num_kv_heads, _H),
    "do": (_B, _T, _N, _H),
    "dlse": (_B, _T, _N),
  }
  return {n: jnp.asarray(rng.standard_normal(s)) for n, s in shapes.items()}


def weighted(q, k, v, do, dlse, ids=None, *, offset, implementation):
  """A loss through both results, of the queries given."""
  mask = AttentionMask.causal(offset) & AttentionMask.window(13)
  if ids is not None:
    mask &= AttentionMask.segments(*ids)
  o, lse = attention(
    q,
    k,
    v,
    mask=mask,
    softcap=4.0,
    implementation=implementation,
    return_lse=True,
  )
  return jnp.sum(o * do) + jnp.sum(lse * dlse)


# Where the queries are cut, and how many key heads every device holds.
LAYOUTS = {
  "time": (P(None, ("x", "y")), 2),
  "heads": (P(None, None, "y"), 1),
  "time and heads": (P(None, "x", "y"), 1),
}


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_replicated_keys_are_the_unsharded_ones(layout, where):
  spec, num_kv_heads = LAYOUTS[layout]

  def loss(q, k, v, do, dlse, q_ids, kv_ids):
    offset = _S - _T
    if spec[1] is not None:
      offset += lax.axis_index(spec[1]) * q.shape[1]
    return weighted(
      q,
      k,
      v,
      do,
      dlse,
      (q_ids, kv_ids),
      offset=offset,
      implementation="xla",
    )

  in_specs = (spec, P(), P(), spec, spec, P(*spec[:2]), P())
  axes = tuple(n for n in ("x", "y") if n in jax.tree.leaves(tuple(spec)))
  if where == "inside":
    body, out_specs = jax.grad(loss, (0, 1, 2)), (spec, P(), P())
  else:
    body, out_specs = lambda *a: lax.psum(loss(*a), axes), P()
  run = jax.shard_map(
    body, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=True
  )
  with jax.enable_x64(True):
    arrays = draw(num_kv_heads)
    ids = np.sort(np.random.default_rng(1).integers(1, 4, (_B, _S)), axis=1)
    ids = jnp.asarray(ids, jnp.int32)
    arguments = (*arrays.values(), ids[:, _S - _T :], ids)
    if where == "outside":
      run = jax.grad(run, (0, 1, 2))
    got = jax.jit(run)(*arguments)
    whole = functools.partial(
      weighted, offset=_S - _T, implementation="reference"
    )
    want = jax.jit(jax.grad(whole, (0, 1, 2)))(
      *arrays.values(), (ids[:, _S - _T :], ids)
    )
    for name, g, w in zip("qkv", got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.fast
def test_one_prefix_is_shared_by_a_sharded_batch():
  def loss(q, k, v, do, dlse):
    return weighted(q, k, v, do, dlse, offset=8, implementation="xla")

  run = jax.shard_map(
    jax.grad(loss, (0, 1, 2)),
    mesh=mesh(),
    in_specs=(P("x"), P(), P(), P("x"), P("x")),
    out_specs=(P("x"), P(), P()),
  )
  with jax.enable_x64(True):
    arrays = draw(2)
    q, k, v, do, dlse = arrays.values()
    k, v = k[:1], v[:1]

    def whole(q, k, v):
      k, v = (jnp.broadcast_to(a, (_B, *a.shape[1:])) for a in (k, v))
      return weighted(q, k, v, do, dlse, offset=8, implementation="reference")

    got = jax.jit(run)(q, k, v, do, dlse)
    want = jax.jit(jax.grad(whole, (0, 1, 2)))(q, k, v)
    for name, g, w in zip("qkv", got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.fast
@pytest.mark.parametrize("result", ["o", "lse"])
def test_a_loss_of_one_result_only(result):
  """The other's cotangent is made from nothing and does not vary."""

  def loss(q, k, v):
    o, lse = attention(q, k, v, return_lse=True)
    return jnp.sum(jnp.sin(o if result == "o" else lse))

  run = jax.shard_map(
    jax.grad(loss, (0, 1, 2)),
    mesh=mesh(),
    in_specs=(P(None, "y"), P(), P()),
    out_specs=(P(None, "y"), P(), P()),
  )
  with jax.enable_x64(True):
    arrays = tuple(draw(2).values())[:3]
    got = jax.jit(run)(*arrays)
    want = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    for name, g, w in zip("qkv", got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.fast
def test_helpers_follow_the_axes():
  seen = {}

  def body(a, b):
    seen["axes"] = [varying_axes(v) for v in (a, b, (a, b), jnp.zeros(2))]
    zero = vary_like({"n": jnp.zeros(2)}, a, b)["n"]
    back = match_primal((a, zero), (jnp.zeros(1), b))
    seen["after"] = [varying_axes(zero), *map(varying_axes, back)]
    return back

  a, b = jnp.arange(2.0), jnp.arange(4.0)
  total, per_b = jax.shard_map(
    body,
    mesh=mesh(),
    in_specs=(P("x"), P("y")),
    out_specs=(P(), P("y")),
  )(a, b)
  assert seen["axes"] == [{"x"}, {"y"}, {"x", "y"}, set()]
  assert seen["after"] == [{"x", "y"}, set(), {"y"}]
  np.testing.assert_array_equal(total, [1.0])
  np.testing.assert_array_equal(per_b, np.zeros(8))


@pytest.mark.fast
def test_helpers_change_nothing_outside_a_shard_map():
  a, b = jnp.zeros(2), jnp.ones(3)
  assert varying_axes(a, b) == set()
  assert vary_like(a, b) is a
  assert match_primal((a,), (b,))[0] is a
