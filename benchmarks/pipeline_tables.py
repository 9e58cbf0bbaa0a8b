"""Pipeline schedules: how long they are, what they keep, what they cost to lay.

  python benchmarks/pipeline_tables.py [--devices=64] [--chunks=512]

One JSON line for each schedule, of microbatches and of lanes of many chunks:
ticks; the share of ticks in which a device does nothing, where all operations
take one; slots of a device; and seconds to build the table, to prove it legal
and to lay out its slots. Nothing runs on a device.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags
from common import report, rounded

from jaxchunk.sharding.pipeline.slots import rows_of
from jaxchunk.sharding.pipeline.table import Lanes, Table
from jaxchunk.sharding.pipeline.tables import BUILDERS, build, two_bw
from jaxchunk.sharding.pipeline.validate import check_table

_DEVICES = flags.DEFINE_integer("devices", 64, "Of a pipeline.", lower_bound=1)
_CHUNKS = flags.DEFINE_integer("chunks", 512, "Of a batch.", lower_bound=1)
_LIVE = flags.DEFINE_integer("live", 4, "Kept of a lane of many chunks.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the lanes' sizes.")


def tailed_lanes(chunks: int, live: int, seed: int) -> Lanes:
  """Mostly lanes of one chunk, and a tail of long ones (Pareto, alpha 1)."""
  rng = np.random.default_rng(seed)
  sizes: list[int] = []
  while (left := chunks - sum(sizes)) > 0:
    sizes.append(min(left, 32, int(rng.pareto(1.0)) + 1))
  return Lanes(tuple(sizes), live)


def figures(make: Callable[[], Table]) -> dict[str, Any]:
  times = [time.perf_counter()]
  table = make()
  times.append(time.perf_counter())
  check_table(table)
  times.append(time.perf_counter())
  rows = rows_of(table)
  times.append(time.perf_counter())
  seconds = np.diff(times).tolist()
  return {
    "ticks": len(table.ticks),
    "idle": float(np.mean(rows.kind == 0)),
    "slots": rows.sizes._asdict(),
    **dict(zip(("build_s", "check_s", "slots_s"), seconds, strict=True)),
  }


def main(_: list[str]) -> None:
  devices, chunks = _DEVICES.value, _CHUNKS.value
  whats = {
    "microbatches": Lanes((1,) * chunks),
    "lanes": tailed_lanes(chunks, _LIVE.value, _SEED.value),
  }
  for what, lanes in whats.items():
    makes: dict[str, Callable[[], Table]] = {
      name: functools.partial(build, name, devices, lanes) for name in BUILDERS
    }
    # Two batches, each as large as that of the others.
    makes["two_bw"] = functools.partial(two_bw, devices, [lanes, lanes])
    for name, make in makes.items():
      report(
        "pipeline_tables",
        schedule=name,
        what=what,
        devices=devices,
        chunks=lanes.count,
        longest=max(lanes.sizes),
        **rounded(figures(make)),
      )


if __name__ == "__main__":
  app.run(main)
