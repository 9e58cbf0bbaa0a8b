"""Linear attention compiled for four devices: one all-gather each way."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchunk import targets
from jaxchunk.sharding.linear import context_linear_attention
from jaxchunk.sharding.mesh import Layout

_DEVICES = {
  "v5e": lambda: targets.tpu("v5e:2x2"),
  "h200": lambda: targets.gpu("h200", 4),
}
_COLLECTIVE = re.compile(
  r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
  r"(?:-start)?\("
)


def program(name, backward):
  """The scheduled text over 4 x 2048 tokens in bf16."""
  devices = _DEVICES[name]()
  mesh = Layout(context=4).mesh(devices)
  long, tokens = P(None, None, None, "context"), P(None, None, "context")

  def local(q, k, v, decay, ids):
    return context_linear_attention(q, k, v, log_decay=decay, segment_ids=ids)

  def shaped(spec, dtype, *shape):
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(long, tokens, tokens, tokens, P(None, "context")),
    out_specs=long,
    check_vma=True,
  )

  def both(q, k, v, decay, ids, do):
    o, vjp = jax.vjp(lambda *a: run(*a, ids), q, k, v, decay)
    # Of the output, as in training: else both are gathered at once.
    return vjp(o * do)

  q = shaped(long, jnp.bfloat16, 1, 4, 2, 8192, 128)
  kv = shaped(tokens, jnp.bfloat16, 1, 4, 8192, 128)
  decay = shaped(tokens, jnp.float32, 1, 4, 8192)
  ids = shaped(P(None, "context"), jnp.int32, 1, 8192)
  arguments = (q, kv, kv, decay, ids)
  with targets.tracing_for(devices[0]):
    if backward:
      lowered = jax.jit(both).lower(*arguments, q)
    else:
      lowered = jax.jit(run).lower(*arguments)
  return lowered.compile().as_text()


@pytest.mark.parametrize("name", _DEVICES)
def test_one_all_gather_each_way(name):
  for backward, count in ((False, 1), (True, 2)):
    text = program(name, backward)
    found = _COLLECTIVE.findall(text)
    assert set(found) == {"all-gather"}
    # A TPU fuses the steps of one with the work beside it: each names it again.
    started = text.count('"AsyncCollectiveStart"')
    assert (started if name == "v5e" else len(found)) == count
