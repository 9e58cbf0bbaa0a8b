"""Rings compiled for four devices: the copies run beside the work."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchunk import targets
from jaxchunk.sharding.context import context_attention
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.schemes import Ring, TokenRing

_DEVICES = {
  "v5e": ("pallas_tpu", "tpu_custom_call", lambda: targets.tpu("v5e:2x2")),
  "h200": ("pallas_gpu", "mosaic_gpu_v2", lambda: targets.gpu("h200", 4)),
}


def program(name, scheme):
  """The scheduled text of a forward pass over 4 x 2048 tokens."""
  implementation, _, devices = _DEVICES[name]
  devices = devices()
  mesh = Layout(context=4).mesh(devices)
  q_spec, kv_spec = P(None, None, None, "context"), P(None, None, "context")

  def local(q, k, v):
    return context_attention(
      q, k, v, scheme=scheme, implementation=implementation
    )[0]

  def shaped(spec, *shape):
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(q_spec, kv_spec, kv_spec),
    out_specs=q_spec,
    check_vma=True,
  )
  kv = shaped(kv_spec, 1, 2, 8192, 128)
  with targets.tracing_for(devices[0]):
    lowered = jax.jit(run).lower(shaped(q_spec, 1, 2, 2, 8192, 128), kv, kv)
  return lowered.compile().as_text()


@pytest.mark.parametrize("name", _DEVICES)
@pytest.mark.parametrize("scheme", [Ring(), TokenRing()], ids=str)
def test_copies_run_beside_the_kernels(name, scheme):
  _, kernel, _ = _DEVICES[name]
  started, beside = 0, 0
  for line in program(name, scheme).splitlines():
    if "collective-permute-start(" in line:
      started += 1
    elif "collective-permute-done(" in line:
      started -= 1
    elif started and kernel in line:
      beside += 1
  assert beside
