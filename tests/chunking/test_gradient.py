"""Chunk-wise loss and gradients are those of the unsplit sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking import chunk_outer, layer_outer
from jaxchunk.chunking.executor import (
  accumulate,
  lane_program,
  loss_sum,
  make_options,
  place_lanes,
)
from jaxchunk.chunking.lanes import pack_lanes
from jaxchunk.chunking.plan import chunk_plan
from jaxchunk.kernels.attention.block_sizes import BlockSizes
from jaxchunk.types import Batch, Example
from tests.chunking.conftest import PLAIN, RICH, build, make_batch, worst

# (chunk size, live chunks, strategy)
CUTS = [
  (16, 0, "chunk_outer"),
  (16, 1, "chunk_outer"),
  (16, 3, "chunk_outer"),
  (16, 8, "chunk_outer"),
  (19, 1, "chunk_outer"),
  (128, 1, "chunk_outer"),
  (16, 1, "layer_outer"),
  (19, 1, "layer_outer"),
]


@pytest.fixture(scope="module")
def truth():
  with jax.enable_x64(True):
    return jc.full_value_and_grad(build(RICH), make_batch())


@pytest.mark.parametrize("size,live,strategy", CUTS)
def test_fp64(x64, truth, size, live, strategy):
  model = build(RICH)
  loss, grads = jc.chunked_value_and_grad(
    model,
    make_batch(),
    chunk_size=size,
    live_chunks=live,
    strategy=strategy,
  )
  want_loss, want = truth
  assert abs(loss - want_loss) <= 1e-12 * want_loss
  assert worst(grads, want) <= 1e-12


@pytest.mark.fast
@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
def test_fp32(strategy):
  model, batch = build(RICH, "float32"), make_batch()
  want_loss, want = jc.full_value_and_grad(model, batch)
  loss, grads = jc.chunked_value_and_grad(
    model, batch, chunk_size=32, strategy=strategy
  )
  assert abs(loss - want_loss) <= 1e-6 * want_loss
  assert worst(grads, want) <= 1e-5


def test_reference_against_finite_differences(x64):
  model, batch = build(RICH), make_batch(((12, 9), (20,)))
  state = nnx.state(model, nnx.Param)
  graph = nnx.graphdef(model)
  reference = jax.jit(
    lambda state: jc.full_value_and_grad(nnx.merge(graph, state), batch)
  )
  grads = reference(state)[1]

  def along(direction, step):
    return reference(jax.tree.map(lambda a, d: a + step * d, state, direction))[
      0
    ]

  for seed in range(2):
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    direction = jax.tree.map(
      lambda a, keys=keys: jax.random.normal(next(keys), a.shape, a.dtype),
      state,
    )
    slope = sum(
      jnp.vdot(a, b)
      for a, b in zip(
        jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True
      )
    )
    h = 1e-5
    # Fourth-order difference: truncation about h**4, rounding 1e-16 / h.
    near = along(direction, h) - along(direction, -h)
    far = along(direction, 2 * h) - along(direction, -2 * h)
    measured = (8 * near - far) / (12 * h)
    assert abs(measured - slope) <= 1e-8 * max(1, abs(slope))


def test_packed_is_separate(x64):
  model = build(RICH)
  batch = make_batch()
  together = jc.chunked_value_and_grad(model, batch, chunk_size=32)
  options = make_options(model, chunk_size=32)
  total, weight = None, 0.0
  for example in Batch.of(batch).examples():
    sums = accumulate(model, [example], options)
    part = (sums.loss, sums.grads)
    total = part if total is None else jax.tree.map(jnp.add, total, part)
    weight += sums.weight
  loss, grads = jax.tree.map(lambda a: a / weight, total)
  assert abs(loss - together[0]) <= 1e-12 * together[0]
  assert worst(grads, together[1]) <= 1e-12


@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
@pytest.mark.parametrize("window,size", [(10, 8), (3, 24), (300, 8)])
def test_window_gradients_that_move(x64, strategy, window, size):
  """Lanes much longer than the rows that a window keeps of dK and dV."""
  cfg = dataclasses.replace(PLAIN, num_layers=2, window_pattern=(window, None))
  model = build(cfg)
  batch = make_batch(((190, 30), (55,)))
  options = make_options(model, chunk_size=size, strategy=strategy)
  stage = options.stage(model.cfg)
  small = BlockSizes(q=8, kv=8, q_bwd=8, kv_bwd=8)
  states = tuple(dataclasses.replace(s, blocks=small) for s in stage.states)
  stage = dataclasses.replace(stage, states=states)
  examples = Batch.of(batch).examples()
  plan = chunk_plan([len(e) for e in examples], size)
  totals = (jnp.zeros(()), stage.trainable.zeros(model))
  run = {
    "chunk_outer": lambda *a: chunk_outer.lane_gradient(stage, 1, *a),
    "layer_outer": lambda *a: layer_outer.lane_gradient(stage, *a),
  }
  program = jax.jit(run[strategy])
  moved = False
  for lane, count in place_lanes(model, pack_lanes(examples, plan), plan):
    totals = program(model, lane, count, totals)
    capacity = lane.tokens.size
    rows = states[0].zero_cotangent(states[0].init(1, 1, capacity))[0].shape[3]
    moved |= rows < capacity
  assert moved == (window < 300)  # The widest window covers the whole lane.
  want_loss, want = jc.full_value_and_grad(model, batch)
  weight = sum(e.weights.sum() for e in examples)
  assert abs(totals[0] / weight - want_loss) <= 1e-12 * want_loss
  grads = stage.trainable.state([g / weight for g in totals[1]])
  assert worst(grads, want) <= 1e-12


def test_bf16_parameters_do_not_round_each_chunk():
  cfg = dataclasses.replace(PLAIN, param_dtype="bfloat16")
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  want = jc.full_value_and_grad(model, make_batch())[1]
  grads = jc.chunked_value_and_grad(model, make_batch(), chunk_size=16)[1]
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
  assert worst(grads, want) <= 1e-5


def test_kept_inputs_only(x64, truth):
  _, grads = jc.chunked_value_and_grad(
    build(RICH), make_batch(), chunk_size=16, live_chunks=2, keep="inputs"
  )
  assert worst(grads, truth[1]) <= 1e-12


@pytest.mark.parametrize(
  "trainable",
  [
    nnx.PathContains("q"),
    lambda path, _: path[0] != "embed",
    lambda path, _: path[0] == "embed",
    lambda path, _: path[0] == "final_norm",
  ],
  ids=["queries", "all but embed", "embed", "final norm"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_subsets(x64, trainable, tied):
  model = build(dataclasses.replace(PLAIN, tie_embeddings=tied))
  batch = make_batch()
  want = jc.full_value_and_grad(model, batch, trainable=trainable)[1]
  grads = jc.chunked_value_and_grad(
    model, batch, chunk_size=32, trainable=trainable
  )[1]
  assert worst(grads, want) <= 1e-12
  assert jax.tree.structure(grads) == jax.tree.structure(
    nnx.state(model, trainable)
  )
  same = jc.chunked_value_and_grad(
    model, batch, chunk_size=32, trainable=nnx.state(model, trainable)
  )[1]
  assert worst(same, want) <= 1e-12


def test_frozen_weights_cost_no_work():
  model = build(PLAIN, "float32")

  def flops(trainable):
    lowered = jc.lower_chunked(
      model, capacity=64, chunk_size=64, trainable=trainable
    )
    return lowered.compile().cost_analysis()["flops"]

  # Two of three products of a linear layer remain: forward and dx.
  assert flops(nnx.PathContains("final_norm")) < 0.8 * flops(None)


@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
def test_dropout_follows_the_document(x64, strategy):
  model = build(dataclasses.replace(PLAIN, dropout=0.3))
  rng = jax.random.key(5)
  want_loss, want = jc.full_value_and_grad(model, make_batch(), rng=rng)
  loss, grads = jc.chunked_value_and_grad(
    model,
    make_batch(),
    chunk_size=16,
    strategy=strategy,
    rng=rng,
  )
  assert abs(loss - want_loss) <= 1e-12 * want_loss
  assert worst(grads, want) <= 1e-12
  other = jc.chunked_value_and_grad(
    model, make_batch(), chunk_size=16, rng=jax.random.key(6)
  )[0]
  assert abs(other - loss) > 1e-3


def test_two_phase_loss(x64):
  model, batch = build(PLAIN), make_batch()

  def preference(nll, weight):
    # Pairs of sequences; the last has no partner.
    margin = nll[0:-1:2] - nll[1::2]
    return jnp.mean(jax.nn.softplus(0.1 * margin)) + jnp.sum(weight) * 0

  want_loss, want = jc.full_value_and_grad(model, batch, loss=preference)
  loss, grads = jc.chunked_value_and_grad(
    model, batch, chunk_size=16, loss=preference
  )
  assert abs(loss - want_loss) <= 1e-12 * abs(want_loss)
  assert worst(grads, want) <= 1e-11


@pytest.mark.fast
def test_attention_that_is_not_there_is_named():
  message = r"implementation='flash' is not one of \['xla', 'pallas_tpu'"
  with pytest.raises(ValueError, match=message):
    make_options(build(PLAIN, "float32"), chunk_size=8, implementation="flash")


def test_loss_sum(x64, truth):
  examples = Batch.of(make_batch()).examples()
  total = loss_sum(build(RICH), examples, chunk_size=16)
  weight = sum(e.weights.sum() for e in examples)
  assert abs(total / weight - truth[0]) <= 1e-12


@pytest.mark.fast
def test_bf16_gradients_accumulate_in_fp32():
  model = build(PLAIN, "float32")
  batch = make_batch()
  want = jc.full_value_and_grad(model, batch)[1]
  model.cfg = dataclasses.replace(model.cfg, dtype="bfloat16").frozen()
  for block in model.blocks:
    block.cfg = model.cfg
  plain = worst(jc.full_value_and_grad(model, batch)[1], want)
  chunked = jc.chunked_value_and_grad(model, batch, chunk_size=16)[1]
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(chunked))
  # The house rule: at most twice the error of the plain bf16 computation.
  assert worst(chunked, want) <= 2 * plain


def test_programs_are_few_and_reused():
  model = build(PLAIN, "float32")
  lane_program.clear_cache()
  rng = np.random.default_rng(0)
  # The longest is 8 chunks: programs for 1, 2, 4, 8.
  for seed in range(4):
    lengths = [*rng.integers(1, 64, 5), 128 - seed, 7, 33, 50]
    batch = make_batch(tuple((int(n),) for n in lengths), seed)
    jc.chunked_value_and_grad(model, batch, chunk_size=16)
    if seed == 0:
      first = lane_program._cache_size()
  assert first <= 2 + np.log2(128 / 16)
  assert lane_program._cache_size() <= 2 + np.log2(128 / 16)


@pytest.mark.fast
@pytest.mark.parametrize("given_as", [dict, lambda b: Batch.of(make_batch())])
@pytest.mark.parametrize(
  "name,change,message",
  [
    ("weights", lambda a: a * 0, "weights sum to 0"),
    ("weights", lambda a: a - 9, "not negative"),
    ("segment_ids", lambda a: a[:, ::-1].copy(), "decrease"),
    ("segment_ids", lambda a: a * 2**32, "not int32"),
    ("tokens", lambda a: a + PLAIN.vocab_size, "outside the model's vocab"),
    ("tokens", lambda a: a * 0 - 1, "has token -1"),
    ("targets", lambda a: a * 0 - 1, "has target -1"),
  ],
)
def test_bad_batch(given_as, name, change, message):
  batch = given_as(make_batch())
  dtype = "float32" if name == "weights" else "int64"
  if isinstance(batch, Batch):
    wrong = change(getattr(batch, name).astype(dtype))
    batch = dataclasses.replace(batch, **{name: wrong})
  else:
    batch = batch | {name: change(np.asarray(batch[name]).astype(dtype))}
  model = build(PLAIN, "float32")
  with pytest.raises(ValueError, match=message):
    jc.chunked_value_and_grad(model, batch, chunk_size=16)
  with pytest.raises(ValueError, match=message):
    jc.full_value_and_grad(model, batch)


@pytest.mark.fast
def test_bad_example():
  four, one = np.zeros(4, np.int32), np.zeros(1, np.int32)
  with pytest.raises(ValueError, match="4 tokens but 1 targets"):
    Example(four, one, np.ones(4, np.float32))
  with pytest.raises(ValueError, match="must be finite"):
    Example(one, one, np.full(1, np.nan, np.float32))


@pytest.mark.fast
@pytest.mark.parametrize(
  "change,message",
  [
    ({"chunk_size": 0}, "chunk_size=0"),
    ({"chunk_size": 2.5}, "chunk_size=2.5"),
    ({"live_chunks": -1}, "live_chunks=-1"),
    ({"strategy": "chunky"}, "strategy='chunky'"),
    ({"keep": "some"}, "keep='some'"),
    ({"grad_dtype": "int32"}, "grad_dtype='int32'"),
    ({"trainable": nnx.PathContains("nothing")}, "chooses no parameter"),
  ],
)
def test_bad_arguments(change, message):
  arguments = {"chunk_size": 16} | change
  with pytest.raises(ValueError, match=message):
    jc.chunked_value_and_grad(
      build(PLAIN, "float32"), make_batch(), **arguments
    )
