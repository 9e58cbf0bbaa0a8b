"""Pipelines of stages compute what one device computes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking import chunk_outer, executor, parallel, pipeline
from jaxchunk.chunking.delayed import Delayed, delayed_steps, start_delayed
from jaxchunk.chunking.staging import Staging
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.pallas_gpu import gpu_backward
from jaxchunk.kernels.attention.tpu.work import choose_blocks
from jaxchunk.kernels.state import ChunkPlace
from jaxchunk.kernels.state_arena import KVArena
from jaxchunk.models.adapters import add_lora
from jaxchunk.models.lora import LoRA
from jaxchunk.models.moe import MoE
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.measure import Clock
from jaxchunk.sharding.pipeline.table import Lanes, Placement
from jaxchunk.sharding.pipeline.tables import BUILDERS, Pipeline, one_f_one_b
from jaxchunk.sharding.pipeline.timeline import check_timeline
from jaxchunk.sharding.rules import Rules
from jaxchunk.sharding.state import KVContext
from jaxchunk.types import Batch
from tests.chunking.conftest import PLAIN, RICH, build, make_batch

# In chunks of 16: lanes of five chunks and of one.
_LONG = ((75, 9, 1), (70, 14))
_PACKED = ((9, 5, 2), (7, 3, 6), (15,), (11, 4), (16,))
_PLAIN = dataclasses.replace(PLAIN, vocab_size=64, num_layers=16).frozen()
_TIED = dataclasses.replace(_PLAIN, tie_embeddings=True).frozen()
_SMALL = dataclasses.replace(PLAIN, vocab_size=64, num_layers=4).frozen()
# Four periods of two and a layer behind them.
_RICH = dataclasses.replace(RICH, vocab_size=64, num_layers=9).frozen()
_EVERYWHERE = Rules({"vocab": ("stage", "tensor")})


@functools.cache
def reference(cfg, dtype="float64", rows=_LONG):
  """Of whole sequences, on one device."""
  return jc.full_value_and_grad(build(cfg, dtype), make_batch(rows))


def compared(got, want, tolerance):
  (got_loss, got), (loss, grads) = got, want
  np.testing.assert_allclose(got_loss, loss, rtol=tolerance)
  assert jax.tree.structure(got) == jax.tree.structure(grads)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
    scale = np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def over(layout, model, *, live=1, rows=_LONG, **options):
  """On as many devices as the layout takes."""
  examples = Batch.of(make_batch(rows)).examples()
  rng = options.pop("rng", None)
  options = executor.make_options(
    model, chunk_size=16, live_chunks=live, strategy="chunk_outer", **options
  )
  mesh = layout.mesh(jax.devices()[: layout.num_devices])
  sums = pipeline.accumulate_stages(
    layout, model, examples, options, mesh=mesh, rng=rng
  )
  grads = jax.tree.map(lambda g: g / sums.weight, sums.grads)
  return sums.loss / sums.weight, grads


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("schedule", list(BUILDERS))
def test_every_schedule_gives_what_one_device_gives(x64, schedule, stages):
  """Head on the last stage, and over all; each with tied embeddings or not."""
  number = list(BUILDERS).index(schedule) + stages
  everywhere = number % 3 != 0
  cfg = _TIED if number % 2 else _PLAIN
  layout = Layout(
    stage=stages,
    rules=_EVERYWHERE if everywhere else Rules(),
    pipeline=Pipeline(schedule=schedule),
  )
  got = over(layout, build(cfg), live=(9, 1, 0)[number % 3])
  compared(got, reference(cfg), 1e-11)


@pytest.mark.parametrize(
  "layout",
  [
    Layout(stage=2, data=4),
    Layout(stage=2, fsdp=2, tensor=2),
    Layout(stage=2, tensor=2, context=2, rules=_EVERYWHERE),
    Layout(stage=2, data=2, fsdp=2, gather="step", rules=_EVERYWHERE),
    Layout(stage=4, tensor=2, pipeline=Pipeline(schedule="zb_h1")),
    Layout(stage=2, context=4, pipeline=Pipeline(schedule="v_half")),
    Layout(
      stage=2, fsdp=4, rules=_EVERYWHERE, pipeline=Pipeline(schedule="zb_v")
    ),
  ],
  ids=str,
)
def test_with_every_other_axis(x64, layout):
  compared(over(layout, build(_SMALL), live=2), reference(_SMALL), 1e-11)


@pytest.mark.parametrize(
  "stages, pipe",
  [
    (4, Pipeline()),
    (2, Pipeline(schedule="v_half")),
    (2, Pipeline(layers=(6, 3))),
  ],
  ids=str,
)
def test_uneven_stages_with_windows_and_all_else(x64, stages, pipe):
  layout = Layout(stage=stages, data=2, pipeline=pipe)
  compared(over(layout, build(_RICH), live=2), reference(_RICH), 1e-11)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "interleaved"])
def test_packed_microbatches_in_fp32(schedule):
  layout = Layout(stage=2, data=2, pipeline=Pipeline(schedule=schedule))
  model = build(_SMALL, "float32")
  got = over(layout, model, rows=_PACKED)
  compared(got, reference(_SMALL, "float32", _PACKED), 1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_dropout_and_adapters(schedule):
  cfg = dataclasses.replace(_SMALL, dropout=0.2)
  model = add_lora(build(cfg, "float32"), LoRA(rank=2, alpha=4.0, dora=True))
  options = {"rng": jax.random.key(3), "trainable": nnx.LoRAParam}
  want = jc.chunked_value_and_grad(
    model, make_batch(_LONG), chunk_size=16, **options
  )
  layout = Layout(stage=2, tensor=2, pipeline=Pipeline(schedule=schedule))
  compared(over(layout, model, **options), want, 1e-5)


def test_experts_whose_gradients_wait(x64):
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=16, shared_d_ff=24)
  cfg = dataclasses.replace(_SMALL, moe=moe).frozen()
  layout = Layout(stage=2, expert=2, pipeline=Pipeline(schedule="zb_h1"))
  compared(over(layout, build(cfg)), reference(cfg), 1e-11)


@pytest.mark.fast
def test_the_public_call_and_where_gradients_are(x64):
  layout = Layout(stage=4, data=2)
  got = jc.chunked_value_and_grad(
    build(_SMALL), make_batch(_LONG), chunk_size=16, layout=layout
  )
  compared(got, reference(_SMALL), 1e-11)
  kernel = jax.tree.leaves(got[1]["blocks"])[0]
  assert kernel.addressable_shards[0].data.shape[0] == 1


def test_one_device_runs_the_table_of_one_stage():
  """The same operations in the same order as the lane program's."""
  for size, live in ((1, 1), (5, 0), (5, 2), (5, 9)):
    table = one_f_one_b(1, Lanes((size,), live))
    ops = [(op.kind, op.item) for _, _, op in table.ops()]
    assert ops == chunk_outer.schedule(size, live)


