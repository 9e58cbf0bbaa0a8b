"""Memory and compile time of pipeline programs, by the compiler's account.

    python benchmarks/pipeline_memory.py

Compiles, for CPU devices that are forced to be there, and runs nothing:

- `schedules`: temporary memory of a device for each schedule, with what
  backward passes read stored;
- `lengths`: the same for lanes of more and more chunks with K = 1; beside it
  the keys, values and their gradients that the table's arenas hold, and what
  is left without them;
- `microbatches`: seconds to compile, and memory, for more and more of them.
"""

import json
import os
import time

from absl import app, flags

_STAGES = flags.DEFINE_integer("stages", 8, "Pipeline stages.")
_LAYERS = flags.DEFINE_integer("layers", 16, "Layers of the model.")
_CHUNK = flags.DEFINE_integer("chunk", 256, "Tokens of a chunk.")
_WIDTH = flags.DEFINE_integer("width", 128, "Of the model.")
_ONLY = flags.DEFINE_enum(
  "only", "all", ("all", "schedules", "lengths", "microbatches"), "Which part."
)


def main(_: list[str]) -> None:
  os.environ["JAX_PLATFORMS"] = "cpu"
  forced = f"--xla_force_host_platform_device_count={_STAGES.value}"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {forced}"
  parts = {
    "schedules": schedules,
    "lengths": lengths,
    "microbatches": microbatches,
  }
  for name, part in parts.items():
    if _ONLY.value in ("all", name):
      part()


def schedules() -> None:
  count = 2 * _STAGES.value
  for name in ("gpipe", "1f1b", "zb_h1", "zb_v", "v_half", "v_min"):
    show("schedule", name, [1] * count, live=1)


def lengths() -> None:
  for size in (8, 16, 32, 64):
    show("length", "1f1b", [size, 1, 1, 1], live=1)


def microbatches() -> None:
  for count in (8, 64, 512):
    show("microbatches", "1f1b", [1] * count, live=1)


def show(part: str, schedule: str, sizes: list[int], *, live: int) -> None:
  import jax

  from jaxchunk.chunking import executor
  from jaxchunk.chunking.traces import trace_stages
  from jaxchunk.sharding.mesh import Layout
  from jaxchunk.sharding.pipeline.slots import sizes_of
  from jaxchunk.sharding.pipeline.table import Lanes
  from jaxchunk.sharding.pipeline.tables import Pipeline, build

  model = abstract_model()
  layout = Layout(stage=_STAGES.value, pipeline=Pipeline(schedule=schedule))
  options = executor.make_options(
    model,
    chunk_size=_CHUNK.value,
    live_chunks=live,
    strategy="chunk_outer",
  )
  lanes = Lanes(tuple(sizes), live)
  traced = trace_stages(
    layout, model, lanes, options, mesh=layout.mesh(jax.devices())
  )
  lowered = traced.lower()
  began = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - began
  table = build(schedule, layout.stage, lanes)
  slots = sizes_of(table)
  temporary = compiled.memory_analysis().temp_size_in_bytes
  arenas = arena_bytes(model, table.placement.parts, slots)
  line = {
    "part": part,
    "schedule": schedule,
    "chunks": sizes[:4] if len(set(sizes)) > 1 else [sizes[0], "x", len(sizes)],
    "ticks": len(table.ticks),
    **slots._asdict(),
    "temporary_mb": temporary / 1e6,
    "keys_and_gradients_mb": arenas / 1e6,
    "without_them_mb": (temporary - arenas) / 1e6,
    "compile_seconds": round(seconds, 1),
  }
  print(json.dumps(line), flush=True)


def abstract_model():
  from flax import nnx

  import jaxchunk as jc

  width = _WIDTH.value
  cfg = jc.ModelConfig(
    vocab_size=256,
    d_model=width,
    num_layers=_LAYERS.value,
    num_heads=4,
    num_kv_heads=2,
    head_dim=width // 4,
    d_ff=3 * width,
  )
  return nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))


def arena_bytes(model, parts: int, slots) -> int:
  """Of a device's keys and values, in fp32, and of their gradients."""
  cfg = model.cfg
  layers = cfg.num_layers // (_STAGES.value * parts)
  token = 2 * cfg.kv_heads * cfg.head_width * layers * 4
  return (slots.state + slots.cotangent) * _CHUNK.value * token


if __name__ == "__main__":
  app.run(main)
