"""Losses of routers over the batch are those of whole rows."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxchunk as jc
from jaxchunk.chunking.executor import (
  accumulate,
  counts_program,
  lane_program,
  loss_sum,
  make_options,
  warm_up,
)
from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.models.moe import MoE
from jaxchunk.types import Batch
from tests.chunking.conftest import PLAIN, build, make_batch, worst

MOE = MoE(num_experts=5, experts_per_token=2, d_ff=12, balance_loss=0.7)
BOTH = dataclasses.replace(MOE, z_loss=0.3, shared_d_ff=8)
# In chunks of 16, a lane of three and one of packed sequences.
LENGTHS = ((40, 9), (20,))
CFG = dataclasses.replace(PLAIN, window_pattern=(9, None), moe=BOTH)
SMALL = dataclasses.replace(PLAIN, num_layers=1, moe=BOTH)
# (chunk size, live chunks, strategy, keep)
CUTS = [
  (16, 1, "chunk_outer", "inputs"),
  (64, 1, "chunk_outer", "all"),
  (19, 1, "layer_outer", "all"),
]


@pytest.fixture(scope="module")
def truth():
  with jax.enable_x64(True):
    return jc.full_value_and_grad(build(CFG), make_batch(LENGTHS))


def check(got, want):
  assert abs(got[0] - want[0]) <= 1e-11 * want[0]
  assert worst(got[1], want[1]) <= 1e-11


@pytest.mark.parametrize("size,live,strategy,keep", CUTS)
def test_any_cut_has_the_losses_of_whole_rows(
  x64, truth, size, live, strategy, keep
):
  got = jc.chunked_value_and_grad(
    build(CFG),
    make_batch(LENGTHS),
    chunk_size=size,
    live_chunks=live,
    strategy=strategy,
    keep=keep,
  )
  check(got, truth)


def repacked(batch):
  """The same sequences, one a row and in another order."""
  examples = Batch.of(batch).examples()[::-1]
  width = max(map(len, examples))
  rows = {}
  for name in ("tokens", "targets", "weights", "positions"):
    rows[name] = np.stack(
      [np.pad(getattr(e, name), (0, width - len(e))) for e in examples]
    )
  rows["segment_ids"] = np.stack(
    [(np.arange(width) < len(e)).astype(np.int32) for e in examples]
  )
  return rows


def test_any_packing_has_the_same_losses(x64, truth):
  batch = repacked(make_batch(LENGTHS))
  check(jc.full_value_and_grad(build(CFG), batch), truth)
  got = jc.chunked_value_and_grad(build(CFG), batch, chunk_size=64)
  check(got, truth)


def test_a_z_loss_alone_needs_one_phase():
  moe = dataclasses.replace(BOTH, balance_loss=0.0)
  model = build(dataclasses.replace(SMALL, moe=moe), "float32")
  batch = make_batch(((20,),))
  counted = counts_program._cache_size()
  got = jc.chunked_value_and_grad(model, batch, chunk_size=32)
  assert counts_program._cache_size() == counted
  want = jc.full_value_and_grad(model, batch)
  assert abs(got[0] - want[0]) <= 1e-6 * want[0]
  assert worst(got[1], want[1]) <= 1e-5
  # There is something to see: the other part of the loss is less.
  examples = Batch.of(batch).examples()
  nll = loss_sum(model, examples, chunk_size=32)
  assert nll / sum(e.weights.sum() for e in examples) < 0.99 * got[0]


def test_warming_up_compiles_both_phases():
  model = build(SMALL, "float32")
  options = make_options(model, chunk_size=32)
  warm_up(model, 20, options)
  programs = counts_program._cache_size(), lane_program._cache_size()
  accumulate(model, Batch.of(make_batch(((20,),))).examples(), options)
  assert programs == (
    counts_program._cache_size(),
    lane_program._cache_size(),
  )


@pytest.mark.fast
def test_what_does_not_go_with_losses_of_routers_is_named():
  model, batch = build(CFG, "float32"), make_batch(LENGTHS)
  with pytest.raises(ValueError, match=r"strategy=SpaCO.* does not go with"):
    make_options(model, chunk_size=16, strategy=SpaCO(rate=0.5))
  for value_and_grad in (
    jc.full_value_and_grad,
    lambda *a, **k: jc.chunked_value_and_grad(*a, **k, chunk_size=16),
  ):
    with pytest.raises(ValueError, match=r"loss=\.\.\. does not go with moe="):
      value_and_grad(model, batch, loss=lambda nll, weight: nll.sum())


@pytest.mark.fast
def test_the_program_of_a_lane_can_be_lowered():
  model = build(SMALL, "float32")
  lowered = jc.lower_chunked(model, capacity=64, chunk_size=32)
  assert "func.func public @main" in lowered.as_text()