def test_smaller_batches_run_the_program_of_larger_ones():
  """One program, also for lanes that are kept as a whole, and fewer ticks."""
  # A model of its own, because rooms are remembered by what runs.
  cfg = dataclasses.replace(_SMALL, norm_eps=3e-6).frozen()
  layout, model = Layout(stage=2), build(cfg, "float32")
  before = pipeline.stage_program._cache_size()
  for rows in (((75, 9, 1), (70, 60, 14)), ((15,), (11, 4)), ((40, 3),)):
    got = over(layout, model, rows=rows)
    compared(got, jc.full_value_and_grad(model, make_batch(rows)), 1e-5)
  assert pipeline.stage_program._cache_size() == before + 1


def test_batches_of_all_kinds_run_few_programs():
  """Slots only grow, so that a batch seen before compiles nothing."""
  layout, model = Layout(stage=2), build(_SMALL, "float32")
  batches = [_LONG, _PACKED, ((40, 3),)]
  for rows in batches:
    over(layout, model, rows=rows)
  for rows in batches:
    over(layout, model, rows=rows)
  before = pipeline.stage_program._cache_size()
  for rows in batches:
    over(layout, model, rows=rows)
  assert pipeline.stage_program._cache_size() == before


@pytest.mark.parametrize("layers", [None, (2, 3, 2, 4)])
def test_layers_find_their_stage_and_the_way_back(layers):
  cfg = dataclasses.replace(PLAIN, num_layers=11).frozen()
  staging = Staging.of(cfg, Placement.vee(2), layers)
  assert [staging.layers(n) for n in range(4)] == list(layers or (3, 3, 3, 2))
  to, back = staging.rows(0)
  np.testing.assert_array_equal(to[back], np.arange(11))
  assert len(to) == 4 * staging.room


