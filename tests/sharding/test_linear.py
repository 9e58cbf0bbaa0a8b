"""Linear attention over shards: what one device gives, in two all-gathers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxchunk.kernels.attention.api import grouped, ungrouped
from jaxchunk.kernels.linear_attention.api import linear_attention
from jaxchunk.sharding.linear import context_linear_attention
from jaxchunk.sharding.mesh import Layout

B, K, G, S, H = 2, 2, 2, 64, 8
# Over several shards and from border to border (of 8, 16 or 32 tokens),
# inside one, of one token, an id that comes again; padding between and behind.
CUTS = {
  "one": ([(0, 64, 1)], [(0, 64, 1)]),
  "packed": (
    [(0, 21, 1), (21, 22, 2), (22, 48, 3), (48, 56, 4), (57, 63, 5)],
    [(0, 5, 1), (5, 18, 2), (18, 27, 1), (32, 64, 3)],
  ),
}
LONG, TOKENS = P("data", None, None, "context"), P("data", None, "context")
ROWS = P("data", "context")


def inputs(dtype="float64", cuts="packed", seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(B, K, G, S, H), (B, K, S, H), (B, K, S, H)]
  q, k, v = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
  # Some tokens wipe out all before them.
  decay = -rng.exponential(0.1, (B, K, S))
  decay = np.where(rng.random(decay.shape) < 0.03, -30, decay)
  do = jnp.asarray(rng.standard_normal(shapes[0]), dtype)
  ids = np.zeros((B, S), np.int32)
  for row, spans in enumerate(CUTS[cuts]):
    for a, b, n in spans:
      ids[row, a:b] = n
  return (q, k, v, jnp.asarray(decay, dtype)), do, jnp.asarray(ids)


def sharded(layout):
  """On a mesh, from the whole arrays to the whole results."""

  def local(q, k, v, decay, ids):
    return context_linear_attention(
      q, k, v, log_decay=decay, segment_ids=ids, chunk_size=4
    )

  return jax.shard_map(
    local,
    mesh=layout.mesh(jax.devices()[: layout.num_devices]),
    in_specs=(LONG, TOKENS, TOKENS, TOKENS, ROWS),
    out_specs=LONG,
    check_vma=True,
  )


def with_gradients(function):
  """The output and the gradients of q, k, v and the log decay, if any."""

  @jax.jit
  def run(arrays, do, ids):
    o, vjp = jax.vjp(lambda *a: function(*a, ids), *arrays)
    return (o, *vjp(do))

  return run


def serial(implementation):
  def whole(q, k, v, decay, ids):
    o = linear_attention(
      ungrouped(q),
      *(x.transpose(0, 2, 1, 3) for x in (k, v)),
      log_decay=None if decay is None else decay.transpose(0, 2, 1),
      segment_ids=ids,
      implementation=implementation,
    )
    return grouped(o, K)

  return with_gradients(whole)


NAMES = ("o", "dq", "dk", "dv", "dlog_decay")


def compare(got, want, tolerance):
  for name, g, w in zip(NAMES, got, want, strict=True):
    if w is not None:
      error = np.linalg.norm(g - w) / np.linalg.norm(w)
      assert error <= tolerance, (name, error)


@pytest.mark.parametrize(
  "layout, cuts",
  [
    (Layout(context=2), "packed"),
    (Layout(context=4), "one"),
    (Layout(data=2, context=4), "packed"),
    (Layout(context=8), "packed"),
  ],
  ids=["2 packed", "4 one", "2x4 packed", "8 packed"],
)
@pytest.mark.parametrize("decays", [True, False], ids=["decay", "sum"])
def test_shards_give_what_the_whole_gives(layout, cuts, decays):
  with jax.enable_x64(True):
    arrays, do, ids = inputs(cuts=cuts)
    arrays = arrays if decays else (*arrays[:3], None)
    got = with_gradients(sharded(layout))(arrays, do, ids)
    compare(got, serial("reference")(arrays, do, ids), 1e-11)


@pytest.mark.parametrize("devices", [1, 8])
def test_in_fp32(devices):
  arrays, do, ids = inputs("float32")
  got = with_gradients(sharded(Layout(context=devices)))(arrays, do, ids)
  compare(got, serial("xla")(arrays, do, ids), 1e-5)


def test_a_changed_document_leaves_the_others_as_they_are():
  arrays, do, ids = inputs("float32")
  own = np.asarray(ids) == 3
  masks = [own[:, None, None, :, None], *(own[:, None, :, None],) * 2]
  values = [
    *(jnp.where(m, 1e3, x) for m, x in zip(masks, arrays, strict=False))
  ]
  values.append(jnp.where(own[:, None], -0.7, arrays[3]))
  run = with_gradients(sharded(Layout(data=2, context=4)))
  tokens_at = (3, 3, 2, 2, 2)
  before, after = run(arrays, do, ids), run(tuple(values), do, ids)
  for name, at, a, b in zip(NAMES, tokens_at, before, after, strict=True):
    others, same = (np.moveaxis(np.asarray(x), at, 1) for x in (a, b))
    np.testing.assert_array_equal(others[~own], same[~own], err_msg=name)
    assert (others[own] != same[own]).any()


def collectives(text):
  """How often each collective stands in a compiled program."""
  found = re.findall(
    r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\(",
    text,
  )
  return {name: found.count(name) for name in set(found)}


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("decays", [True, False], ids=["decay", "sum"])
def test_one_all_gather_each_way(devices, decays):
  arrays, do, ids = inputs("float32")
  arrays = arrays if decays else (*arrays[:3], None)
  run = sharded(Layout(context=devices))
  forward = jax.jit(run).lower(*arrays, ids).compile().as_text()
  assert collectives(forward) == {"all-gather": 1}
  both = with_gradients(run).lower(arrays, do, ids).compile().as_text()
  assert collectives(both) == {"all-gather": 2}


def test_what_is_sent_does_not_grow_with_the_sequence():
  def sent(length):
    arrays = (
      jax.ShapeDtypeStruct((1, K, G, length, H), jnp.bfloat16),
      *[jax.ShapeDtypeStruct((1, K, length, H), jnp.bfloat16)] * 2,
      jax.ShapeDtypeStruct((1, K, length), jnp.bfloat16),
      jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    text = jax.jit(sharded(Layout(context=4))).lower(*arrays).as_text()
    return re.findall(r"all_gather.*-> (tensor<\S+>)", text)

  # Whole tiles of K * H * H + K + 2 numbers.
  assert sent(64) == sent(4096) == ["tensor<4x1x8x128xui32>"]


def test_one_segment_by_default():
  arrays, do, ids = inputs("float32", "one")
  layout = Layout(context=4)

  def local(q, k, v, decay):
    return context_linear_attention(q, k, v, log_decay=decay)

  run = jax.shard_map(
    local,
    mesh=layout.mesh(jax.devices()[:4]),
    in_specs=(LONG, TOKENS, TOKENS, TOKENS),
    out_specs=LONG,
  )
  error = jax.jit(run)(*arrays) - serial("xla")(arrays, do, ids)[0]
  assert np.abs(error).max() <= 1e-5
