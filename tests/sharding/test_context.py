"""Attention over shards equals attention over the whole, gradients too."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxchunk.kernels.attention.api import grouped_attention
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.sharding.context import context_attention
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.schemes import (
  USP,
  AllGather,
  Ring,
  TokenRing,
  Ulysses,
  device_order,
)

SCHEMES = [
  AllGather(),
  AllGather(order="zigzag"),
  Ring(order="contiguous"),
  Ring(order="zigzag"),
  Ring(order="striped"),
  TokenRing(order="contiguous"),
  TokenRing(order="zigzag"),
  TokenRing(order="striped"),
  Ulysses(),
  USP(heads=2, order="contiguous"),
  USP(heads=2, order="zigzag"),
  USP(heads=2, order="striped"),
]
B, K, G, S, H = 2, 4, 2, 64, 8


def inputs(dtype="float64", seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(B, K, G, S, H), (B, K, S, H), (B, K, S, H), (B, K, G, S, H)]
  arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]
  dlse = jnp.asarray(rng.standard_normal((B, K, G, S)), dtype)
  # Documents cross the borders of shards; some padding behind them.
  ids = np.zeros((B, S), np.int32)
  for row, cuts in enumerate(([0, 21, 22, 50, 61], [0, 5, 64])):
    for n, (a, b) in enumerate(itertools.pairwise(cuts)):
      ids[row, a:b] = n + 1
  return *arrays, dlse, jnp.asarray(ids)


def whole(causal, window, softcap, q, k, v, ids):
  mask = AttentionMask.segments(ids, ids)
  if causal:
    mask &= AttentionMask.causal()
  if window is not None:
    mask &= AttentionMask.window(window)
  return grouped_attention(
    q,
    k[None],
    v[None],
    mask=mask,
    scale=H**-0.5,
    softcap=softcap,
    implementation="reference",
  )


def sharded(scheme, layout, q, k, v, ids, **options):
  """On a mesh, from the whole arrays to the whole results."""
  order = device_order(S, layout.context, scheme)
  mesh = layout.mesh(jax.devices()[: layout.num_devices])
  rows = P(("data",))
  tokens = P("data", None, "context")
  long = P("data", None, None, "context")

  def local(q, k, v, ids):
    return context_attention(q, k, v, scheme=scheme, segment_ids=ids, **options)

  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(long, tokens, tokens, P(*rows, "context")),
    out_specs=(long, long),
    check_vma=True,
  )
  o, lse = run(q[..., order, :], k[:, :, order], v[:, :, order], ids[:, order])
  back = np.argsort(order)
  return o[..., back, :], lse[..., back]


def compared(run, want, arrays, cotangents, tolerance):
  """Results and gradients of both, the log-sum-exp where there is one."""

  def finite(function, *a):
    o, lse = function(*a)
    return o, jnp.where(jnp.isfinite(lse), lse, 0)

  got, got_vjp = jax.vjp(functools.partial(finite, run), *arrays)
  wanted, want_vjp = jax.vjp(functools.partial(finite, want), *arrays)
  for g, w in zip(got, wanted, strict=True):
    np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)
  for g, w in zip(got_vjp(cotangents), want_vjp(cotangents), strict=True):
    np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_shards_give_what_the_whole_gives(scheme):
  with jax.enable_x64(True):
    q, k, v, do, dlse, ids = inputs()
    run = jax.jit(
      lambda q, k, v: sharded(
        scheme, Layout(data=2, context=4), q, k, v, ids, softcap=5.0
      )
    )
    want = functools.partial(whole, True, None, 5.0, ids=ids)
    compared(run, want, (q, k, v), (do, dlse), 1e-11)


@pytest.mark.parametrize(
  "scheme",
  [
    AllGather(order="zigzag"),
    Ring(order="contiguous"),
    Ring(order="zigzag"),
    TokenRing(order="zigzag"),
    Ulysses(),
    USP(heads=2),
  ],
  ids=str,
)
@pytest.mark.parametrize("causal, window", [(True, 11), (False, None)])
def test_other_masks(scheme, causal, window):
  with jax.enable_x64(True):
    q, k, v, do, dlse, ids = inputs()
    run = jax.jit(
      lambda q, k, v: sharded(
        scheme,
        Layout(context=4),
        q,
        k,
        v,
        ids,
        causal=causal,
        window=window,
      )
    )
    want = functools.partial(whole, causal, window, None, ids=ids)
    compared(run, want, (q, k, v), (do, dlse), 1e-11)


def test_eight_devices_in_fp32():
  q, k, v, do, dlse, ids = inputs("float32")
  run = jax.jit(
    lambda q, k, v: sharded(Ring(), Layout(context=8), q, k, v, ids)
  )
  want = functools.partial(whole, True, None, None, ids=ids)
  compared(run, want, (q, k, v), (do, dlse), 2e-5)


@pytest.mark.parametrize("scheme", [Ring(), USP(heads=2)], ids=str)
def test_a_changed_document_leaves_the_others_as_they_are(scheme):
  q, k, v, do, dlse, ids = inputs("float32")
  layout = Layout(context=4)

  @jax.jit
  def run(q, k, v):
    results, vjp = jax.vjp(lambda *a: sharded(scheme, layout, *a, ids), q, k, v)
    return (*results, *vjp((do, dlse)))

  own = np.asarray(ids) == 2
  changed = [
    jnp.where(own[:, None, None, :, None], 1e3, q),
    *(jnp.where(own[:, None, :, None], 1e3, x) for x in (k, v)),
  ]
  before, after = run(q, k, v), run(*changed)
  tokens_at = {"o": 3, "lse": 3, "dq": 3, "dk": 2, "dv": 2}
  for (name, at), a, b in zip(tokens_at.items(), before, after, strict=True):
    others, same = (np.moveaxis(np.asarray(x), at, 1) for x in (a, b))
    np.testing.assert_array_equal(others[~own], same[~own], err_msg=name)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_token_lies_on_one_device(scheme):
  order = device_order(S, 4, scheme)
  assert sorted(order) == list(range(S))
  if scheme.order == "zigzag":
    # Pairs of a query and a key that it sees, equal on all ranks.
    ranks = 2 if isinstance(scheme, USP) else 4
    work = (order.reshape(ranks, -1) + 1).sum(1)
    assert len(set(work.tolist())) == 1


def test_what_does_not_fit_is_named():
  with pytest.raises(ValueError, match=r"multiple of 8; pad it to 64"):
    device_order(60, 4, Ring())
  with pytest.raises(ValueError, match=r"Ulysses\(order='zigzag'\)"):
    Ulysses(order="zigzag")
  with pytest.raises(ValueError, match=r"heads=3\) does not divide the 4"):
    device_order(64, 4, USP(heads=3))
  q, k, v, _, _, ids = inputs("float32")
  with pytest.raises(ValueError, match=r"8 devices cannot share K=4 .*heads=4"):
    sharded(Ulysses(), Layout(context=8), q, k, v, ids)
  with pytest.raises(NotImplementedError, match="striped"):
    ring = Ring(order="striped")
    sharded(ring, Layout(context=4), q, k, v, ids, window=3)
  with pytest.raises(ValueError, match="implementation='cudnn'"):
    sharded(Ring(), Layout(context=4), q, k, v, ids, implementation="cudnn")