@pytest.mark.parametrize(
  "layout, options, error, message",
  [
    (Layout(stage=8), {}, ValueError, "num_layers=4 cannot be .* 8 stages"),
    (
      Layout(stage=2, pipeline=Pipeline(layers=(3, 2))),
      {},
      ValueError,
      "add up to num_layers=4",
    ),
    (
      Layout(stage=2),
      {"strategy": "layer_outer"},
      ValueError,
      "take strategy='chunk_outer'",
    ),
    (
      Layout(stage=2),
      {"kv_memory": "host"},
      NotImplementedError,
      "one device",
    ),
  ],
  ids=str,
)
def test_what_cannot_run_says_why(layout, options, error, message):
  model = build(_SMALL, "float32")
  mesh = layout.mesh(jax.devices()[: layout.num_devices])
  options = {"strategy": "chunk_outer", **options}
  options = executor.make_options(model, chunk_size=16, **options)
  examples = Batch.of(make_batch(_LONG)).examples()
  with pytest.raises(error, match=message):
    pipeline.accumulate_stages(layout, model, examples, options, mesh=mesh)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_clock_notes_the_table_that_ran(schedule):
  """Every operation once, in order, none on two devices before its input."""
  layout = Layout(stage=2, pipeline=Pipeline(schedule=schedule))
  model, clock = build(_SMALL, "float32"), Clock()
  options = executor.make_options(model, chunk_size=16, strategy="chunk_outer")
  examples = Batch.of(make_batch(_LONG)).examples()
  mesh = layout.mesh(jax.devices()[:2])
  sums = pipeline.accumulate_stages(
    layout, model, examples, options, mesh=mesh, clock=clock
  )
  jax.block_until_ready(sums.grads)
  dealt = pipeline.deal_lanes(layout, model, examples, options)
  table = layout.pipeline.table(2, Lanes(dealt.sizes, 1))
  timeline = clock.timeline(table)
  check_timeline(table, timeline)
  ends = {span[1:4]: span.stop for span in timeline.spans}
  for span in timeline.spans:
    assert span.start < span.stop
    if span.kind == "B" and span.stage == 0:
      assert ends["B", 1, span.item] < span.start
  with pytest.raises(ValueError, match="run it once, behind `clear`"):
    clock.timeline(layout.pipeline.table(2, 1))


def test_a_schedule_that_there_is_not():
  with pytest.raises(
    ValueError, match=r"pipeline\.schedule='dapple' is not one"
  ):
    Pipeline(schedule="dapple")


def plain_delayed(model, batches, delayed):
  """PipeDream-2BW on whole sequences: W[t+1] from the gradient at W[t-1]."""
  weights = [nnx.state(model)]
  opt_state = delayed.optimizer.init(jax.tree.leaves(weights[0]))
  losses, last = [], None
  for t, batch in enumerate(batches):
    loss, grads = jc.full_value_and_grad(
      nnx.merge(nnx.graphdef(model), weights[max(t - 1, 0)]), batch
    )
    losses.append(loss)
    grads = jax.tree.leaves(grads)
    if delayed.clip_norm is not None:
      norm = jnp.sqrt(sum(jnp.sum(g**2) for g in grads))
      grads = [g * jnp.minimum(1.0, delayed.clip_norm / norm) for g in grads]
    newest, treedef = jax.tree.flatten(weights[-1])
    change, opt_state = delayed.optimizer.update(grads, opt_state, newest)
    whole = change
    if last is not None:
      c = delayed.correction
      whole = [u + c * (u - old) for u, old in zip(change, last, strict=True)]
    last = change
    new = [w + u for w, u in zip(newest, whole, strict=True)]
    weights.append(jax.tree.unflatten(treedef, new))
  return jnp.stack(losses), weights[-1]


