"""Gradients over the devices of a layout are those of one."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jaxchunk as jc
from jaxchunk.chunking import executor, parallel
from jaxchunk.chunking.balance_cost import CostModel
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.turns import Hybrid, hybrid_turns, make_turns
from jaxchunk.models.adapters import add_lora
from jaxchunk.models.lora import LoRA
from jaxchunk.models.moe import MoE
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.rules import Rules
from jaxchunk.types import Batch
from tests.chunking.conftest import PLAIN, RICH, build, make_batch

# In chunks of 16: lanes of five chunks and of one, two kinds of programs.
_LONG = ((75, 9, 1), (70, 14))
_SMALL = dataclasses.replace(PLAIN, vocab_size=64, num_layers=2).frozen()
# One whole period of the window pattern, and a layer behind it.
_RICH = dataclasses.replace(RICH, vocab_size=64, num_layers=3).frozen()


@functools.cache
def reference(cfg):
  """Of whole sequences, on one device."""
  return jc.full_value_and_grad(build(cfg), make_batch(_LONG))


def compared(got, want, tolerance):
  (got_loss, got), (loss, grads) = got, want
  np.testing.assert_allclose(got_loss, loss, rtol=tolerance)
  assert jax.tree.structure(got) == jax.tree.structure(grads)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
    scale = np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def over(layout, model, **options):
  return jc.chunked_value_and_grad(
    model, make_batch(_LONG), chunk_size=16, layout=layout, **options
  )


@pytest.mark.parametrize(
  "layout, cfg, options",
  [
    (Layout(data=8), _SMALL, {}),
    (Layout(context=8), _SMALL, {"strategy": "layer_outer"}),
    (Layout(fsdp=8), _SMALL, {}),
    (Layout(data=4, tensor=2), _SMALL, {"strategy": "layer_outer"}),
    (Layout(data=2, context=4), _SMALL, {"live_chunks": 2}),
    (Layout(data=2, fsdp=4), _SMALL, {"strategy": "layer_outer"}),
    (Layout(fsdp=4, context=2), _SMALL, {"keep": "inputs"}),
    (Layout(fsdp=4, tensor=2), _RICH, {"strategy": "layer_outer"}),
    (Layout(fsdp=4, tensor=2, gather="step"), _SMALL, {}),
    (Layout(context=4, tensor=2), _RICH, {"live_chunks": 0}),
  ],
  ids=lambda value: "rich" if value == _RICH else str(value)[:40],
)
def test_every_layout_gives_what_one_device_gives(x64, layout, cfg, options):
  got = over(layout, build(cfg), **options)
  compared(got, reference(cfg), 1e-11)
  shards = Shards.of(build(cfg), layout).specs or itertools.repeat(())
  for grad, spec in zip(jax.tree.leaves(got[1]), shards, strict=False):
    wanted = NamedSharding(layout.mesh(), PartitionSpec(*spec))
    assert grad.sharding.is_equivalent_to(wanted, grad.ndim)


def test_in_fp32_with_dropout_and_adapters():
  layout = Layout(fsdp=2, context=2, tensor=2)
  cfg = dataclasses.replace(_SMALL, dropout=0.2)
  lora = LoRA(rank=2, alpha=4.0, dora=True)
  model = add_lora(build(cfg, "float32"), lora)
  options = {"rng": jax.random.key(3), "trainable": nnx.LoRAParam}
  want = jc.chunked_value_and_grad(
    model, make_batch(_LONG), chunk_size=16, **options
  )
  compared(over(layout, model, **options), want, 1e-5)


_EXPERTS = dataclasses.replace(
  _SMALL,
  moe=MoE(
    num_experts=4,
    experts_per_token=2,
    d_ff=16,
    shared_d_ff=24,
    balance_loss=0.1,
    z_loss=0.01,
  ),
).frozen()


@pytest.mark.parametrize(
  "layout",
  [
    Layout(data=2, expert=4),
    Layout(expert=2, fsdp=2, context=2),
    Layout(expert=2, tensor=2, data=2),
  ],
  ids=str,
)
def test_experts_over_devices_and_their_balance_over_all_lanes(x64, layout):
  got = over(layout, build(_EXPERTS), strategy="layer_outer")
  compared(got, reference(_EXPERTS), 1e-11)


def test_each_lane_on_as_many_devices_as_it_needs(x64):
  """Two long lanes on four devices each, the short ones on one."""
  model = build(_SMALL)
  exchange = ((2, 2.0), (4, 2.0))
  cost = CostModel(chunk=0.0, token=1.0, pair=0.01, exchange=exchange)
  hybrid = Hybrid(tokens_per_device=32, cost=cost)
  examples = Batch.of(make_batch(_LONG)).examples()
  options = executor.make_options(model, chunk_size=16)
  sums = parallel.accumulate_over(
    Layout(data=8), model, examples, options, hybrid=hybrid
  )
  turns = hybrid_turns(Layout(data=8), sums.plan, hybrid, _SMALL)
  assert [turn.context for turn in turns] == [4, 1]
  grads = jax.tree.map(lambda g: g / sums.weight, sums.grads)
  compared((sums.loss / sums.weight, grads), reference(_SMALL), 1e-11)
  with pytest.raises(
    ValueError, match=r"whole parameters .* is Layout\(data=8\)"
  ):
    parallel.accumulate_over(
      Layout(fsdp=8), model, examples, options, hybrid=hybrid
    )


def test_lanes_are_timed_on_groups_of_every_size():
  model = build(_SMALL, "float32")
  options = executor.make_options(model, chunk_size=16)
  found = parallel.timings_over(
    Layout(data=8), model, options, (1, 2), chunks=(2,), rounds=1
  )
  assert [(t.degree, t.work.chunks) for t in found] == [(1, 2), (2, 2)]
  assert all(t.seconds > 0 for t in found)


def test_the_loss_alone_over_devices():
  model = build(_SMALL, "float32")
  options = executor.make_options(model, chunk_size=16)
  examples = Batch.of(make_batch(_LONG)).examples()
  want = executor.loss_sum(model, examples, chunk_size=16)
  got = parallel.loss_sum_over(
    Layout(fsdp=2, context=2, tensor=2), model, examples, options
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)


@given(
  st.lists(st.integers(1, 9), min_size=1, max_size=30),
  st.sampled_from(((), ("fsdp",), ("data", "fsdp"))),
)
def test_teams_run_as_many_chunks_as_their_longest_lane(chunks, lockstep):
  layout = Layout(data=3, fsdp=2)
  turns = make_turns(layout, lockstep, chunks, chunks)
  run = [n for turn in turns for n in turn.lanes if n is not None]
  assert sorted(run) == list(range(len(chunks)))
  for turn in turns:
    for group, lane in enumerate(turn.lanes):
      assert turn.counts[group] >= (1 if lane is None else chunks[lane])
    grid = np.reshape(turn.counts, (3, 2))
    if "fsdp" in lockstep:
      assert (grid[:, 0] == grid[:, 1]).all()
    if "data" in lockstep:
      assert len(set(turn.counts)) == 1
    most = max(chunks[n] for n in turn.lanes if n is not None)
    assert max(turn.counts) == most


def test_what_a_layout_cannot_do_is_named():
  model, batch = build(PLAIN, "float32"), make_batch(_LONG)

  def run(layout, **options):
    jc.chunked_value_and_grad(
      model, batch, layout=layout, **{"chunk_size": 16} | options
    )

  with pytest.raises(ValueError, match=r"num_layers=3 cannot .* 8 stages"):
    run(Layout(stage=8))
  with pytest.raises(
    ValueError, match=r"num_kv_heads=2; .* is Layout\(context=4, tensor=2\)"
  ):
    run(Layout(context=2, tensor=4))
  with pytest.raises(ValueError, match=r"embed has 61 along 'vocab'.* is 1"):
    run(Layout(context=4, tensor=2))
  with pytest.raises(ValueError, match=r"chunk_size=12 .*=8 devices; take 16"):
    run(Layout(context=8), chunk_size=12)
  with pytest.raises(ValueError, match=r"takes 4 devices and there are 8"):
    run(Layout(context=4))
  with pytest.raises(NotImplementedError, match="kv_memory='host'"):
    run(Layout(data=8), kv_memory="host")


@pytest.mark.parametrize(
  "rules",
  [
    {"vocab": "fsdp", "embed": None},
    {"heads": ("fsdp", "tensor"), "kv_heads": ("fsdp", "tensor")},
    {"layers": "fsdp", "embed": None},
    {"lane": "data"},
    {"embed": "tensor", "vocab": None},
  ],
  ids=str,
)
def test_rules_that_chunks_cannot_run_with_are_named(rules):
  model = build(_SMALL, "float32")
  layout = Layout(fsdp=4, tensor=2, rules=Rules(rules))
  with pytest.raises(ValueError, match=r"rule '(\w+)' is .* chunks run with"):
    over(layout, model)
