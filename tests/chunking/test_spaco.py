"""A random part of the chunks runs backward, and the mean is exact."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxchunk as jc
from jaxchunk.chunking import chunk_outer, spaco
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.executor import make_options
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.trainable import Trainable
from tests.chunking.conftest import LENGTHS, PLAIN, RICH, build, make_batch
from tests.chunking.conftest import worst as worst_of
from tests.chunking.test_state import C, Decay, lane_of

N = 4
RATE = 0.3


def ragged_lane() -> Lane:
  """Two documents that share the second chunk of four."""
  lane = lane_of(N)
  ids = jnp.broadcast_to((jnp.arange(N * C) >= C + 3) + 1, lane.tokens.shape)
  return Lane(
    lane.tokens,
    lane.targets,
    lane.weights,
    ids.astype(jnp.int32),
    lane.positions,
    lane.document_ids,
  )


def pieces(kind):
  """A model, a stage and a lane for each kind of sequence state."""
  cfg = RICH if kind == "window" else PLAIN
  model = build(cfg)
  if kind == "recurrent":
    spec = Decay(cfg.kv_heads, cfg.head_width, N)
    return model, Stage(C, (spec,), Trainable.of(model)), lane_of(N)
  stage = make_options(model, chunk_size=C).stage(model.cfg)
  return model, stage, ragged_lane()


def gradients(kind, rate=RATE):
  """The exact loss and gradient, and a function of the chosen chunks."""
  model, stage, lane = pieces(kind)
  totals = (jnp.zeros(()), stage.trainable.zeros(model))
  exact = jax.jit(functools.partial(chunk_outer.lane_gradient, stage, 0))
  drawn = jax.jit(functools.partial(spaco.lane_gradient, stage, jc.SpaCO(rate)))
  count = jnp.int32(N)

  def draw(chosen):
    return drawn(model, lane, count, totals, jnp.asarray(chosen))

  return exact(model, lane, count, totals), draw


def worst(grads, wanted):
  return max(
    float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    for a, b in zip(grads, wanted, strict=True)
  )


@pytest.mark.parametrize("kind", ["prefix", "window", "recurrent"])
def test_the_mean_over_all_draws_is_exact(x64, kind):
  (loss, exact), drawn = gradients(kind)
  mean = [jnp.zeros_like(g) for g in exact]
  sizes = []
  for chosen in itertools.product([False, True], repeat=N):
    chance = math.prod(RATE if b else 1 - RATE for b in chosen)
    value, grads = drawn(chosen)
    assert abs(value - loss) <= 1e-14 * loss
    mean = [m + chance * g for m, g in zip(mean, grads, strict=True)]
    sizes.append(worst(grads, exact))
    if not any(chosen):
      assert not any(g.any() for g in grads)
  assert worst(mean, exact) <= 1e-12
  assert min(sizes) > 0.1  # No draw alone is the gradient.


def test_a_set_of_fixed_size_is_biased(x64):
  size = 2
  (_, exact), drawn = gradients("prefix", size / N)
  sets = list(itertools.combinations(range(N), size))
  mean = [jnp.zeros_like(g) for g in exact]
  for members in sets:
    _, grads = drawn(np.isin(np.arange(N), members))
    mean = [m + g / len(sets) for m, g in zip(mean, grads, strict=True)]
  # Paths through two chunks count for 2/3, those through three not at all.
  assert worst(mean, exact) > 1e-2


@pytest.mark.parametrize(
  "hops,weight", [(1, 1), (2, 0.88), (3, 0.67), (4, 0.43)]
)
def test_weights_of_paths_without_replacement(hops, weight):
  by_formula = spaco.without_replacement_weight(128, 8, hops)
  assert round(by_formula, 2) == weight
  # The same by enumeration, of a size that can be enumerated.
  k, t = 8, 4
  sets = list(itertools.combinations(range(k), t))
  whole = sum(set(range(hops)) <= set(s) for s in sets) / len(sets)
  want = whole * (k / t) ** hops
  got = spaco.without_replacement_weight(k, t, hops)
  assert math.isclose(got, want, rel_tol=1e-12)


@pytest.mark.parametrize("cfg", [PLAIN, RICH], ids=["plain", "rich"])
def test_rate_one_is_the_gradient(x64, cfg):
  model, batch = build(cfg), make_batch()
  want_loss, want = jc.full_value_and_grad(model, batch)
  loss, grads = jc.chunked_value_and_grad(
    model,
    batch,
    chunk_size=16,
    strategy=jc.SpaCO(rate=1.0),
    rng=jax.random.key(0),
  )
  assert abs(loss - want_loss) <= 1e-12 * abs(want_loss)
  assert worst_of(grads, want) <= 1e-12


def test_draws_follow_the_key_the_document_and_the_chunk():
  lane, strategy = lane_of(N), jc.SpaCO(0.5)
  key = jax.random.key(3)
  whole = spaco.draw_chunks(strategy, lane, 64, key)
  np.testing.assert_array_equal(
    spaco.draw_chunks(strategy, lane, 32, key), whole[:32]
  )
  other = Lane(
    *(getattr(lane, n) for n in list(lane.__dataclass_fields__)[:-1]),
    lane.document_ids + 1,
  )
  assert (spaco.draw_chunks(strategy, other, 64, key) != whole).any()
  step = jax.random.fold_in(key, 1)
  assert (spaco.draw_chunks(strategy, lane, 64, step) != whole).any()
  share = spaco.draw_chunks(jc.SpaCO(0.25), lane, 4096, key).mean()
  assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 4096) ** 0.5


def test_the_public_call(x64):
  model, batch = build(PLAIN), make_batch()
  run = functools.partial(
    jc.chunked_value_and_grad,
    model,
    batch,
    chunk_size=16,
    strategy=jc.SpaCO(rate=0.5),
  )
  want_loss, want = jc.full_value_and_grad(model, batch)
  loss, first = run(rng=jax.random.key(0))
  _, again = run(rng=jax.random.key(0))
  _, other = run(rng=jax.random.key(1))
  assert abs(loss - want_loss) <= 1e-12 * abs(want_loss)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  assert worst_of(first, other) > 0.1
  assert worst_of(first, want) > 0.1


def test_the_lowered_program_is_the_one_that_runs():
  model = build(PLAIN, "float32")
  lowered = jc.lower_chunked(
    model, capacity=sum(LENGTHS[0]), chunk_size=16, strategy=jc.SpaCO(0.5)
  )
  assert lowered.compile().memory_analysis().temp_size_in_bytes > 0


@pytest.mark.parametrize("rate", [0, -0.5, 1.5, float("nan"), True, "half"])
def test_impossible_rates(rate):
  with pytest.raises(ValueError, match=r"SpaCO rate=.*\(0, 1\]"):
    jc.SpaCO(rate)


def test_impossible_combinations():
  model = build(PLAIN, "float32")
  with pytest.raises(ValueError, match="live_chunks=3 with SpaCO"):
    make_options(model, chunk_size=16, live_chunks=3, strategy=jc.SpaCO(0.5))
  with pytest.raises(ValueError, match="rng=None with SpaCO"):
    jc.chunked_value_and_grad(
      model, make_batch(), chunk_size=16, strategy=jc.SpaCO(0.5)
    )
