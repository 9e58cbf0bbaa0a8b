"""Steps of the engine with the Pallas kernels inside, compiled."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.inference.params import MAX_BIASES
from jaxchunk.inference.step import Extras, State, StepShape, run_step
from jaxchunk.kv.paged import init_pages, paged_states
from tests.aot.test_training_step import CFG, DEVICES, KERNELS

PAGE, PAGES, SEQUENCES = 128, 512, 16


def compiled(name, tokens, **options):
  implementation, device = DEVICES[name]
  device = device()
  cfg = CFG.frozen()
  states = paged_states(
    cfg, page_size=PAGE, implementation=implementation, **options
  )
  shape = StepShape(
    tokens=tokens,
    max_sequences=SEQUENCES,
    prompts=4,
    query_block=128,
    table=64,
  )
  V = cfg.vocab_size

  def state():
    return State(
      init_pages(cfg, states, PAGES),
      jnp.zeros(SEQUENCES, jnp.int32),
      jnp.zeros((SEQUENCES, V), jnp.int16),
    )

  given = (
    nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0))),
    None,
    jax.eval_shape(state),
    jax.ShapeDtypeStruct((shape.packing.size,), jnp.int32),
    Extras(
      jax.ShapeDtypeStruct((SEQUENCES, MAX_BIASES), jnp.int32),
      jax.ShapeDtypeStruct((SEQUENCES, MAX_BIASES), jnp.float32),
      jax.ShapeDtypeStruct((SEQUENCES, V // 32), jnp.uint32),
    ),
  )
  program = jax.jit(
    run_step, static_argnames=("shape", "states"), donate_argnums=(2,)
  )
  with targets.tracing_for(device):
    lowered = program.lower(
      *targets.place_on(device, given), shape=shape, states=states
    )
  return lowered.compile(), given[2]


@pytest.mark.parametrize("name", ["v5e", "h200"])
@pytest.mark.parametrize("tokens", [16, 256])
def test_a_step_has_the_kernel_inside_and_copies_no_pages(name, tokens):
  program, state = compiled(name, tokens)
  calls = re.findall(r'custom_call_target="([^"]+)"', program.as_text())
  assert KERNELS[DEVICES[name][0]] in calls, sorted(set(calls))
  leaves = jax.tree.leaves(state.pages)
  pages = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes >= pages
  # A layer's keys alone are an eighth of the pages.
  assert memory.temp_size_in_bytes < pages / 8 + 2**24
