"""Device memory of an update whose optimizer state is in host memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.training import checkpoint, optimizer
from jaxchunk.training.apply import apply_by_layer
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.initial import abstract_model

TRAIN = TrainConfig(num_steps=10, optimizer_memory="host")


def parameters(layers):
  cfg = jc.ModelConfig(
    vocab_size=4096,
    d_model=512,
    num_layers=layers,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    d_ff=1024,
    dtype="bfloat16",
  )
  return nnx.to_pure_dict(abstract_model(cfg)[1])


def tpu_memory(layers):
  """Of the update itself, with its arguments where a run has them."""
  device = targets.tpu("v5p:2x2x1")[0]
  place = NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec())
  params = checkpoint.target_like(parameters(layers), place)
  init = functools.partial(
    optimizer.init_state, optimizer.make_optimizer(TRAIN)
  )
  shapes = jax.eval_shape(init, params)
  places = optimizer.state_shardings(TRAIN, shapes, place)
  state = jax.tree.map(checkpoint.target_like, shapes, places)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
  with targets.tracing_for(device):
    update = optimizer.make_update(TRAIN, places)
    lowered = update.lower(params, state, scalar, scalar, params)
  memory = lowered.compile().memory_analysis()
  return memory, memory.host_argument_size_in_bytes


def gpu_memory(layers):
  """Of steps that begin with a state inside the program.

  To compile alone, without a GPU, there are no arguments in host memory.
  """
  tx = optimizer.make_optimizer(TRAIN)
  apply = apply_by_layer(tx, "blocks")

  def begin(kind, x):
    if kind == "vector":
      return jnp.zeros(x.shape, x.dtype)
    scalar = jnp.zeros((), x.dtype)
    return lax.broadcast(jax.device_put(scalar, jax.memory.Space.Host), x.shape)

  def updates(params, grads, steps):
    shapes = jax.eval_shape(tx.init, params)
    state = jax.tree.map(begin, optimizer.kinds(shapes), shapes)

    def step(_, carry):
      return apply(*carry, grads, jnp.float32(1), jnp.bool_(True), None)

    return lax.fori_loop(0, steps, step, (params, state))[0]

  params = parameters(layers)
  steps = jax.ShapeDtypeStruct((), jnp.int32)
  device = targets.gpu("h200")[0]
  lowered = targets.lower_on(
    device, updates, params, params, steps, donate_argnums=0
  )
  memory = lowered.compile().memory_analysis()
  return memory, memory.host_temp_size_in_bytes


@pytest.mark.parametrize("memory_of", [tpu_memory, gpu_memory])
def test_device_memory_does_not_grow_with_the_layers(memory_of):
  few, many = (memory_of(layers) for layers in (4, 24))
  assert many[0].temp_size_in_bytes <= 1.05 * few[0].temp_size_in_bytes
  size = sum(4 * x.size for x in jax.tree.leaves(parameters(24)))
  # Two moments of everything but norms.
  assert 1.99 * size <= many[1] <= 2.01 * size
