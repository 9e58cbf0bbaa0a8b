"""Gradients by chunks against the full-sequence reference, by dtype.

  python benchmarks/exactness.py [--seed=N]

Prints the worst norm-relative error of the loss or any gradient over chunk
sizes, live chunks, strategies and models, with ragged tails, packed
neighbours, GQA, windows, soft-caps and tied embeddings.
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags
from common import report, rounded
from flax import nnx

import jaxchunk as jc

_SEED = flags.DEFINE_integer("seed", 0, "Of parameters and data.")

_PLAIN = jc.ModelConfig(
  vocab_size=97,
  d_model=48,
  num_layers=3,
  num_heads=6,
  num_kv_heads=2,
  head_dim=8,
  d_ff=80,
)
_MODELS = {
  "plain": _PLAIN,
  "window and caps, tied": dataclasses.replace(
    _PLAIN,
    num_layers=5,
    window_pattern=(20, None),
    attention_softcap=6.0,
    logit_softcap=5.0,
    tie_embeddings=True,
    qk_norm=True,
    post_norms=True,
    qkv_bias=True,
  ),
}
_LENGTHS = ((150, 31, 7), (64, 65, 9, 40))
_CUTS = (
  *((32, live, "chunk_outer") for live in range(6)),
  (50, 1, "chunk_outer"),
  (256, 1, "chunk_outer"),
  (32, 1, "layer_outer"),
  (50, 1, "layer_outer"),
)


def make_batch(seed: int) -> dict[str, Any]:
  rng = np.random.default_rng(seed)
  shape = (len(_LENGTHS), max(map(sum, _LENGTHS)) + 5)
  segments = np.zeros(shape, np.int32)
  for row, sizes in enumerate(_LENGTHS):
    ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    segments[row, : len(ids)] = ids
  return {
    "tokens": rng.integers(0, 97, shape),
    "targets": rng.integers(0, 97, shape),
    "weights": rng.random(shape) * (rng.random(shape) > 0.2),
    "segment_ids": segments,
  }


def worst_error(dtype: str, seed: int) -> dict[str, float]:
  errors = {}
  for name, cfg in _MODELS.items():
    cfg = dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype)
    model = jc.Transformer(cfg, rngs=nnx.Rngs(seed))
    batch = make_batch(seed)
    want_loss, want = jc.full_value_and_grad(model, batch)
    want = jax.tree.leaves(want)
    for size, live, strategy in _CUTS:
      loss, grads = jc.chunked_value_and_grad(
        model,
        batch,
        chunk_size=size,
        live_chunks=live,
        strategy=strategy,
      )
      parts = [abs(float((loss - want_loss) / want_loss))]
      for a, b in zip(jax.tree.leaves(grads), want, strict=True):
        error = np.linalg.norm(np.asarray(a) - np.asarray(b))
        parts.append(float(error / np.linalg.norm(b)))
      case = f"{name}: {strategy} C={size} K={live}"
      # np.max and not max, which may overlook a NaN.
      errors[case] = float(np.max(parts))
      print(f"{dtype} {case}: {errors[case]:.2g}", file=sys.stderr, flush=True)
      # So many programs at once exceed the system's limit on mappings.
      jax.clear_caches()
  return errors


def main(_: list[str]) -> None:
  fp32 = worst_error("float32", _SEED.value)
  with jax.enable_x64(True):
    fp64 = worst_error("float64", _SEED.value)
  worst64 = float(np.max(list(fp64.values())))
  worst32 = float(np.max(list(fp32.values())))
  report(
    "exactness",
    seed=_SEED.value,
    cases=len(fp64),
    worst_fp64=rounded(worst64),
    worst_fp32=rounded(worst32),
    limits={"fp64": 1e-12, "fp32": 1e-5},
    ok=worst64 <= 1e-12 and worst32 <= 1e-5,
  )


if __name__ == "__main__":
  app.run(main)
