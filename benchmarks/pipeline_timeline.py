"""A pipeline that runs, drawn beside its simulation.

    python benchmarks/pipeline_timeline.py --schedule=1f1b --out=measured.json
    python scripts/plot_schedule.py --schedule=1f1b --devices=4 --lanes=8 \\
      --measured=measured.json --out=timeline.png

Runs one batch on CPU devices that are forced to be there, which share the
cores: each waits for the others, so it shows the order and not the speed.
"""

import dataclasses
import json
import os

from absl import app, flags

_SCHEDULE = flags.DEFINE_string("schedule", "1f1b", "A name of `BUILDERS`.")
_STAGES = flags.DEFINE_integer("stages", 4, "Pipeline stages.")
_LANES = flags.DEFINE_list("lanes", ["1"] * 8, "Chunks of each lane.")
_LIVE = flags.DEFINE_integer("live", 1, "K.")
_LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the model.")
_WIDTH = flags.DEFINE_integer("width", 256, "Of the model.")
_CHUNK = flags.DEFINE_integer("chunk", 256, "Tokens of a chunk.")
_OUT = flags.DEFINE_string("out", "measured.json", "Where spans go.")


def main(_: list[str]) -> None:
  os.environ["JAX_PLATFORMS"] = "cpu"
  forced = f"--xla_force_host_platform_device_count={_STAGES.value}"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {forced}"
  import jax
  import numpy as np
  from flax import nnx

  import jaxchunk as jc
  from jaxchunk.chunking import executor, pipeline
  from jaxchunk.sharding.mesh import Layout
  from jaxchunk.sharding.pipeline.measure import Clock
  from jaxchunk.sharding.pipeline.simulate import (
    event_driven,
    fitted_costs,
    lockstep,
  )
  from jaxchunk.sharding.pipeline.table import Lanes
  from jaxchunk.sharding.pipeline.tables import Pipeline
  from jaxchunk.sharding.pipeline.timeline import write_timeline
  from jaxchunk.types import Example

  width, size = _WIDTH.value, _CHUNK.value
  cfg = jc.ModelConfig(
    vocab_size=512,
    d_model=width,
    num_layers=_LAYERS.value,
    num_heads=4,
    num_kv_heads=2,
    head_dim=width // 4,
    d_ff=3 * width,
  )
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  layout = Layout(
    stage=_STAGES.value, pipeline=Pipeline(schedule=_SCHEDULE.value)
  )
  options = executor.make_options(
    model,
    chunk_size=size,
    live_chunks=_LIVE.value,
    strategy="chunk_outer",
  )
  # The executor takes the costliest lanes first.
  sizes = sorted(map(int, _LANES.value), reverse=True)
  rng = np.random.default_rng(0)
  examples = []
  for chunks in sizes:
    tokens = rng.integers(0, 512, chunks * size).astype(np.int32)
    weights = np.ones(len(tokens), np.float32)
    examples.append(Example(tokens, tokens, weights))
  clock = Clock()
  for _ in range(2):
    clock.clear()
    sums = pipeline.accumulate_stages(
      layout, model, examples, options, clock=clock
    )
    jax.block_until_ready(sums.grads)
  table = layout.pipeline.table(layout.stage, Lanes(tuple(sizes), _LIVE.value))
  timeline = clock.timeline(table)
  write_timeline(timeline, _OUT.value)
  costs = fitted_costs(table, timeline)
  found = {
    "schedule": _SCHEDULE.value,
    "measured_seconds": timeline.makespan,
    "measured_bubble": timeline.bubble,
    "lockstep_seconds": lockstep(table, costs).makespan,
    "event_seconds": event_driven(table, costs).makespan,
    "costs": {
      k: v for k, v in dataclasses.asdict(costs).items() if k in ("f", "b", "w")
    },
  }
  print(json.dumps(found), flush=True)


if __name__ == "__main__":
  app.run(main)
