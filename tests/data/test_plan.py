import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchunk.data.plan import (
  batch_documents,
  batch_end,
  plan_epoch,
  shuffled_order,
)

_CORPORA = st.lists(
  st.tuples(st.integers(2, 300), st.booleans()), min_size=1, max_size=60
).filter(lambda documents: any(kept for _, kept in documents))


def _batches(lengths, kept, budget, *, seed=0, epoch=0, start=0):
  plan = plan_epoch(lengths, kept, seed=seed, epoch=epoch)
  places = [start]
  while places[-1] < len(lengths):
    places.append(batch_end(plan, places[-1], budget))
  return plan, places


@pytest.mark.fast
@settings(max_examples=200)
@given(_CORPORA, st.integers(1, 400), st.integers(0, 9))
def test_every_document_once_within_the_budget(documents, budget, epoch):
  lengths, kept = (
    np.asarray(column) for column in zip(*documents, strict=True)
  )
  plan, places = _batches(lengths, kept, budget, epoch=epoch)
  delivered = []
  for i, (start, end) in enumerate(itertools.pairwise(places)):
    ids = batch_documents(plan, start, end)
    assert len(ids) > 0
    positions = (lengths[ids] - 1).sum()
    # Alone if too long; else as many as fit: the next would not have.
    assert len(ids) == 1 or positions <= budget
    if i + 2 < len(places):
      following = batch_documents(plan, end, places[i + 2])[0]
      assert positions + lengths[following] - 1 > budget
    delivered += ids.tolist()
  assert sorted(delivered) == np.flatnonzero(kept).tolist()
  assert delivered == [d for d in plan.order if kept[d]]


def test_long_document_goes_alone():
  lengths = np.asarray([10, 10, 1000, 10])
  plan, places = _batches(lengths, np.ones(4, bool), 100)
  groups = [
    set(batch_documents(plan, a, b).tolist())
    for a, b in itertools.pairwise(places)
  ]
  assert {2} in groups


@pytest.mark.fast
def test_order_is_a_permutation_new_in_every_epoch_and_fixed_for_ever():
  orders = [
    tuple(shuffled_order(50, seed=seed, epoch=epoch).tolist())
    for seed in range(3)
    for epoch in range(4)
  ]
  assert len(set(orders)) == 12
  assert all(sorted(order) == list(range(50)) for order in orders)
  # A cursor of an old run must mean the same for ever: do not change this.
  assert shuffled_order(8, seed=1, epoch=2).tolist() == [7, 5, 6, 1, 4, 3, 0, 2]


@pytest.mark.fast
@given(_CORPORA, st.sets(st.integers(2, 300), max_size=3), st.integers(0, 9))
def test_stages_go_from_short_to_long_and_lose_nothing(
  documents, bounds, epoch
):
  lengths, kept = (
    np.asarray(column) for column in zip(*documents, strict=True)
  )
  bounds = sorted(bounds)
  plan = plan_epoch(lengths, kept, seed=0, epoch=epoch, stages=bounds)
  assert sorted(plan.order) == list(range(len(lengths)))
  shuffled = shuffled_order(len(lengths), seed=0, epoch=epoch).tolist()
  stages = [sum(n > bound for bound in bounds) for n in lengths]
  want = sorted(shuffled, key=lambda d: stages[d])
  assert plan.order.tolist() == want
  assert plan.before[-1] == (lengths - 1)[kept].sum()
