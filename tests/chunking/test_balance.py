"""Placements are whole, fit, and take what a simulation of them takes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchunk.chunking.balance import (
  Problem,
  deal,
  least_makespan,
  longest_processing_time,
  placement,
  placement_problem,
  spans,
  static_placement,
)
from jaxchunk.chunking.balance_cost import (
  CostModel,
  Timing,
  Work,
  fit_cost,
  lane_works,
)
from jaxchunk.chunking.balance_hybrid import hybrid_placement
from jaxchunk.chunking.balance_program import (
  buckets_of,
  flexible_placement,
)
from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.plan import chunk_plan

MODEL = CostModel(
  chunk=2.0,
  token=1.0,
  pair=0.01,
  exchange=((2, 0.05), (4, 0.04), (8, 0.2)),
)
WAYS = (static_placement, hybrid_placement, flexible_placement)


def simulated(problem, turns):
  """When the last device is done: clocks of devices, one lane after another."""
  clocks = [0.0] * problem.devices
  for turn in turns:
    for group, lane in enumerate(turn.lanes):
      if lane is not None:
        members = range(group * turn.degree, (group + 1) * turn.degree)
        start = max(clocks[n] for n in members)
        row = problem.degrees.index(turn.degree)
        for n in members:
          clocks[n] = start + problem.seconds[row, lane]
  return max(clocks)


@st.composite
def problems(draw):
  """A plan, devices and a room that holds its longest lane."""
  lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=40))
  plan = chunk_plan(lengths, 16)
  devices = draw(st.sampled_from([1, 2, 4, 8, 12, 16]))
  largest = max(d for d in MODEL.degrees if devices % d == 0)
  room = 16 * capacity_chunks(int(plan.lane_chunks.max()))
  budget = draw(st.integers(-(-room // largest), 2 * room))
  return plan, devices, budget


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(WAYS))
def test_every_lane_runs_once_where_it_fits_and_as_long_as_said(case, way):
  plan, devices, budget = case
  problem = placement_problem(
    plan, MODEL, devices=devices, tokens_per_device=budget
  )
  found = way(problem)
  placed = [n for turn in found.turns for n in turn.lanes if n is not None]
  assert sorted(placed) == list(range(len(plan.lanes)))
  works = lane_works(plan)
  for turn in found.turns:
    assert len(turn.lanes) * turn.degree == devices
    longest = max(int(plan.lane_chunks[n]) for n in turn.lanes if n is not None)
    assert 16 * capacity_chunks(longest) <= budget * turn.degree
    row = problem.degrees.index(turn.degree)
    for lane in turn.lanes:
      if lane is not None:
        seconds = MODEL.seconds(works[lane], turn.degree)
        assert problem.seconds[row, lane] == seconds
  np.testing.assert_allclose(
    simulated(problem, found.turns), found.makespan, rtol=1e-12
  )
  assert found.lower_bound == least_makespan(problem)
  assert found.makespan >= found.lower_bound * (1 - 1e-12)


@settings(max_examples=20, deadline=None)
@given(problems())
def test_no_way_takes_longer_than_one_degree_for_all(case):
  plan, devices, budget = case
  problem = placement_problem(
    plan, MODEL, devices=devices, tokens_per_device=budget
  )
  static = static_placement(problem)
  hybrid, flexible = hybrid_placement(problem), flexible_placement(problem)
  assert hybrid.makespan <= static.makespan
  assert flexible.makespan <= hybrid.makespan
  assert (flexible.way == "flexible") == (flexible.makespan < hybrid.makespan)
  assert hybrid == hybrid_placement(problem)


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.integers(1, 30), min_size=1, max_size=4),
  st.lists(st.floats(0.3, 1.2), min_size=4, max_size=4),
)
def test_no_placement_beats_the_bound(costs, shares):
  """All degrees and groups of up to four lanes on four devices."""
  seconds = np.asarray(
    [
      costs,
      [c * shares[n] for n, c in enumerate(costs)],
      [c * shares[n] * shares[-1 - n] for n, c in enumerate(costs)],
    ]
  )
  problem = Problem(4, (1, 2, 4), seconds)
  places = [(0, n) for n in range(4)] + [(1, 0), (1, 1), (2, 0)]
  least = math.inf
  for chosen in itertools.product(places, repeat=len(costs)):
    loads = np.zeros(4)
    for lane, (row, group) in enumerate(chosen):
      loads[group << row : (group + 1) << row] += seconds[row, lane]
    least = min(least, loads.max())
  assert least_makespan(problem) <= least * (1 + 1e-12)
  assert hybrid_placement(problem).makespan >= least * (1 - 1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_longest_processing_time_is_within_four_thirds(costs, groups):
  dealt = longest_processing_time(costs, groups)
  assert sorted(n for group in dealt for n in group) == list(range(len(costs)))
  least = min(
    max(
      sum(c for c, g in zip(costs, chosen, strict=True) if g == group)
      for group in range(groups)
    )
    for chosen in itertools.product(range(groups), repeat=len(costs))
  )
  loads = [sum(costs[n] for n in group) for group in dealt]
  assert 3 * max(loads) <= 4 * least


@pytest.mark.fast
def test_fixed_lanes_keep_their_groups_and_others_find_room():
  seconds = np.asarray([[4.0, 4.0, 4.0, 3.0], [2.0, 2.0, 2.0, 1.5]])
  problem = Problem(4, (1, 2), seconds)
  rows = np.asarray([0, 0, 1, 1])
  dealt = deal(problem, rows, {0: 2, 1: 3})
  # Lanes of two devices stay away from where they would go if dealt first.
  assert dealt.groups.tolist() == [2, 3, 0, 0]
  assert simulated(problem, placement(problem, dealt, "").turns) == 4.0
  assert deal(problem, rows).makespan == 5.5


@pytest.mark.fast
def test_a_group_waits_for_its_last_device():
  problem = Problem(2, (1, 2), np.asarray([[3.0, 8.0], [2.0, 5.0]]))
  first, second = placement(
    problem, deal(problem, np.asarray([0, 1])), ""
  ).turns
  assert (first.degree, second.lanes) == (2, (0, None))
  late = spans(problem, [second, first])
  assert [(s.lane, s.first, s.start, s.stop) for s in late] == [
    (0, 0, 0.0, 3.0),
    (1, 0, 3.0, 8.0),
  ]


@pytest.mark.fast
def test_a_program_finds_what_no_single_move_does():
  """17 like lanes on 8 devices: a third round for one would leave 7 idle."""
  alone = 6.0 - 0.1 * (np.arange(17) % 3)
  degrees = (1, 2, 4, 8)
  seconds = [alone / d * (1 + 0.1 * n) for n, d in enumerate(degrees)]
  problem = Problem(8, degrees, np.asarray(seconds))
  hybrid = hybrid_placement(problem)
  found = flexible_placement(problem, time_limit=60.0)
  assert found.way == "flexible"
  assert found.makespan < 1.03 * found.lower_bound
  assert found.makespan < 0.95 * hybrid.makespan


@pytest.mark.fast
def test_a_long_lane_takes_all_devices_and_short_ones_one():
  plan = chunk_plan([1024, *[16] * 64], 16)
  problem = placement_problem(plan, MODEL, devices=8, tokens_per_device=512)
  found = hybrid_placement(problem)
  (longest,) = (t for t in found.turns if 0 in t.lanes)
  assert longest.degree > 1
  assert static_placement(problem).turns[0].degree == 2
  assert found.makespan < 0.7 * static_placement(problem).makespan
  assert any(turn.degree == 1 for turn in found.turns)


@pytest.mark.fast
@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_place(way):
  problem = placement_problem(
    chunk_plan([], 16), MODEL, devices=8, tokens_per_device=16
  )
  found = way(problem)
  assert (found.turns, found.makespan, found.lower_bound) == ((), 0.0, 0.0)


@pytest.mark.fast
def test_what_fits_nowhere_is_named_with_what_would():
  plan = chunk_plan([300, 20], 16)

  def problem(devices, room):
    return placement_problem(
      plan, MODEL, devices=devices, tokens_per_device=room
    )

  with pytest.raises(
    ValueError,
    match=r"320 tokens takes room for 512.*\(1, 2, 4\) devices.*=100 is room "
    r"for 400.* tokens_per_device=128, or groups of 8 devices, or sequences of "
    r"at most 256 tokens",
  ):
    problem(12, 100)
  assert problem(8, 100).degrees == (1, 2, 4, 8)
  assert problem(12, 128).degrees == (1, 2, 4)
  with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
    problem(0, 100)
  with pytest.raises(ValueError, match=r"degree=1 .*; \[4, 8\] do"):
    static_placement(problem(8, 128), 1)
  with pytest.raises(ValueError, match="time_limit must be positive, got 0"):
    flexible_placement(problem(8, 128), time_limit=0)
  with pytest.raises(ValueError, match=r"degree=16 .* known are \(1, 2, 4, 8"):
    MODEL.seconds(Work(1, 16, 8), 16)


@pytest.mark.fast
def test_work_counts_what_is_seen():
  plan = chunk_plan([40, 3, 5], 16)
  assert [work.chunks for work in lane_works(plan)] == [3]
  triangle = sum(n * (n + 1) // 2 for n in (40, 3, 5))
  assert lane_works(plan)[0] == Work(3, 48, triangle)
  narrow = sum(min(i + 1, 4) for n in (40, 3, 5) for i in range(n))
  assert lane_works(plan, (None, 4))[0].pairs == (triangle + narrow) / 2


def timings(rng, noise):
  for size, chunks, degree in itertools.product(
    (128, 512), (1, 3, 10), MODEL.degrees
  ):
    tokens = size * chunks
    work = Work(chunks, tokens, tokens * (tokens + 1) / 2)
    error = 1 + noise * rng.standard_normal()
    yield Timing(work, degree, MODEL.seconds(work, degree) * error)


@pytest.mark.fast
def test_coefficients_are_found_again():
  model = fit_cost(timings(np.random.default_rng(0), 0.0))
  assert model.degrees == MODEL.degrees
  for name in ("chunk", "token", "pair"):
    np.testing.assert_allclose(
      getattr(model, name), getattr(MODEL, name), rtol=1e-9
    )
  np.testing.assert_allclose(model.exchange, MODEL.exchange, rtol=1e-9)


@pytest.mark.fast
def test_noise_of_a_hundredth_stays_in_the_times():
  model = fit_cost(timings(np.random.default_rng(0), 0.01))
  for timing in timings(np.random.default_rng(1), 0.0):
    # 24 timings for 6 coefficients: within three times the noise.
    np.testing.assert_allclose(
      model.seconds(timing.work, timing.degree), timing.seconds, rtol=0.03
    )
  np.testing.assert_allclose(model.pair, MODEL.pair, rtol=0.03)


@pytest.mark.fast
def test_timings_that_cannot_be_fitted():
  work = Work(1, 16, 100)
  with pytest.raises(ValueError, match=r"2 entries for 4 .* above 1: \[2\]"):
    fit_cost([Timing(work, 1, 1.0), Timing(work, 2, 1.0)])
  with pytest.raises(ValueError, match=r"timings\[1\] has seconds=0.0"):
    fit_cost([Timing(work, 1, s) for s in (1.0, 0.0, 1.0)])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 4))
def test_buckets_lose_least(values, most):
  values = sorted(values)

  def lost(ranges):
    return sum(values[b - 1] * (b - a) - sum(values[a:b]) for a, b in ranges)

  found = buckets_of(values, most)
  assert [n for a, b in found for n in range(a, b)] == list(range(len(values)))
  assert len(found) <= most
  least = min(
    lost(itertools.pairwise((0, *cuts, len(values))))
    for k in range(min(most, len(values)))
    for cuts in itertools.combinations(range(1, len(values)), k)
  )
  assert lost(found) == pytest.approx(least)
