"""What is known of devices that need not be there."""

import pytest

from jaxchunk import targets
from jaxchunk.planner.devices import LINKS, machine

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_every_target_has_its_speeds(name):
  found = machine(name)
  assert found.count == 1
  assert found.flops > 1e14
  bandwidth = found.target.bandwidth
  assert bandwidth in (0, LINKS[name].memory)


@pytest.mark.parametrize(
  ("name", "count"),
  [("h200:8", 8), ("v5e:4x4", 16), ("v5p:2x2x2", 8), ("tpu7x:2x2x1", 8)],
)
def test_how_many(name, count):
  assert machine(name).count == count


@pytest.mark.parametrize("name", ["h201", "h200:x", "v5e:4y4", "v5e:0x4"])
def test_unknown_machines(name):
  with pytest.raises(ValueError, match=name.partition(":")[0]):
    machine(name)
