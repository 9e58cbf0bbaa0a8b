"""Plans of steps, and whole traces on a computed clock."""

import dataclasses
import itertools

import numpy as np
import pytest

from jaxchunk.inference.cost import LinearCost, MeasuredCost
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.scheduler import (
  SCHEDULERS,
  Lengths,
  Limits,
  StallFree,
  future_peak,
)
from jaxchunk.inference.sequence import Sequence
from jaxchunk.inference.simulate import Arrival, simulate
from jaxchunk.kv.pool import PagePool

pytestmark = pytest.mark.fast

SHAPES = (1, 2, 4, 8, 16, 32)
LIMITS = Limits(tokens=32, sequences=8, prompts=2, shapes=SHAPES)
_numbers = itertools.count()


def sequence_of(tokens, more=20, **fields):
  number = next(_numbers)
  return Sequence(
    **dict(
      request_id=str(number),
      index=0,
      tokens=list(range(tokens)),
      prompt_length=tokens,
      max_length=tokens + more,
      params=SamplingParams(),
      seed=0,
      priority=0,
      arrival=number,
      root=b"",
    )
    | fields
  )


def draw_all(plan):
  for work in plan.works:
    if work.draws:
      work.sequence.pending -= 1
      work.sequence.tokens.append(0)


def test_draws_come_first_then_prompts_in_order():
  scheduler = StallFree(LIMITS, PagePool(64, 4, caching=False))
  short, long, late = (sequence_of(n) for n in (3, 50, 9))
  scheduler.add(short)
  draw_all(scheduler.schedule())
  scheduler.add(long)
  scheduler.add(late)
  plan = scheduler.schedule()
  assert [(w.sequence, w.count) for w in plan.works] == [(short, 1), (long, 31)]
  draw_all(plan)
  plan = scheduler.schedule()
  counts = [(w.sequence, w.count, w.draws) for w in plan.works]
  assert counts == [(short, 1, True), (long, 19, True), (late, 9, True)]
  assert plan.tokens == 29


def test_lower_priorities_run_first_and_lose_their_pages_last():
  scheduler = StallFree(LIMITS, PagePool(8, 4, caching=False))
  common, urgent = sequence_of(14), sequence_of(15, priority=-1)
  scheduler.add(common)
  scheduler.add(urgent)
  plan = scheduler.schedule()
  assert [w.sequence for w in plan.works] == [urgent, common]
  draw_all(plan)
  # Each fills its last page, then one more is needed and there is none.
  for _ in range(2):
    plan = scheduler.schedule()
    draw_all(plan)
  assert [lost.sequence for lost in plan.preempted] == [common]
  assert plan.preempted[0].computed == 15
  scheduler.pool.check([s.pages for s in scheduler.running])


def test_a_part_of_a_prompt_fills_a_program():
  """Of 17 to 31 tokens, 16 run where the rest has time."""
  scheduler = StallFree(
    dataclasses.replace(LIMITS, tokens=20, shapes=(1, 4, 16, 32)),
    PagePool(64, 4, caching=False),
  )
  scheduler.add(sequence_of(100))
  assert [w.count for w in scheduler.schedule().works] == [16]


@pytest.mark.parametrize(
  "cost",
  [
    LinearCost(step=10, token=1, key=0.01),
    MeasuredCost(SHAPES, (10, 10.5, 11, 13, 16, 30), 0.01),
  ],
)
def test_a_prompt_slows_draws_by_so_much_at_most(cost):
  limits = dataclasses.replace(LIMITS, slowdown=1.5)
  scheduler = StallFree(limits, PagePool(99, 4, caching=False), cost=cost)
  short, long = sequence_of(3, 300), sequence_of(200)
  scheduler.add(short)
  draw_all(scheduler.schedule())
  scheduler.add(long)
  steps = 0
  while long.remaining > 1:
    plan = scheduler.schedule()
    works = {w.sequence: w for w in plan.works}
    keys = short.computed + works[long].count * (
      works[long].start + (works[long].count + 1) / 2
    )
    idle = cost.seconds(1, short.computed)
    if works[long].count > 1:
      assert cost.seconds(plan.tokens, keys) <= 1.5 * idle
    draw_all(plan)
    steps += 1
  # One token a step would take 199.
  assert 30 < steps < 160
  # Alone it takes what there is.
  scheduler.remove(short)
  scheduler.remove(long)
  other = sequence_of(100)
  scheduler.add(other)
  assert scheduler.schedule().works[-1].count > 16


def test_the_peak_is_that_of_the_paper():
  """Two running, 5 and 3 tokens now, 2 and 6 to come."""
  # When the first ends: 3 + 5 + 2 * 2; when the second does: 3 + 6.
  assert future_peak([(5, 2), (3, 6)]) == 12
  assert future_peak([(5, 2), (3, 20)]) == 23
  assert future_peak([]) == 0
  rng = np.random.default_rng(0)
  for _ in range(50):
    pairs = rng.integers(1, 50, (rng.integers(1, 8), 2)).tolist()
    # Step by step; one is gone with its last token.
    peak = max(
      sum(now + at for now, left in pairs if left >= at) for at in range(1, 51)
    )
    assert future_peak(pairs) == peak


def test_lengths_are_expected_from_those_that_were_longer():
  lengths = Lengths(window=4)
  assert lengths.expect(0, 70) == 70
  for tokens in (100, 10, 20, 30, 40):
    lengths.add(tokens)
  assert lengths.expect(0, 70) == 25
  assert lengths.expect(20, 70) == 35
  assert lengths.expect(20, 30) == 30
  assert lengths.expect(40, 70) == 70


def draw_trace(number, seed=0):
  rng = np.random.default_rng(seed)
  times = np.cumsum(rng.exponential(0.3, number))
  return [
    Arrival(
      float(at),
      tuple(rng.integers(1, 99, rng.integers(4, 60)).tolist()),
      int(rng.integers(2, 60)),
      100,
    )
    for at in times
  ]


def test_a_trace_is_served_whole_and_looking_ahead_saves_preemptions():
  trace = draw_trace(120)
  found = {}
  for name in SCHEDULERS:
    result = simulate(
      trace,
      scheduler=name,
      limits=LIMITS,
      num_pages=60,
      page_size=4,
      cost=LinearCost(step=0.02, token=0.001, key=1e-6),
      max_length=200,
    )
    assert result.core.scheduler.pool.held == 0
    for arrival, served in zip(trace, result.served, strict=True):
      assert len(served.between) == arrival.tokens - 1
      assert served.first > 0
    found[name] = result.figures()
  assert found["stall_free"]["preemptions"] > 20
  assert (
    found["past_future"]["preemptions"] < found["stall_free"]["preemptions"] / 5
  )
  with pytest.raises(ValueError, match="reserve=1"):
    SCHEDULERS["past_future"](LIMITS, PagePool(4, 4), reserve=1)
