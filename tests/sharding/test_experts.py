"""Experts over devices compute what they do on one, from the same arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxchunk.models.moe import Experts, MoE
from jaxchunk.models.tape import Tape
from jaxchunk.sharding.experts import Exchange, Gather, check_split

_T, _D = 6, 5
_MOE = MoE(num_experts=8, experts_per_token=3, d_ff=7)
_TIGHT = dataclasses.replace(_MOE, capacity_factor=0.7)
_SPLIT, _ALL = PartitionSpec("expert"), PartitionSpec()


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def random(shape, seed):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def make(moe, devices):
  """Experts, and a row of tokens for each device, some padding."""
  experts = Experts(moe, _D, "float64", gain=1.0, rngs=nnx.Rngs(0))
  experts = jax.tree.map(lambda a: random(a.shape, a.size), experts)
  valid = np.arange(_T)[None] < _T - np.arange(devices)[:, None] % 3
  # All tokens of the first device prefer one expert: nothing is even.
  h = random((devices, _T, _D), 1)
  return experts, h.at[0].set(h[0, :1]), jnp.asarray(valid)


def specs(experts):
  """The router is everywhere, an expert on one device."""
  return jax.tree.map(lambda a: _SPLIT if a.ndim == 3 else _ALL, experts)


def run(experts, h, valid, across=None):
  tape = Tape()
  y = experts(tape, h, jax.nn.silu, valid=valid, across=across)
  return y, tape.router


def row_by_row(experts, h, valid):
  """On one device, with the capacity of each device's tokens."""

  def row(args):
    y, said = run(experts, args[0][None], args[1][None])
    return y[0], said

  y, said = jax.lax.map(row, (h, valid))
  return y, jax.tree.map(lambda a: a.sum(0), said)


def on_devices(mesh, across, experts, h, valid):
  def local(experts, h, valid):
    y, said = run(experts, h, valid, across)
    return y, jax.tree.map(lambda a: jax.lax.psum(a, "expert"), said)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs(experts), _SPLIT, _SPLIT),
    out_specs=(_SPLIT, _ALL),
    check_vma=True,
  )(experts, h, valid)


def with_gradients(function):
  """The outputs, and the gradients of a loss of all of them."""

  @jax.jit
  def both(experts, h, valid):
    def loss(experts, h):
      y, said = function(experts, h, valid)
      sums = jnp.sum(random(said.probs.shape, 3) * said.probs) + said.z
      return jnp.sum(random(y.shape, 2) * y) + sums, (y, said)

    return jax.grad(loss, (0, 1), has_aux=True)(experts, h)

  return both


def make_mesh(devices):
  return jax.make_mesh(
    (devices,),
    ("expert",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:devices],
  )


def assert_close(got, want):
  for (path, g), w in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(
      g, w, rtol=0, atol=1e-11, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize("moe", [_MOE, _TIGHT], ids=["dropless", "capacity"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_experts_over_devices_are_those_of_one(x64, devices, moe):
  experts, h, valid = make(moe, devices)
  want = with_gradients(row_by_row)(experts, h, valid)
  assert (want[1][1].dropped > 0) == (moe is _TIGHT)
  mesh = make_mesh(devices)
  over = functools.partial(on_devices, mesh, Exchange())
  assert_close(with_gradients(over)(experts, h, valid), want)


@pytest.mark.parametrize("moe", [_MOE, _TIGHT], ids=["dropless", "capacity"])
def test_what_travels_may_change_and_no_parameter_moves(x64, moe):
  experts, h, valid = make(moe, 4)
  mesh = make_mesh(4)
  places = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs(experts),
    is_leaf=lambda spec: isinstance(spec, PartitionSpec),
  )
  experts = jax.device_put(experts, places)
  h, valid = jax.device_put((h, valid), NamedSharding(mesh, _SPLIT))
  found = {}
  for across in (Exchange(), Gather()):
    function = with_gradients(functools.partial(on_devices, mesh, across))
    compiled = function.lower(experts, h, valid).compile()
    text = compiled.as_text()
    # Only tokens travel, or only matrices; what comes in is where it was.
    assert ("all-to-all" in text) == isinstance(across, Exchange)
    assert ("all-gather" in text) == isinstance(across, Gather)
    for wanted, array in zip(
      jax.tree.leaves(compiled.input_shardings[0][0]),
      jax.tree.leaves(experts),
      strict=True,
    ):
      assert array.sharding.is_equivalent_to(wanted, array.ndim)
    found[across] = compiled(experts, h, valid)
    for gradient, array in zip(
      jax.tree.leaves(found[across][0][0]),
      jax.tree.leaves(experts),
      strict=True,
    ):
      assert gradient.sharding.is_equivalent_to(array.sharding, array.ndim)
  assert_close(found[Exchange()], found[Gather()])


@pytest.mark.fast
def test_an_uneven_split_is_refused():
  with pytest.raises(
    ValueError, match="num_experts=6 cannot be split over 4 d"
  ):
    check_split(6, 4)
