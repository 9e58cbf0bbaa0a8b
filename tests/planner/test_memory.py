"""Memory by formula: what is kept exactly, and what changes with what."""

import dataclasses

import pytest

from jaxchunk.models.lora import LoRA
from jaxchunk.planner.candidates import Candidate, config_of, layouts
from jaxchunk.planner.memory import Memory
from jaxchunk.sharding.mesh import Layout
from jaxchunk.training import fits

ONE = Candidate(layout=Layout(), strategy="chunk_outer", chunk_size=2048)


def test_what_is_kept_is_what_a_run_keeps(make_request):
  for model in ({}, {"lora": LoRA()}, {"tie_embeddings": True}):
    request = make_request("h200:4", model=model)
    memory = Memory(request)
    for layout in layouts(request):
      if layout.stage > 1 or layout.gather == "step":
        continue
      config = config_of(request, dataclasses.replace(ONE, layout=layout))
      exact, kept = fits.kept_bytes(config), memory.kept(layout)
      assert kept.stored.weights == exact["parameters"]
      assert kept.stored.gradients == exact["gradients"]
      assert kept.optimizer == exact["optimizer"]


def test_a_stage_keeps_its_layers_alone(make_request):
  memory = Memory(make_request("h200:4"))
  one, four = (memory.kept(Layout(stage=n)) for n in (1, 4))
  layers = 8 * one.layer.weights
  rest = one.stored.weights - layers
  assert four.stored.weights == pytest.approx(rest + layers / 4)
  assert one.optimizer > four.optimizer > one.optimizer / 4


def parts(request, **changes):
  return Memory(request).predict(dataclasses.replace(ONE, **changes)).parts


def test_the_state_grows_by_its_bytes_a_token(make_request):
  """Keys and values in bf16 and their gradients in fp32, of eight layers."""
  short, long = (
    parts(make_request(lengths=(n,)))["keys, values, gradients"]
    for n in (65536, 131072)
  )
  assert long - short == 65536 * 8 * 2 * 4 * 128 * (2 + 4)


def test_lanes_have_room_for_a_power_of_two_of_chunks(make_request):
  sizes = [
    parts(make_request(lengths=(n,)))["keys, values, gradients"]
    for n in (65537, 131072)
  ]
  assert sizes[0] == sizes[1]


def test_live_chunks_and_what_they_keep(make_request):
  request = make_request()
  one, four = (parts(request, live_chunks=n)["live chunks"] for n in (1, 4))
  assert four == 4 * one
  inputs = parts(request, keep="inputs")["live chunks"]
  # The layer's input and attention's output, each 1024 wide in bf16, and the
  # log-sum-exp of eight heads in fp32.
  assert inputs == 2048 * 8 * (2 * 2 * 1024 + 8 * 4) < one


def test_norms_behind_a_layer_make_chunks_keep_more(make_request):
  plain, normed = (
    parts(make_request(model={"post_norms": normed}))["live chunks"]
    for normed in (False, True)
  )
  # What the MLP gives, before its norm.
  assert normed - plain == 2048 * 8 * 2 * 1024


def test_keys_on_the_host_are_not_on_the_device(make_request):
  request = make_request()
  here, there = (
    Memory(request).predict(dataclasses.replace(ONE, kv_memory=kind))
    for kind in ("device", "host")
  )
  moved = here.parts["keys, values, gradients"]
  assert there.host == moved and here.host == 0
  assert here.programs["lane"] - there.programs["lane"] == moved


@pytest.mark.parametrize("axis", ["fsdp", "context", "tensor"])
def test_every_axis_saves_what_it_shares(make_request, axis):
  request = make_request("h200:4")
  memory = Memory(request)
  one = memory.predict(dataclasses.replace(ONE, layout=Layout(data=4)))
  four = memory.predict(dataclasses.replace(ONE, layout=Layout(**{axis: 4})))
  kept, state = "parameters", "keys, values, gradients"
  shares = {
    "fsdp": {kept: 1 / 4, state: 1},
    "context": {kept: 1, state: 1 / 4},
    "tensor": {kept: 1 / 4, state: 1 / 4},
  }[axis]
  for name, share in shares.items():
    ratio = four.parts[name] / one.parts[name]
    # Norms are whole on every device.
    assert ratio == pytest.approx(share, rel=2e-3)


def test_parameters_gathered_once_a_step_are_there_twice(make_request):
  request = make_request("h200:4")
  layer, step = (
    parts(request, layout=Layout(fsdp=4, gather=gather))
    for gather in ("layer", "step")
  )
  assert step["parameters"] == pytest.approx(5 * layer["parameters"], rel=2e-3)
  assert step["gradients"] == pytest.approx(4 * layer["gradients"], rel=2e-3)


def test_stages_keep_what_their_schedule_has_slots_for(make_request):
  layout = Layout(stage=4)

  def live(lengths, schedule, **changes):
    request = make_request("h200:4", lengths=lengths)
    found = parts(request, layout=layout, schedule=schedule, **changes)
    return found["live chunks"]

  # Of ordinary microbatches 1F1B keeps P, V-Half half of that and a little.
  short = [live((2048,), name) for name in ("1f1b", "v_half", "v_min")]
  assert short == sorted(short, reverse=True) and short[0] > short[2]
  long = [live((65536,), "1f1b", live_chunks=n) for n in (1, 8)]
  assert long[0] < long[1]
