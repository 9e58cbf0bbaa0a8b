"""Time by formula: against what programs send, and what must be so."""

import dataclasses

import jax
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking.executor import make_options
from jaxchunk.chunking.traces import trace_over
from jaxchunk.planner.candidates import Candidate
from jaxchunk.planner.kept import Model
from jaxchunk.planner.memory import Memory
from jaxchunk.planner.pipeline import pipeline_seconds
from jaxchunk.planner.seconds import EFFICIENCY, Clock, sent_bytes
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.tables import Pipeline
from jaxchunk.sharding.rules import Rules
from jaxchunk.sharding.traffic import traffic

OVER = Rules({"embed": ("fsdp", "context")})
ONE = Candidate(layout=Layout(), strategy="layer_outer", chunk_size=2048)


@pytest.mark.parametrize(
  "layout",
  [
    Layout(fsdp=8),
    Layout(context=8),
    Layout(tensor=4, data=2),
    Layout(fsdp=2, context=4, rules=OVER),
    Layout(fsdp=2, context=2, tensor=2),
  ],
  ids=str,
)
@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
def test_what_is_sent_is_what_programs_send(make_request, layout, strategy):
  request = make_request("h200:8", lengths=(2048,))
  cfg = dataclasses.replace(request.model, num_layers=4).frozen()
  request = dataclasses.replace(request, model=cfg)
  one = Candidate(layout=layout, strategy=strategy, chunk_size=256)
  model = nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))
  options = make_options(model, chunk_size=256, strategy=strategy)
  program = trace_over(layout, model, 2048, options)
  # One of eight chunks is live, outside of the loops.
  trips = 8 if strategy == "layer_outer" else 7
  found = {"gathered": 0, "visits": 0, "partial": 0}
  for sent in traffic(program, layout.shape, trips=trips):
    name = "gathered"
    if sent.axes == ("tensor",):
      name = "partial"
    elif sent.axes == ("context",):
      name = "visits"
    found[name] += sent.total
  kept = Model(request).kept(layout)
  expected = sent_bytes(cfg, kept, one, 8)._asdict()
  for name, size in found.items():
    assert expected[name] == pytest.approx(size, rel=0.12), name


def clock(request):
  return Clock(request, Memory(request))


def test_products_run_at_the_stated_share_of_the_peak(make_request):
  request = make_request()
  step = clock(request).step(ONE)
  assert step.products * EFFICIENCY < step.seconds
  needed = step.flops_share * step.seconds * request.machine.flops
  done = step.products * EFFICIENCY * request.machine.flops
  # A third is computed again, and little is padding.
  assert 0.6 * done < needed < done


def test_groups_share_the_lanes(make_request):
  lengths = (4096,) * 64
  one, four = (
    clock(make_request(target, lengths=lengths)).step(
      dataclasses.replace(ONE, layout=layout)
    )
    for target, layout in (("h200", Layout()), ("h200:4", Layout(data=4)))
  )
  assert four.products == pytest.approx(one.products / 4)
  # One long sequence is not shared by groups, but by context.
  long = make_request("h200:4", lengths=(65536,))
  alone, shared = (
    clock(long).step(dataclasses.replace(ONE, layout=layout))
    for layout in (Layout(data=4), Layout(context=4))
  )
  assert shared.products == pytest.approx(alone.products / 4)
  assert shared.seconds < alone.seconds / 2


def test_a_team_waits_for_its_longest_lane(make_request):
  lengths = (32768, *(2048,) * 48)
  request = make_request("h200:4", lengths=lengths)
  alone, team = (
    clock(request).step(dataclasses.replace(ONE, layout=layout))
    for layout in (Layout(data=4), Layout(fsdp=4))
  )
  assert team.seconds > alone.seconds


def test_more_live_chunks_save_forward_passes(make_request):
  request = make_request(lengths=(16384,))
  steps = [
    clock(request).step(
      dataclasses.replace(ONE, strategy="chunk_outer", live_chunks=live)
    )
    for live in (1, 4, 8)
  ]
  assert steps[0].seconds > steps[1].seconds > steps[2].seconds
  again = dataclasses.replace(
    ONE, strategy="chunk_outer", live_chunks=8, keep="inputs"
  )
  assert clock(request).step(again).seconds > steps[2].seconds


def test_keys_on_the_host_cost_their_copies(make_request):
  slow = make_request("v5e", lengths=(65536,))
  here, there = (
    clock(slow).step(
      dataclasses.replace(
        ONE, strategy="chunk_outer", chunk_size=1024, kv_memory=kind
      )
    )
    for kind in ("device", "host")
  )
  assert there.copies > here.copies == 0
  assert there.seconds > here.seconds


@pytest.mark.parametrize(
  ("schedule", "bubble"),
  [("1f1b", 1), ("interleaved", 1 / 2), ("zb_h1", 1 / 3), ("zb_v", 0)],
)
def test_the_published_bubbles(schedule, bubble):
  even = pipeline_seconds([4.0] * 16, 4, schedule)
  assert even == pytest.approx(16 + 3 * bubble)
  assert pipeline_seconds([4.0] * 16, 1, schedule) == 64


def test_nothing_is_compiled_for_a_time(make_request):
  count = len(jax.live_arrays())
  clock(make_request()).step(ONE)
  assert len(jax.live_arrays()) == count


def test_a_simulated_pipeline_waits_as_its_table_does(make_request):
  """Long prefixes leave zero-bubble schedules little to fill with."""
  request = make_request("h200:4", lengths=(262144, 262144))
  staged = {
    schedule: Candidate(
      layout=Layout(stage=4, pipeline=Pipeline(schedule=schedule)),
      strategy="chunk_outer",
      chunk_size=4096,
      schedule=schedule,
    )
    for schedule in ("1f1b", "1f1b_aligned", "zb_v")
  }
  found = {
    name: clock(request).step(candidate, simulate=True).seconds
    for name, candidate in staged.items()
  }
  one = clock(request).step(staged["zb_v"]).seconds
  assert found["1f1b_aligned"] < found["zb_v"]
  assert one < min(found.values())
