"""Packed documents do not see each other; broken masks are caught."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxchunk as jc
from jaxchunk.chunking.executor import make_options
from jaxchunk.evaluation import isolation
from jaxchunk.evaluation.isolation import MASKS, attention_leaks, model_leaks
from jaxchunk.evaluation.isolation_paged import paged_leaks
from jaxchunk.kernels.paged_attention import pallas_tpu, xla
from jaxchunk.kernels.paged_attention.pages import PageView
from jaxchunk.kernels.paged_attention.reference import paged_reference
from tests.chunking.conftest import RICH, build

LENGTH = 64


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["reference", "xla"])
def test_attention(name, mask):
  run = isolation.operation(name)
  assert not attention_leaks(run, MASKS[mask], packings=16)


@pytest.mark.parametrize("mask", ["sinks", "table"])
def test_the_tpu_kernels_interpreted(mask):
  run = isolation.operation("pallas_tpu", True)
  assert not attention_leaks(run, MASKS[mask], packings=8)


def dropped(mask):
  return dataclasses.replace(mask, q_segment_ids=None, kv_segment_ids=None)


def shifted(mask):
  """Boundaries one key early: the last key belongs to the next document."""
  ids = mask.kv_segment_ids
  moved = jnp.concatenate([ids[:, 1:], ids[:, -1:]], axis=1)
  return dataclasses.replace(mask, kv_segment_ids=moved)


def by_blocks(mask):
  """Blocks in which any key is visible are visible as a whole."""
  ids, size = np.asarray(mask.q_segment_ids), 8
  B, T = ids.shape
  blocks = ids.reshape(B, T // size, 1, size, 1)
  keys = ids.reshape(B, 1, T // size, 1, size)
  live = (blocks == keys).any((-1, -2))
  table = np.where(live, np.arange(T // size), -1)[:, None]
  table = jc.AttentionMask.blocks(table, q_block=size, kv_block=size)
  return dropped(mask) & table


@pytest.mark.parametrize("broken", [dropped, shifted, by_blocks])
def test_broken_masks_are_caught(broken):
  run = isolation.operation("reference")
  leaks = attention_leaks(
    lambda inputs, mask: run(inputs, broken(mask)),
    MASKS["both ways"],
    packings=16,
  )
  assert {leak.what for leak in leaks} == {"o", "lse", "dq", "dk", "dv"}
  assert all(leak.changed[1] != leak.harmed[1] for leak in leaks)
  if broken is shifted:
    # The harmed document is the neighbour of the one that was changed.
    assert {abs(x.changed[1] - x.harmed[1]) for x in leaks} == {1}
  assert "document" in str(leaks[0])


WAYS = {
  "no live chunk": {"live_chunks": 0, "strategy": "chunk_outer"},
  "two live chunks": {"live_chunks": 2, "strategy": "chunk_outer"},
  "layer outer": {"strategy": "layer_outer"},
  "drawn chunks": {"strategy": jc.SpaCO(0.5)},
}


@pytest.fixture(scope="module")
def model():
  return build(RICH, "float32")


@pytest.mark.parametrize("way", WAYS)
def test_model_by_chunks(model, way):
  options = make_options(model, chunk_size=16, **WAYS[way])
  run = isolation.by_chunks(model, options, jax.random.key(0))
  assert not model_leaks(
    run, vocab_size=model.cfg.vocab_size, packings=4, length=LENGTH
  )


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_model_in_whole_rows(model, name):
  run = isolation.in_whole_rows(model, name)
  arguments = {"vocab_size": model.cfg.vocab_size, "length": LENGTH}
  assert not model_leaks(run, packings=4, **arguments)

  def forgetful(batch):
    segments = (batch.segment_ids > 0).astype(np.int32)
    return run(dataclasses.replace(batch, segment_ids=segments))

  leaks = model_leaks(forgetful, packings=4, **arguments)
  assert {leak.what for leak in leaks} == {"nll", "gradient"}


PAGED = {
  "reference": paged_reference,
  "xla": xla.paged_forward,
  "pallas_tpu": functools.partial(pallas_tpu.tpu_paged_forward, interpret=True),
}


@pytest.mark.parametrize("name", PAGED)
def test_rows_of_a_paged_cache(name):
  assert not paged_leaks(PAGED[name], packings=8)


@pytest.mark.parametrize("name", PAGED)
def test_a_page_of_another_row_is_caught(name):
  def broken(q, pages, view, *args, **options):
    first = jnp.roll(view.table[:, :, 0], 1, axis=0)
    view = PageView(view.table.at[:, :, 0].set(first), view.lengths)
    return PAGED[name](q, pages, view, *args, **options)

  leaks = paged_leaks(broken, packings=8)
  assert {leak.what for leak in leaks} == {"o", "lse"}
  assert all(leak.changed != leak.harmed for leak in leaks)
