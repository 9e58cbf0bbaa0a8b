"""Gradients over the devices of a layout are those of one."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxchunk as jc
from jaxchunk.chunking.parallel import balanced
from jaxchunk.models.adapters import add_lora
from jaxchunk.models.lora import LoRA
from jaxchunk.sharding.mesh import Layout
from tests.chunking.conftest import PLAIN, RICH, build, make_batch

_LONG = ((75, 9, 1), (37, 14), (30, 30))


def compared(model, layout, tolerance, **options):
  batch = make_batch(_LONG)
  loss, grads = jc.chunked_value_and_grad(model, batch, **options)
  got_loss, got = jc.chunked_value_and_grad(
    model, batch, layout=layout, **options
  )
  np.testing.assert_allclose(got_loss, loss, rtol=tolerance)
  assert jax.tree.structure(got) == jax.tree.structure(grads)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
    scale = np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)
    assert a.sharding.is_fully_replicated


@pytest.mark.parametrize(
  "layout, cfg, strategy, live_chunks",
  [
    (Layout(data=8), PLAIN, "chunk_outer", 1),
    (Layout(context=8), PLAIN, "layer_outer", 1),
    (Layout(data=2, context=4), RICH, "chunk_outer", 2),
  ],
  ids=str,
)
def test_every_layout_gives_what_one_device_gives(
  x64, layout, cfg, strategy, live_chunks
):
  model = build(cfg)
  compared(
    model,
    layout,
    1e-11,
    chunk_size=16,
    strategy=strategy,
    live_chunks=live_chunks,
  )


def test_in_fp32_with_dropout_and_adapters():
  cfg = dataclasses.replace(PLAIN, dropout=0.2)
  model = add_lora(build(cfg, "float32"), LoRA(rank=2, alpha=4.0))
  compared(
    model,
    Layout(data=4, context=2),
    1e-5,
    chunk_size=16,
    rng=jax.random.key(3),
    trainable=nnx.LoRAParam,
  )


@given(
  st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 9)
)
def test_lanes_are_dealt_out_evenly(costs, groups):
  dealt = balanced(costs, groups)
  assert sorted(n for group in dealt for n in group) == list(range(len(costs)))
  loads = [sum(costs[n] for n in group) for group in dealt]
  least = max(sum(costs) / groups, max(costs))
  assert max(loads) <= 4 / 3 * least + max(costs) / 3


def test_what_a_layout_cannot_do_is_named():
  model, batch = build(PLAIN, "float32"), make_batch(_LONG)

  def run(layout, **options):
    jc.chunked_value_and_grad(
      model, batch, layout=layout, **{"chunk_size": 16} | options
    )

  with pytest.raises(
    NotImplementedError, match=r"tensor=2: .* is Layout\(data=2, context=4\)"
  ):
    run(Layout(context=4, tensor=2))
  with pytest.raises(ValueError, match=r"chunk_size=12 .*=8 devices; take 16"):
    run(Layout(context=8), chunk_size=12)
  with pytest.raises(ValueError, match=r"takes 4 devices and there are 8"):
    run(Layout(context=4))
  with pytest.raises(NotImplementedError, match="kv_memory='host'"):
    run(Layout(data=8), kv_memory="host")
