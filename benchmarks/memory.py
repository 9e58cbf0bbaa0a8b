"""Compiled memory against length: chunks beside per-layer rematerialisation.

  python benchmarks/memory.py [--picture=FILE.png]

Growth per added token from 8k to 256k tokens against the formula (keys,
values and their fp32 gradients; or the layers' inputs), and the length from
which a lane of chunks needs less than the whole row with per-layer remat, as
the formulas predict it and as compiled, for three ratios of query to
key/value heads. Temporary bytes, by the compiler's own account.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from absl import app, flags
from common import report, rounded
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking.memory import (
  STRATEGIES,
  break_even_length,
  remat_bytes_per_token,
  state_bytes_per_token,
)

_PICTURE = flags.DEFINE_string("picture", None, "Where to draw, if anywhere.")

_CHUNK = 1024
_LENGTHS = tuple(1024 * 2**n for n in range(3, 9))
_SHORT = tuple(1024 * 2**n for n in range(6))
_BASE = jc.ModelConfig(
  vocab_size=512,
  d_model=512,
  num_layers=4,
  num_heads=8,
  num_kv_heads=2,
  head_dim=64,
  d_ff=1024,
)


def abstract(cfg: jc.ModelConfig) -> jc.Transformer:
  return nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))


def temporaries(lowered: jax.stages.Lowered) -> int:
  return lowered.compile().memory_analysis().temp_size_in_bytes


def chunked(cfg: jc.ModelConfig, length: int, strategy: Any) -> int:
  return temporaries(
    jc.lower_chunked(
      abstract(cfg), capacity=length, chunk_size=_CHUNK, strategy=strategy
    )
  )


def remat(cfg: jc.ModelConfig, length: int) -> int:
  """The whole row at once, keeping only the layers' inputs."""

  def loss(model: jc.Transformer, tokens: jax.Array) -> jax.Array:
    h = model.hidden(tokens, implementation="xla", remat=True)
    nll, _ = jc.linear_cross_entropy(h, model.unembed, tokens)
    return nll.sum()

  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  # The accumulators of the chunk program are arguments; so are these.
  return temporaries(jax.jit(jax.grad(loss)).lower(abstract(cfg), tokens))


def crossing(xs: Any, below: Any, above: Any) -> float | None:
  """Where `below` falls under `above`, between the points by a straight line.

  `None` if it never does.
  """
  gap = np.asarray(below, float) - np.asarray(above, float)
  for n in range(len(xs)):
    if gap[n] <= 0:
      if n == 0:
        return float(xs[0])
      part = gap[n - 1] / (gap[n - 1] - gap[n])
      return float(xs[n - 1] + part * (xs[n] - xs[n - 1]))
  return None


def break_even(cfg: jc.ModelConfig) -> dict[str, Any]:
  strategy = "chunk_outer"
  lengths = _SHORT
  ours = [chunked(cfg, n, strategy) for n in lengths]
  theirs = [remat(cfg, n) for n in lengths]
  ours_slope = state_bytes_per_token(cfg, strategy)
  theirs_slope = remat_bytes_per_token(cfg)
  return {
    "bytes_per_token": {
      "chunk_outer": ours_slope,
      "layer_outer": state_bytes_per_token(cfg, "layer_outer"),
      "remat_predicted": theirs_slope,
      "remat_compiled": (theirs[-1] - theirs[-2]) / (lengths[-1] - lengths[-2]),
    },
    "break_even_tokens": {
      "predicted": break_even_length(cfg, _CHUNK),
      "compiled": crossing(lengths, ours, theirs),
    },
  }


def draw(path: str, series: dict[str, list[int]]) -> None:
  figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
  axes = figure.subplots()
  for (name, values), style in zip(series.items(), "o^s", strict=False):
    axes.plot(_LENGTHS, np.asarray(values) / 2**20, marker=style, label=name)
  axes.set(
    xscale="log",
    yscale="log",
    xlabel="sequence length (tokens)",
    ylabel="compiled temporaries (MiB)",
    title=f"Peak memory against length, chunks of {_CHUNK}",
  )
  axes.set_xscale("log", base=2)
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=150)


def main(_: list[str]) -> None:
  series: dict[str, list[int]] = {
    name: [chunked(_BASE, n, name) for n in _LENGTHS] for name in STRATEGIES
  }
  series["per-layer remat, whole row"] = [remat(_BASE, n) for n in _LENGTHS]
  span = _LENGTHS[-1] - _LENGTHS[0]
  growth = {name: (v[-1] - v[0]) / span for name, v in series.items()}
  ratios = {
    name: growth[name] / state_bytes_per_token(_BASE, name)
    for name in STRATEGIES
  }
  mixed = dataclasses.replace(_BASE, window_pattern=(1024, None))
  long, short = (chunked(mixed, n, "chunk_outer") for n in (1 << 18, 1 << 13))
  windowed = (long - short) / span / state_bytes_per_token(mixed, "chunk_outer")
  gqa = {
    f"{8}:{keys}": break_even(dataclasses.replace(_BASE, num_kv_heads=keys))
    for keys in (8, 2, 1)
  }
  if _PICTURE.value:
    draw(_PICTURE.value, series)
  report(
    "memory",
    chunk_size=_CHUNK,
    lengths=_LENGTHS,
    bytes_per_token=rounded(growth),
    ratio_to_formula=rounded(ratios),
    gqa=rounded(gqa),
    with_windows=rounded(windowed),
    ok=all(0.95 <= r <= 1.02 for r in (*ratios.values(), windowed)),
  )


if __name__ == "__main__":
  app.run(main)
