"""SpaCO: whether its mean gradient is exact, and the time that it saves.

  python benchmarks/spaco.py [--draws=2000] [--part=mean,time]

The mean over draws is compared with the exact gradient in fp64. Of every
number of every parameter, z = (mean - exact) / (standard deviation / sqrt(n)).
A number is "within 3 standard errors" when |z| <= 3; of normal z, 0.27% are
not, so that share and the largest z are printed beside what chance gives. The
z share their draws, so neither is a test by itself: the test is of the whole
gradient, whose squared error has the mean sum(variance) / n. Its root is
printed in units of that mean's root: about 1 without bias, of the order of
sqrt(n) with one.

Times are of one long lane, with K = 0 (nothing kept) and K = 1 of the exact
gradient beside it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from common import best_seconds, report, rounded
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking import spaco
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.executor import accumulate, make_options
from jaxchunk.types import Example

_DRAWS = flags.DEFINE_integer("draws", 2000, "Of the mean.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of parameters, data and draws.")
_PART = flags.DEFINE_list("part", ["mean", "time"], "What to run.")
_CHUNKS = flags.DEFINE_integer("chunks", 32, "Of the lane that is timed.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns; the best counts.")

_SMALL = jc.ModelConfig(
  vocab_size=61,
  d_model=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  d_ff=48,
  dtype="float64",
  param_dtype="float64",
)
_LARGE = jc.ModelConfig(
  vocab_size=1024,
  d_model=128,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=64,
  d_ff=256,
)
_RATES = (1 / 2, 1 / 4, 1 / 8)


def document(length: int, vocab_size: int) -> Example:
  rng = np.random.default_rng(_SEED.value)
  tokens, targets = rng.integers(0, vocab_size, (2, length)).astype(np.int32)
  return Example(tokens, targets, np.ones(length, np.float32), 1)


def flat(grads: nnx.State) -> np.ndarray:
  return np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])


def mean_gradient(draws: int) -> dict[str, float]:
  """The statistics of the module's docstring; 8 chunks of 8, rate 1/4."""
  model = jc.Transformer(_SMALL, rngs=nnx.Rngs(_SEED.value))
  examples = [document(64, _SMALL.vocab_size)]
  exact = make_options(model, chunk_size=8, live_chunks=0)
  truth = flat(accumulate(model, examples, exact).grads)
  options = make_options(model, chunk_size=8, strategy=jc.SpaCO(1 / 4))
  key = jax.random.key(_SEED.value)
  # Of the differences, so that nothing cancels.
  total, squares = np.zeros_like(truth), np.zeros_like(truth)
  for draw in range(draws):
    rng = jax.random.fold_in(key, draw)
    error = flat(accumulate(model, examples, options, rng=rng).grads) - truth
    total += error
    squares += error**2
  mean = total / draws
  variance = (squares - draws * mean**2) / (draws - 1)
  moving = variance > 0
  z = mean[moving] / np.sqrt(variance[moving] / draws)
  chance = math.erfc(3 / math.sqrt(2))
  return {
    "draws": draws,
    "numbers": int(moving.sum()),
    "share_within_3": float((np.abs(z) <= 3).mean()),
    "share_within_3_by_chance": 1 - chance,
    "largest_z": float(np.abs(z).max()),
    "largest_z_by_chance": math.sqrt(2 * math.log(2 * len(z))),
    "norm_over_expected": float(
      np.linalg.norm(mean) / math.sqrt(variance.sum() / draws)
    ),
    "error_of_mean": float(np.linalg.norm(mean) / np.linalg.norm(truth)),
    "error_of_one_draw": float(
      math.sqrt(variance.sum()) / np.linalg.norm(truth)
    ),
  }


def chosen_key(rate: float, chunks: int) -> jax.Array:
  """A key that draws exactly the mean number of chunks, for fair times."""
  row = jnp.ones((1, 1), jnp.int32)
  lane = Lane(row, row, row, row, row, row)
  for seed in range(10_000):
    key = jax.random.key(seed)
    drawn = spaco.draw_chunks(jc.SpaCO(rate), lane, chunks, key)
    # Spread evenly, because later chunks cost more.
    places = np.flatnonzero(drawn)
    even = abs(places.mean() - (chunks - 1) / 2) < 1 if len(places) else False
    if len(places) == round(rate * chunks) and even:
      return key
  raise ValueError(f"no key draws {rate} of {chunks} chunks evenly")


def times(chunks: int, rounds: int) -> dict[str, float]:
  """Seconds of a gradient: exact with K = 0 and 1, and by rate."""
  model = jc.Transformer(_LARGE, rngs=nnx.Rngs(_SEED.value))
  size = 256
  examples = [document(chunks * size, _LARGE.vocab_size)]
  runs = {}
  for live in (0, 1):
    options = make_options(
      model, chunk_size=size, live_chunks=live, strategy="chunk_outer"
    )
    runs[f"exact, K={live}"] = (options, None)
  for rate in _RATES:
    options = make_options(model, chunk_size=size, strategy=jc.SpaCO(rate))
    runs[f"t/k={rate:g}"] = (options, chosen_key(rate, chunks))

  def run(name: str) -> None:
    options, key = runs[name]
    sums = accumulate(model, examples, options, rng=key)
    jax.block_until_ready(sums.grads)

  return best_seconds({n: lambda n=n: run(n) for n in runs}, rounds)


def main(_: list[str]) -> None:
  figures = {}
  if "mean" in _PART.value:
    with jax.enable_x64(True):
      figures["mean"] = mean_gradient(_DRAWS.value)
  if "time" in _PART.value:
    seconds = times(_CHUNKS.value, _ROUNDS.value)
    figures["seconds"] = seconds
    exact = seconds["exact, K=0"]
    figures["of_exact"] = {n: s / exact for n, s in seconds.items()}
  report("spaco", seed=_SEED.value, **rounded(figures))


if __name__ == "__main__":
  app.run(main)
