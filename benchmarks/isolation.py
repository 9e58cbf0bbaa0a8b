"""Whether documents of a packing see each other, for each implementation.

  python benchmarks/isolation.py [--packings=1000] [--gpu_packings=12]
    [--only=xla,layer_outer]

Each implementation gets so many random packings, spread evenly over the masks
(the model's ways have the causal one). In each, one document is replaced and
the others' results are compared bit by bit. A mask without its segments must
be caught.

Pallas kernels are interpreted. For the GPU's, which run as threads with copies
and barriers, that takes a minute a packing: they get fewer.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from common import report
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking.executor import make_options
from jaxchunk.evaluation import isolation
from jaxchunk.evaluation.isolation import MASKS, attention_leaks, model_leaks
from jaxchunk.evaluation.isolation_paged import paged_leaks
from jaxchunk.kernels.paged_attention import pallas_gpu, pallas_tpu, xla
from jaxchunk.kernels.paged_attention.reference import paged_reference

try:
  from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # private before jax 0.11
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

_PACKINGS = flags.DEFINE_integer(
  "packings", 1000, "Of each implementation but those."
)
_GPU_PACKINGS = flags.DEFINE_integer("gpu_packings", 12, "Of pallas_gpu.")
_SEED = flags.DEFINE_integer("seed", 0, "Of lengths and numbers.")
_ONLY = flags.DEFINE_list("only", None, "Names of implementations; all.")

_MODEL = jc.ModelConfig(
  vocab_size=61,
  d_model=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  d_ff=48,
  window_pattern=(9, None),
)
_LENGTH = 64


def attention_run(operation: Any, **options: Any) -> Callable[[int], int]:
  def run(packings: int) -> int:
    leaks = 0
    for number, (mask, mask_of) in enumerate(MASKS.items()):
      share = packings // len(MASKS) + (number < packings % len(MASKS))
      found = attention_leaks(
        operation, mask_of, packings=share, seed=_SEED.value, **options
      )
      print(f"  {mask}: {len(found)} leaks", *found[:1], file=sys.stderr)
      leaks += len(found)
    return leaks

  return run


def model_run(way: isolation.Way) -> Callable[[int], int]:
  return lambda packings: len(
    model_leaks(
      way,
      vocab_size=_MODEL.vocab_size,
      packings=packings,
      length=_LENGTH,
      seed=_SEED.value,
    )
  )


def paged_run(operation: Any, **options: Any) -> Callable[[int], int]:
  return lambda packings: len(
    paged_leaks(operation, packings=packings, seed=_SEED.value, **options)
  )


def implementations() -> dict[str, Callable[[int], int]]:
  model = jc.Transformer(_MODEL, rngs=nnx.Rngs(_SEED.value))

  def chunks(**options: Any) -> Callable[[int], int]:
    made = make_options(model, chunk_size=16, **options)
    key = jax.random.key(_SEED.value)
    return model_run(isolation.by_chunks(model, made, key))

  gpu = InterpretGPUParams()
  return {
    "reference": attention_run(isolation.operation("reference")),
    "xla": attention_run(isolation.operation("xla")),
    "pallas_tpu": attention_run(isolation.operation("pallas_tpu", True)),
    "pallas_gpu": attention_run(
      isolation.operation("pallas_gpu", gpu),
      dtype="bfloat16",
      rows=1,
      length=256,  # The kernel wants 128 queries, and a prefix halves them.
      heads=(1, 1),
    ),
    "chunk_outer K=0": chunks(live_chunks=0, strategy="chunk_outer"),
    "chunk_outer K=2": chunks(live_chunks=2, strategy="chunk_outer"),
    "layer_outer": chunks(strategy="layer_outer"),
    "spaco": chunks(strategy=jc.SpaCO(0.5)),
    "whole rows": model_run(isolation.in_whole_rows(model, "reference")),
    "paged reference": paged_run(paged_reference),
    "paged xla": paged_run(xla.paged_forward),
    "paged pallas_tpu": paged_run(
      functools.partial(pallas_tpu.tpu_paged_forward, interpret=True)
    ),
    "paged pallas_gpu": paged_run(
      functools.partial(pallas_gpu.gpu_paged_forward, interpret=gpu),
      dtype="bfloat16",
    ),
  }


def broken_is_caught() -> bool:
  run = isolation.operation("reference")

  def without_segments(inputs: Any, mask: Any) -> Any:
    fields = {"q_segment_ids": None, "kv_segment_ids": None}
    return run(inputs, dataclasses.replace(mask, **fields))

  return all(
    attention_leaks(without_segments, mask_of, packings=16)
    for mask_of in MASKS.values()
  )


def main(_: list[str]) -> None:
  # The GPU interpreter blocks a thread for each warpgroup: see pallas_gpu.py.
  jax.config.update("jax_num_cpu_devices", 8)
  leaks, packings = {}, {}
  for name, run in implementations().items():
    if _ONLY.value is None or name in _ONLY.value:
      print(name, file=sys.stderr, flush=True)
      asked = _GPU_PACKINGS if "pallas_gpu" in name else _PACKINGS
      packings[name] = asked.value
      leaks[name] = run(asked.value)
  caught = broken_is_caught()
  report(
    "isolation",
    seed=_SEED.value,
    packings=packings,
    leaks=leaks,
    broken_is_caught=caught,
    ok=caught and not any(leaks.values()),
  )


if __name__ == "__main__":
  app.run(main)
