"""What there is to choose from."""

import dataclasses

import pytest

from jaxchunk.planner.candidates import candidates, config_of, layouts
from jaxchunk.training.config import validate


@pytest.mark.parametrize("target", ["h200", "h200:8"])
def test_runs_can_have_them_all(make_request, target):
  request = make_request(target)
  count = 0
  for candidate in candidates(request):
    assert candidate.layout.num_devices == request.machine.count
    staged = candidate.layout.stage > 1
    assert (candidate.schedule is not None) == staged
    config = config_of(request, candidate)
    config.model = dataclasses.replace(config.model)
    validate(config)
    # The configuration means the layout again.
    meant = config.layout.layout() or candidate.layout
    assert meant == candidate.layout
    count += 1
  assert count > 40


def test_all_ways_of_one_device(make_request):
  found = list(candidates(make_request()))
  assert len(set(found)) == len(found)
  assert {c.strategy for c in found} == {"chunk_outer", "layer_outer"}
  assert {c.kv_memory for c in found} == {"device", "host"}
  assert {c.keep for c in found} == {"all", "inputs"}
  assert {c.live_chunks for c in found} == {1, 2, 4, 8}
  assert {c.chunk_size for c in found} == {1024, 2048, 4096, 8192, 16384}


def test_short_sequences_leave_little_to_choose(make_request):
  found = list(candidates(make_request(lengths=(700, 900))))
  assert {(c.strategy, c.chunk_size) for c in found} == {("chunk_outer", 1024)}


def test_layouts_split_what_can_be_split(make_request):
  found = list(layouts(make_request("h200:8", model={"qk_norm": False})))
  assert {x.tensor for x in found} == {1, 2, 4}  # Four heads of keys.
  assert {x.stage for x in found} == {1, 2, 4, 8}
  # Keys and values on the host run on one device only.
  many = candidates(make_request("h200:8"))
  assert all(c.kv_memory == "device" for c in many)


def test_lean_candidates_split_parameters_over_all(make_request):
  for candidate in candidates(make_request("h200:8"), lean=True):
    layout = candidate.layout
    assert layout.data == layout.stage == candidate.live_chunks == 1