@pytest.mark.parametrize(
  "layout, cfg, delayed",
  [
    (Layout(stage=2), _SMALL, Delayed(optimizer=optax.sgd(0.1))),
    (
      Layout(stage=4, data=2, rules=_EVERYWHERE),
      dataclasses.replace(_SMALL, tie_embeddings=True).frozen(),
      Delayed(optimizer=optax.adam(1e-2), clip_norm=0.5, correction=0.5),
    ),
    (
      Layout(stage=2, fsdp=2, tensor=2),
      _SMALL,
      Delayed(optimizer=optax.adamw(1e-2), clip_norm=0.5),
    ),
  ],
  ids=["plain", "tied", "split"],
)
def test_a_delay_of_exactly_one_step(x64, layout, cfg, delayed):
  """In one call, and in two that go on from each other."""
  shapes = (((30, 9), (40,)), _PACKED, ((16,), (20, 3)), ((33,), (9, 8)))
  batches = [make_batch(rows, seed=n) for n, rows in enumerate(shapes)]
  model = build(cfg)
  losses, weights = plain_delayed(model, batches, delayed)
  examples = [Batch.of(b).examples() for b in batches]
  options = executor.make_options(model, chunk_size=16, strategy="chunk_outer")
  mesh = layout.mesh(jax.devices()[: layout.num_devices])
  for cuts in ((0, 4), (0, 3, 4)):
    state, found = start_delayed(model, options, delayed), []
    for a, b in itertools.pairwise(cuts):
      state, part = delayed_steps(
        layout, state, examples[a:b], options, delayed, mesh=mesh
      )
      found.append(part)
    np.testing.assert_allclose(np.concatenate(found), losses, rtol=1e-11)
    got = jax.tree.leaves(nnx.state(state.model))
    for a, b in zip(got, jax.tree.leaves(weights), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    assert int(state.steps) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_delayed_steps_of_adapters_use_up_only_what_they_made(dtype):
  model = add_lora(build(_SMALL, dtype), LoRA(rank=2, alpha=4.0))
  layout, batch = Layout(stage=2), Batch.of(make_batch(_LONG)).examples()
  mesh = layout.mesh(jax.devices()[:2])
  delayed = Delayed(optimizer=optax.adamw(1e-2), correction=0.5)
  options = executor.make_options(
    model, chunk_size=16, strategy="chunk_outer", trainable=nnx.LoRAParam
  )
  # Where it stays, so that nothing is a copy.
  model = parallel.place_model(layout, model, mesh)
  start = start_delayed(model, options, delayed)
  state, losses = delayed_steps(
    layout, start, [batch, batch], options, delayed, mesh=mesh
  )
  assert all(np.isfinite(losses)) and losses[0] == losses[1]
  assert all(a.is_deleted() for a in start.previous)
  frozen = nnx.state(model, nnx.Not(nnx.LoRAParam))
  for old, new in zip(
    jax.tree.leaves(frozen),
    jax.tree.leaves(nnx.state(state.model, nnx.Not(nnx.LoRAParam))),
    strict=True,
  ):
    pairs = zip(old.addressable_shards, new.addressable_shards, strict=True)
    for a, b in pairs:
      assert a.data.unsafe_buffer_pointer() == b.data.unsafe_buffer_pointer()
  for a, b in zip(
    jax.tree.leaves(nnx.state(model, nnx.LoRAParam)),
    jax.tree.leaves(nnx.state(state.model, nnx.LoRAParam)),
    strict=True,
  ):
    assert (a != b).any() and a.dtype == b.dtype
  nothing = [dataclasses.replace(e, weights=0 * e.weights) for e in batch]
  with pytest.raises(ValueError, match=r"batches\[1\] sum to 0"):
    delayed_steps(layout, state, [batch, nothing], options, delayed, mesh=mesh)


@pytest.mark.parametrize("kind", [KVArena, KVContext])
def test_kernels_take_no_block_of_keys_that_two_chunks_share(kind):
  """Chunks lie at any multiple of their size, in both arenas."""
  state = kind(
    num_kv_heads=2,
    head_dim=128,
    chunk_size=256,
    scale=1.0,
    implementation="pallas_tpu",
  )
  zero = jnp.zeros((), jnp.int32)
  ids = jnp.zeros((1, 256), jnp.int32)
  place = ChunkPlace(zero, zero, ids, ids, cotangent_start=zero)
  assert state.backward_options(place)["dkv_multiple"] == 256
  array = jax.ShapeDtypeStruct
  q, k = (
    array((1, 2, 2, 256, 128), "bfloat16"),
    array((1, 1, 2, 1024, 128), "bfloat16"),
  )
  assert choose_blocks(q, k, AttentionMask()).kv_bwd == 512
  assert choose_blocks(q, k, AttentionMask(), dkv_multiple=256).kv_bwd == 256
  with pytest.raises(NotImplementedError, match=r"128 keys .* divide 64"):
    _gpu_backward_of_arenas(64)


def _gpu_backward_of_arenas(multiple):
  q = jnp.zeros((1, 1, 4, 128, 64), jnp.bfloat16)
  k = jnp.zeros((1, 1, 1, 128, 64), jnp.bfloat16)
  dk = jnp.zeros(k.shape, jnp.float32)
  lse = jnp.zeros(q.shape[:4])
  arrays = (q, k, k, AttentionMask(), q, lse, q, dk, dk)
  gpu_backward(*arrays, dkv_multiple=multiple, scale=1.0)


def test_stages_choose_the_strategy_that_runs_over_them():
  """With as many key heads as heads one device would have layers outside."""
  cfg = dataclasses.replace(_SMALL, num_kv_heads=4).frozen()
  layout = Layout(stage=2)
  lowered = jc.lower_chunked(
    build(cfg, "float32"),
    capacity=32,
    chunk_size=16,
    layout=layout,
    mesh=layout.mesh(jax.devices()[:2]),
  )
  assert "collective_permute" in lowered.as_text()
