"""The devices that can be compiled for."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxchunk import targets


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_every_target_compiles(name):
  target = targets.target(name)
  device = target.device
  assert device.device_kind == target.kind
  assert device.platform == target.platform
  x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
  compiled = targets.lower_on(device, jnp.matmul, x, x).compile()
  assert compiled.memory_analysis().argument_size_in_bytes == 2 * 2 * 256**2


@pytest.mark.parametrize(
  "name", [n for n, t in targets.TARGETS.items() if t.platform == "tpu"]
)
def test_the_memory_of_a_tpu_is_what_its_compiler_allows(name):
  def far_too_large(x):
    sums = jnp.cumsum(x)
    return sums[::-1] * sums

  target = targets.target(name)
  x = jax.ShapeDtypeStruct((2**36,), jnp.float32)
  lowered = targets.lower_on(target.device, far_too_large, x)
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    lowered.compile()
  found = re.search(r"available HBM \(([\d.]+)G\)", str(error.value))
  assert target.memory == int(float(found[1]) * 2**30)


def test_a_card_before_hopper_has_no_kernels():
  target = targets.target("rtx4090")
  assert target.implementation == "xla"
  assert target.device.compute_capability == "8.9"
  with targets.tracing_for(target.device):
    device = jax.sharding.get_abstract_mesh().abstract_device
  assert (device.device_kind, device.num_cores) == (target.kind, 128)


def test_several_gpus_of_a_host():
  assert len(set(targets.gpu("rtx4090", 4))) == 4


def test_unknown_names():
  with pytest.raises(ValueError, match=r"unknown target 'h300'.*'h200'"):
    targets.target("h300")
  with pytest.raises(ValueError, match=r"'v5p' is not a GPU.*'rtx4090'"):
    targets.gpu("v5p")
