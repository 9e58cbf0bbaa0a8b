"""Layouts and rules: meshes, messages, the nearest that works."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxchunk.sharding.mesh import Layout, coordinates, from_shape
from jaxchunk.sharding.rules import AXES, LOGICAL, Rules

pytestmark = pytest.mark.fast


@dataclasses.dataclass(frozen=True)
class Device:
  """As far as a mesh looks at one."""

  id: int
  slice_index: int = 0
  process_index: int = 0
  platform: str = "gpu"


def test_the_last_axes_are_neighbours():
  mesh = Layout(data=2, fsdp=2, tensor=2).mesh(jax.devices())
  assert mesh.shape == dict.fromkeys(AXES, 1) | {
    "data": 2,
    "fsdp": 2,
    "tensor": 2,
  }
  places = coordinates(mesh)
  first, second = jax.devices()[:2]
  assert [a for a in AXES if places[first][a] != places[second][a]] == [
    "tensor"
  ]
  assert from_shape(mesh.shape) == Layout(data=2, fsdp=2, tensor=2)


def test_slices_are_spanned_by_one_axis():
  # Of each slice every second device, in any order.
  devices = [Device(n, slice_index=n % 2) for n in range(16)]
  layout = Layout(data=4, tensor=4, slices=2)
  placed = layout._placed(devices)
  slices = np.vectorize(lambda d: d.slice_index)(placed).reshape(4, 4)
  assert (slices == [[0], [0], [1], [1]]).all()
  hosts = [Device(n, process_index=n // 4) for n in range(16)]
  stages = Layout(stage=2, fsdp=8, slices=2, slices_over="stage")
  placed = np.vectorize(lambda d: d.process_index)(stages._placed(hosts))
  assert (placed.reshape(2, 8) // 2 == [[0], [1]]).all()
  with pytest.raises(ValueError, match=r"layout\.slices=3, and .* in 2"):
    Layout(data=3, slices=3)._placed(devices[:3])


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 3), st.integers(1, 64))
def test_the_nearest_layout_fits(sizes, count):
  layout = Layout(data=sizes[0], context=sizes[1], tensor=sizes[2])
  near = layout.nearest(count)
  assert near.num_devices == count
  if layout.num_devices == count:
    assert near == layout


def test_too_few_devices_are_answered_with_a_layout_that_fits():
  with pytest.raises(
    ValueError, match=r"takes 16 .* are 8; .*Layout\(fsdp=4, tensor=2\)"
  ):
    Layout(fsdp=8, tensor=2).mesh(jax.devices())


def test_rules_make_specs():
  rules = Rules()
  assert rules.spec(("layers", "embed", "mlp")) == P("stage", "fsdp", "tensor")
  lane = P(("data", "fsdp", "expert"), "context", None)
  assert rules.spec(("lane", "sequence", None)) == lane
  other = Rules({"embed": None, "mlp": ("fsdp", "tensor")})
  assert other.spec(("embed", "mlp")) == P(None, ("fsdp", "tensor"))
  assert hash(other) != hash(rules) and hash(Rules()) == hash(rules)


def test_two_logical_axes_on_one_mesh_axis_are_an_error():
  with pytest.raises(
    ValueError, match="twice by 'tensor': for 'heads' and for 'mlp'"
  ):
    Rules().spec(("heads", "mlp"))


def test_what_is_wrong_is_named():
  with pytest.raises(ValueError, match=r"layout\.tensor=0"):
    Layout(tensor=0)
  with pytest.raises(ValueError, match=r"slices=2 does not divide .*data=3"):
    Layout(data=3, slices=2)
  with pytest.raises(ValueError, match="slices_over='tensor'"):
    Layout(tensor=2, slices=2, slices_over="tensor")
  with pytest.raises(ValueError, match=r"rule 'mlp' names \['model'\]"):
    Rules({"mlp": "model"})
  with pytest.raises(KeyError, match="no rule for the logical axis 'width'"):
    Rules().spec(("width",))
  with pytest.raises(ValueError, match="none of"):
    from_shape({"model": 2})
  layout = Layout(tensor=8)
  mesh = layout.mesh(jax.devices())
  with pytest.raises(
    ValueError, match=r"k has 6 along 'kv_heads', which tensor = 8 .* is 6"
  ):
    layout.sharding(mesh, ("embed", "kv_heads"), (16, 6), "k")


def test_the_table_says_what_is_split():
  table = Layout(data=4, context=2, slices=2).table()
  lines = table.splitlines()
  assert lines[0] == "8 devices in 2 slices along data"
  assert any(line.split()[:2] == ["context", "2"] for line in lines)
  assert any("sequence" in line and "context" in line for line in lines)
  assert "tensor" not in table
  assert set(LOGICAL) >= {"lane", "sequence", "embed"}
  assert math.prod(Layout().shape.values()) == 1
