"""What programs send is what formulas say."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxchunk as jc
from jaxchunk.chunking.executor import make_options
from jaxchunk.chunking.traces import trace_over
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.traffic import traffic

_CFG = jc.ModelConfig(
  vocab_size=256,
  d_model=64,
  num_layers=5,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  d_ff=128,
  dtype="bfloat16",
  param_dtype="bfloat16",
)


def totals(layout, **options):
  mesh = layout.mesh()
  model = nnx.eval_shape(lambda: jc.Transformer(_CFG, rngs=nnx.Rngs(0)))
  options = make_options(model, chunk_size=32, **options)
  traced = trace_over(layout, model, 32 * 8, options, mesh=mesh)
  found = {}
  for one in traffic(traced, mesh.shape, trips=8):
    key = one.kind, one.axes
    found[key] = found.get(key, 0) + one.total
  return found


@pytest.mark.parametrize("layout", [Layout(fsdp=8), Layout(data=2, fsdp=4)])
def test_fsdp_gathers_each_layer_twice_a_lane(layout):
  """Layer-outer: forward and backward, however many chunks there are."""
  found = totals(layout, strategy="layer_outer")
  D, F, H = 64, 128, 16
  layer = D * H * (4 + 2 + 2 + 4) + 3 * D * F
  head, tokens, bf16, fp32, chunks = 256 * D, 32, 2, 4, 8
  n = layout.fsdp
  share = (n - 1) / n
  # Tokens for the embedding: once forward, once backward.
  asked = 2 * chunks * n * tokens * 4
  gathered = (2 * 5 * layer + head) * bf16
  assert found["all_gather", ("fsdp",)] == (gathered + asked) * share
  scattered = (5 * layer + head) * fp32
  assert found["reduce_scatter", ("fsdp",)] == scattered * share
  rows = 2 * chunks * n * tokens * D // n * bf16
  assert found["all_to_all", ("fsdp",)] == rows * share
  # Norms are whole on each device and summed at the end.
  assert set(found) == {
    (kind, ("fsdp",)) for kind in ("all_gather", "reduce_scatter", "all_to_all")
  }


def test_gathered_once_a_step_nothing_moves_in_the_loop():
  assert totals(Layout(fsdp=8, gather="step"), strategy="layer_outer") == {}


def test_data_parallel_lanes_send_nothing():
  assert totals(Layout(data=8)) == {}


def test_loops_branches_and_groups_are_counted():
  layout = Layout(context=8)
  mesh = layout.mesh()

  def local(x, n):
    def step(i, x):
      return lax.ppermute(x, "context", [(r, (r + 1) % 8) for r in range(8)])

    x = lax.fori_loop(0, 3, step, x)
    x = lax.fori_loop(0, n[0], step, x)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    y = lax.all_gather(x, "context", axis_index_groups=groups, tiled=True)
    y = lax.cond(
      n[0] > 2,
      lambda: lax.pcast(lax.psum(y, "context"), "context", to="varying"),
      lambda: y,
    )
    return y[: len(x)]

  run = jax.shard_map(
    local, mesh=mesh, in_specs=P("context"), out_specs=P("context")
  )
  x, n = jnp.ones(32, jnp.float32), jnp.ones(8, jnp.int32)
  found = traffic(jax.jit(run).trace(x, n), mesh.shape, trips=7)
  assert [(c.kind, c.size, c.times) for c in found] == [
    ("ppermute", 16, 3),
    ("ppermute", 16, 7),
    ("all_gather", 48, 1),
    ("psum_invariant", 2 * 64 * 7 // 8, 1),
  ]


def test_chunk_outer_gathers_each_layer_three_times_a_chunk():
  """Forward for the state, forward again, backward; of the live one twice."""
  found = totals(Layout(fsdp=8), strategy="chunk_outer")
  D, F, H, chunks, bf16 = 64, 128, 16, 8, 2
  layer = D * H * (4 + 2 + 2 + 4) + 3 * D * F
  # Loops of unknown length count as 8: 7 are not live, and run once more.
  passes = 3 * chunks + 2
  heads = chunks + 1
  asked = passes * 8 * 32 * 4
  gathered = (passes * 5 * layer + heads * 256 * D) * bf16
  assert found["all_gather", ("fsdp",)] == (gathered + asked) * 7 / 8
