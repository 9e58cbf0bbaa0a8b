"""The chunk executor with a lane on several devices: gradients as on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxchunk.chunking import chunk_outer, layer_outer
from jaxchunk.chunking.executor import make_options
from jaxchunk.kernels.vma import vary_like
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.schemes import Ring, device_order
from jaxchunk.sharding.state import KVContext
from tests.chunking.conftest import PLAIN, build
from tests.sharding.test_lanes_in_shard_map import lanes

C, CHUNKS = 8, 4


def contextual(stage, devices):
  """The stage for parts of chunks, its states over all devices."""
  states = tuple(
    KVContext(
      **{f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
      | {"chunk_size": stage.chunk_size // devices}
    )
    for state in stage.states
  )
  size = stage.chunk_size // devices
  return dataclasses.replace(stage, chunk_size=size, states=states)


@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
@pytest.mark.parametrize("pattern", [(None,), (5, None), (1, 20)], ids=str)
def test_a_lane_on_four_devices(strategy, pattern):
  """Two lanes of different length, each on four devices."""
  with jax.enable_x64(True):
    cfg = dataclasses.replace(PLAIN, window_pattern=pattern)
    model = build(cfg, "float64")
    options = make_options(model, chunk_size=C, strategy=strategy)
    stage = options.stage(model.cfg)
    data = lanes(2)
    data = dataclasses.replace(data, weights=data.weights.astype("float64"))
    counts = jnp.asarray([4, 3], jnp.int32)
    layout = Layout(data=2, context=4)

    def run(stage, model, lane, count):
      totals = jnp.zeros((), "float64"), stage.trainable.zeros(model)
      if strategy == "layer_outer":
        return layer_outer.lane_gradient(stage, model, lane, count, totals)
      return chunk_outer.lane_gradient(stage, 1, model, lane, count, totals)

    def on_device(model, lane, count):
      sums = run(contextual(stage, 4), vary_like(model, lane), lane, count[0])
      return jax.lax.psum(sums, ("data", "context"))

    rows = P("data", "context")
    order = device_order(CHUNKS * C, 4, Ring(order="striped"))
    got = jax.jit(
      jax.shard_map(
        on_device,
        mesh=layout.mesh(),
        in_specs=(P(), rows, P("data")),
        out_specs=P(),
        check_vma=True,
      )
    )(model, jax.tree.map(lambda a: a[:, order], data), counts)

    one = jax.jit(lambda *a: run(stage, *a))
    parts = [
      one(model, jax.tree.map(lambda a, n=n: a[n : n + 1], data), counts[n])
      for n in range(2)
    ]
    want = jax.tree.map(jnp.add, *parts)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
