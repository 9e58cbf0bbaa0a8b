"""Balance: how long a step takes on 64 devices, by the way lanes are placed.

  python benchmarks/balance.py [--output=FILE.png] [--part=place,fit]

`place` is a simulation: batches of 512 sequences are planned, placed and timed
by a cost model. The model is FlexSP's of a 7B GPT on A100-40GB GPUs, as its
code has it, once with its cluster's links and once with links between machines
as fast as those inside one. "static" is one degree for every step, the least
that holds the data's longest sequence, with lanes dealt out by longest
processing time; "best single degree" chooses one degree for each batch anew.
Of each way: the step's length over the lower bound, mean and worst; static's
total over its total; and the most processor seconds that placing took. A
step with a tail's longest sequence is a data set of its own, as one in two
thousand has it.

`fit` times lanes of a tiny model on this device, fits the cost model to those
of up to 8 chunks, and predicts one of 16.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import matplotlib.figure
import numpy as np
from absl import app, flags
from common import best_seconds, report, rounded
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking.balance import (
  Placement,
  Problem,
  placement_problem,
  spans,
  static_placement,
)
from jaxchunk.chunking.balance_cost import (
  CostModel,
  Timing,
  fit_cost,
  lane_works,
)
from jaxchunk.chunking.balance_hybrid import hybrid_placement
from jaxchunk.chunking.balance_program import flexible_placement
from jaxchunk.chunking.executor import accumulate, make_options
from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.plan import chunk_plan
from jaxchunk.data.config import DataConfig
from jaxchunk.data.corpus import open_corpus
from jaxchunk.types import Example

_OUTPUT = flags.DEFINE_string("output", None, "Where to draw, if anywhere.")
_PART = flags.DEFINE_list("part", ["place", "fit"], "What to run.")
_STEPS = flags.DEFINE_integer("steps", 5, "Batches of each data set.")

_DEVICES = 64  # FlexSP, section 6: 64 GPUs.
_SEQUENCES = 512  # FlexSP, section 6: a batch.
_CHUNK = 2048  # ChunkFlow's smallest.
# PKU-DAIR/Hetu-Galvatron, class flexSPCostModel: milliseconds of s tokens are
# 5.128e-6 * s**2 + 0.1839576 * s on one GPU; s**2 is two pairs. Its 629 ms for
# each micro-batch are the same for every group and left out.
_TOKEN, _PAIR = 0.1839576e-3, 2 * 5.128e-9
# The same: GB/s of an all-to-all by degree; it lists none above 16.
_BANDWIDTH = {2: 154, 4: 137, 8: 121, 16: 8.7, 32: 8.7, 64: 8.7}
# The same: bytes of a token, 8 of them in each layer's width of 4,096, which
# are divided by the degree.
_EXCHANGED = 8 * 32 * 4096 * 2
# The same: 4.71 MB of activations for a token beside 16 bytes for each of 7e9
# parameters on 64 GPUs of 40 GB. Keys and values alone would take a third.
_ROOM = int((40 * 1024 - 7 * 16 * 1024 / _DEVICES) / 4.71)
# Of static context parallelism; their own, on their hardware, at best.
_PAPERS = {"FlexSP": 1.98, "ByteScale, ablation": 3.69}

_TINY = jc.ModelConfig(
  vocab_size=256,
  d_model=128,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=64,
  d_ff=256,
)


def cluster(bandwidth: dict[int, float]) -> CostModel:
  exchange = {
    degree: _EXCHANGED / degree / (gigabytes * 2**30)
    for degree, gigabytes in bandwidth.items()
  }
  return CostModel(0.0, _TOKEN, _PAIR, tuple(exchange.items()))


def long_tail(
  rng: np.random.Generator, count: int, *, bound: int, share: float, most: int
) -> list[int]:
  """Lengths below `bound` but for a share, whose tail is Pareto's up to `most`.

  The body is log-normal (sigma 1); one sequence in a million is `most` long.
  """
  middle = math.log(bound) - statistics.NormalDist().inv_cdf(1 - share)
  alpha = math.log(share / 1e-6) / math.log(most / bound)
  drawn: list[int] = []
  while len(drawn) < count:
    if rng.random() < share:
      length = bound * rng.random() ** (-1 / alpha)
    else:
      length = math.exp(rng.normal(middle, 1))
    if 1 <= length <= most:
      drawn.append(int(length))
  return drawn


def batches(steps: int) -> dict[str, tuple[list[list[int]], int]]:
  """Lengths of each step, and of the longest sequence there may be."""
  tails = {
    # ChunkFlow, table 1, LMSYS-Chat-1M: over 99% below 4K, longest about 300K;
    # one of a million.
    "ChunkFlow": {"bound": 4096, "share": 0.01, "most": 300_000},
    # FlexSP, section 6: up to 384K. How many exceed 8K is a guess; its figures
    # of GitHub, CommonCrawl and Wikipedia are pictures.
    "FlexSP": {"bound": 8192, "share": 0.05, "most": 384 * 1024},
  }
  result: dict[str, tuple[list[list[int]], int]] = {}
  lengths = open_corpus(DataConfig(heldout_fraction=0.0)).index.lengths - 1
  rng = np.random.default_rng(0)
  result["stdlib"] = (
    [
      rng.permutation(lengths[lengths > 0])[:_SEQUENCES].tolist()
      for _ in range(steps)
    ],
    int(lengths.max()),
  )
  for name, tail in tails.items():
    most = int(tail["most"])
    drawn = [long_tail(rng, _SEQUENCES, **tail) for _ in range(steps)]
    result[name] = drawn, most
    result[f"{name}, longest"] = [[most, *drawn[0][1:]]], most
  return result


def best_single(problem: Problem) -> Placement:
  whole = np.isfinite(problem.seconds).all(1)
  return min(
    (
      static_placement(problem, degree)
      for degree, fits in zip(problem.degrees, whole, strict=True)
      if fits
    ),
    key=lambda found: found.makespan,
  )


def ways(longest: int) -> dict[str, Callable[[Problem], Placement]]:
  room = capacity_chunks(-(-longest // _CHUNK)) * _CHUNK
  degree = 1 << (-(-room // _ROOM) - 1).bit_length()
  return {
    "static": lambda problem: static_placement(problem, degree),
    "best single degree": best_single,
    "hybrid": hybrid_placement,
    "flexible": flexible_placement,
  }


def compared(
  steps: Sequence[Sequence[int]], longest: int, model: CostModel
) -> dict[str, dict[str, Any]]:
  """The figures of each way for the steps of a data set."""
  problems = [
    placement_problem(
      chunk_plan(lengths, _CHUNK),
      model,
      devices=_DEVICES,
      tokens_per_device=_ROOM,
    )
    for lengths in steps
  ]
  result: dict[str, dict[str, Any]] = {}
  static = 0.0
  for name, place in ways(longest).items():
    found, seconds = [], []
    for problem in problems:
      start = time.process_time()
      found.append(place(problem))
      seconds.append(time.process_time() - start)
    total = sum(f.makespan for f in found)
    static = static or total
    over = [f.makespan / f.lower_bound for f in found]
    result[name] = {
      "over_bound": statistics.mean(over),
      "worst_over_bound": max(over),
      "static_over_it": static / total,
      "seconds_to_place": max(seconds),
      "turns": max(len(f.turns) for f in found),
    }
  return result


def draw(path: str, problem: Problem, longest: int) -> None:
  """Devices by time, one panel for each way; colours are degrees."""
  shown = {
    name: way(problem)
    for name, way in ways(longest).items()
    if name != "best single degree"
  }
  figure = matplotlib.figure.Figure(figsize=(8, 9), layout="constrained")
  panels = figure.subplots(len(shown), sharex=True)
  colors = matplotlib.colormaps["viridis"]
  for axes, (name, found) in zip(panels, shown.items(), strict=True):
    for span in spans(problem, found.turns):
      axes.broken_barh(
        [(span.start, span.stop - span.start)],
        (span.first, span.degree),
        facecolor=colors(math.log2(span.degree) / math.log2(_DEVICES)),
        edgecolor="white",
        linewidth=0.3,
      )
    axes.axvline(found.lower_bound, color="black", linestyle="--")
    axes.set(
      ylabel="device",
      ylim=(0, _DEVICES),
      title=f"{name}: {found.makespan:.2f} s, {len(found.turns)} turns",
    )
  panels[-1].set_xlabel("seconds; dashed: the lower bound")
  scale = matplotlib.cm.ScalarMappable(
    matplotlib.colors.Normalize(0, math.log2(_DEVICES)), colors
  )
  bar = figure.colorbar(scale, ax=panels, label="devices that share a lane")
  bar.set_ticks(
    range(_DEVICES.bit_length()),
    labels=[str(1 << n) for n in range(_DEVICES.bit_length())],
  )
  figure.savefig(path, dpi=120)


def timings() -> tuple[list[Timing], list[Timing]]:
  """Lanes of up to 8 chunks on one device, and longer ones to predict."""
  model = jc.Transformer(_TINY, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  runs: dict[tuple[int, int], Callable[[], Any]] = {}
  for size, lanes in ((128, (1, 2, 4, 8, 16)), (256, (1, 4, 8))):
    options = make_options(model, chunk_size=size, strategy="chunk_outer")
    for chunks in lanes:
      tokens, targets = rng.integers(0, 256, (2, size * chunks), np.int32)
      weights = np.ones(size * chunks, np.float32)
      examples = [Example(tokens, targets, weights, 1)]
      runs[size, chunks] = lambda e=examples, o=options: jax.block_until_ready(
        accumulate(model, e, o).grads
      )
  seconds = best_seconds({str(key): run for key, run in runs.items()}, 3)
  found = [
    (chunks, Timing(lane_works(chunk_plan([size * chunks], size))[0], 1, s))
    for (size, chunks), s in zip(runs, seconds.values(), strict=True)
  ]
  return (
    [timing for chunks, timing in found if chunks <= 8],
    [timing for chunks, timing in found if chunks > 8],
  )


def fitted() -> dict[str, Any]:
  given, held_out = timings()
  model = fit_cost(given)

  def worst(some: Sequence[Timing]) -> float:
    return max(abs(model.seconds(t.work, 1) / t.seconds - 1) for t in some)

  return {
    "chunk": model.chunk,
    "token": model.token,
    "pair": model.pair,
    "worst_error": worst(given),
    "worst_error_of_longer": worst(held_out),
  }


def main(_: list[str]) -> None:
  figures: dict[str, Any] = {}
  if "place" in _PART.value:
    machines = {
      "FlexSP's cluster": cluster(_BANDWIDTH),
      "fast links": cluster(dict.fromkeys(_BANDWIDTH, 121)),
    }
    data = batches(_STEPS.value)
    print(f"{'':58}{'/bound':>8}{'worst':>8}{'static/':>9}{'placed in':>11}")
    for machine, model in machines.items():
      for name, (steps, longest) in data.items():
        rows = compared(steps, longest, model)
        figures.setdefault("place", {}).setdefault(machine, {})[name] = rows
        for way, row in rows.items():
          print(
            f"{machine:18}{name:20}{way:20}{row['over_bound']:8.3f}"
            f"{row['worst_over_bound']:8.3f}{row['static_over_it']:9.2f}"
            f"{row['seconds_to_place']:9.2f} s"
          )
    figures["static_over_theirs"] = _PAPERS
    if _OUTPUT.value:
      steps, longest = data["ChunkFlow"]
      problem = placement_problem(
        chunk_plan(steps[0], _CHUNK),
        machines["FlexSP's cluster"],
        devices=_DEVICES,
        tokens_per_device=_ROOM,
      )
      draw(_OUTPUT.value, problem, longest)
  if "fit" in _PART.value:
    figures["fit"] = fitted()
  report("balance", devices=_DEVICES, chunk_size=_CHUNK, **rounded(figures))


if __name__ == "__main__":
  app.run(main)
