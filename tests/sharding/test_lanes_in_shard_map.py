"""The chunk executor inside shard_map: replicated weights, a lane a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxchunk.chunking import chunk_outer, layer_outer
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.executor import make_options
from jaxchunk.kernels.vma import vary_like
from tests.chunking.conftest import PLAIN, build

C, CHUNKS = 8, 4


def lanes(count: int) -> Lane:
  rng = np.random.default_rng(0)
  shape = (count, CHUNKS * C)
  segments = np.ones(shape, np.int32)
  segments[:, 20:] = 2
  positions = np.broadcast_to(np.arange(shape[1]), shape) % 20
  return Lane(
    *(
      jnp.asarray(a)
      for a in (
        rng.integers(0, PLAIN.vocab_size, shape).astype(np.int32),
        rng.integers(0, PLAIN.vocab_size, shape).astype(np.int32),
        rng.random(shape).astype(np.float32),
        segments,
        positions.astype(np.int32),
        segments,
      )
    )
  )


@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
def test_lanes_of_different_length(strategy):
  model = build(PLAIN, "float32")
  options = make_options(model, chunk_size=C, strategy=strategy)
  stage = options.stage(model.cfg)
  data = lanes(8)
  counts = jnp.asarray([1, 2, 3, 4, 4, 3, 2, 1], jnp.int32)

  def run(model, lane, count):
    totals = jnp.zeros(()), stage.trainable.zeros(model)
    if strategy == "layer_outer":
      return layer_outer.lane_gradient(stage, model, lane, count, totals)
    return chunk_outer.lane_gradient(stage, 1, model, lane, count, totals)

  def on_device(model, lane, count):
    # Weights that vary keep the loops free of collectives: devices may run
    # different numbers of chunks, and gradients are summed once, at the end.
    sums = run(vary_like(model, lane), lane, count[0])
    return jax.lax.psum(sums, "data")

  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  split = PartitionSpec("data")
  with jax.set_mesh(mesh):
    got = jax.jit(
      jax.shard_map(
        on_device,
        in_specs=(PartitionSpec(), split, split),
        out_specs=PartitionSpec(),
        check_vma=True,
      )
    )(model, data, counts)

  one = jax.jit(run)
  want = None
  for n in range(8):
    lane = jax.tree.map(lambda a, n=n: a[n : n + 1], data)
    part = one(model, lane, counts[n])
    want = part if want is None else jax.tree.map(jnp.add, want, part)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    error = np.linalg.norm(np.asarray(a) - np.asarray(b))
    assert error <= 1e-5 * np.linalg.norm(b)
