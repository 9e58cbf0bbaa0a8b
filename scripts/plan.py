"""Finds how to train a model on devices that need not be there.

  python scripts/plan.py --model=llama3.1-8b --lengths=2000:500,131072:1
    --target=h200:8 [--compile=2]

The model is a preset, a folder with a config.json, or configs/NAME.py; lengths
are tokens:sequences, or a .json or .csv file. Weighs layouts, strategies and
chunk sizes by formula and prints the best, with the flags of scripts/train.py;
exits with 1 and says what to change if nothing fits. With --compile the best
are compiled, which decides (extra `aot`; a model of 8B takes minutes).
"""

import json
import pathlib
import sys

import jax
from absl import app, flags

from jaxchunk.planner import report
from jaxchunk.planner.plan import make_plan
from jaxchunk.planner.requests import read_request

_MODEL = flags.DEFINE_string("model", None, "See above.", required=True)
_LENGTHS = flags.DEFINE_string("lengths", None, "See above.", required=True)
_TARGET = flags.DEFINE_string("target", "h200", "h200, h200:8, v5e:4x4, ...")
_TRAINABLE = flags.DEFINE_enum("trainable", "full", ["full", "lora"], "What.")
_OPTIMIZER = flags.DEFINE_string("optimizer", None, "As train.optimizer.")
_MEMORY = flags.DEFINE_string("optimizer_memory", None, "device or host.")
_BATCH = flags.DEFINE_integer("global_batch_tokens", 262_144, "Of a step.")
_LIMIT = flags.DEFINE_float("memory_limit", None, "GiB of a device to use.")
_COMPILE = flags.DEFINE_integer("compile", 0, "How many of the best.")
_SHOW = flags.DEFINE_integer("show", 10, "How many to print.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "A JSON file for the plan.")


def main(argv: list[str]) -> None:
  """Prints the plan."""
  if len(argv) > 1:
    sys.exit(f"plan.py: {argv[1]!r} is not a flag; write --name=value")
  # Nothing runs; a device that is there is not touched.
  jax.config.update("jax_platforms", "cpu")
  try:
    request = read_request(
      model=_MODEL.value,
      lengths=_LENGTHS.value,
      target=_TARGET.value,
      trainable=_TRAINABLE.value,
      batch_tokens=_BATCH.value,
      memory_gib=_LIMIT.value,
      optimizer=_OPTIMIZER.value,
      optimizer_memory=_MEMORY.value,
    )
    plan = make_plan(request, compile_best=_COMPILE.value, say=report.progress)
  except (ValueError, RuntimeError) as error:
    sys.exit(f"plan.py: {error}")
  print(report.text(plan, _SHOW.value))
  if _OUT.value:
    values = json.dumps(report.as_json(plan), indent=1)
    pathlib.Path(_OUT.value).write_text(values + "\n", encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
