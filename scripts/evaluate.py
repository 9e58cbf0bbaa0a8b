"""Evaluates the newest checkpoint of a run of train.py.

  python scripts/evaluate.py --workdir=runs/quick --lengths=1024,4096

Writes evaluation.json and pictures; --redraw draws them from the file alone.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from jaxchunk.evaluation.run import CHOICES, Settings, evaluate, redraw
from jaxchunk.training.checkpoint import CheckpointError

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder: WORKDIR/evaluation.")
_TASKS = flags.DEFINE_list("tasks", list(CHOICES), f"Of {','.join(CHOICES)}.")
_LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048", "4096"], "In tokens.")
_DEPTHS = flags.DEFINE_list("depths", ["0", ".25", ".5", ".75", "1"], "0 to 1.")
_SAMPLES = flags.DEFINE_integer("samples", 10, "Per task, length and depth.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples.")
_EDGES = flags.DEFINE_list("edges", None, "Borders of bpb's buckets, tokens.")
_MAX = flags.DEFINE_integer("max_tokens", None, "Held-out tokens for bpb.")
_SOURCE = flags.DEFINE_string("source", None, "Documents other than the run's.")
_CHUNK = flags.DEFINE_integer("chunk_size", None, "Other than the run's.")
_EXTRAPOLATE = flags.DEFINE_bool("extrapolate", False, "Allow any length.")
_REDRAW = flags.DEFINE_bool("redraw", False, "Only draw the pictures again.")


def main(argv: list[str]) -> None:
  """Evaluates; ends with one line on stderr if that is not possible."""
  if len(argv) > 1:
    sys.exit(f"evaluate.py: {argv[1]!r} is not a flag; write --name=value")
  logging.set_verbosity(logging.WARNING)
  workdir = Path(_WORKDIR.value)
  output = Path(_OUTPUT.value or workdir / "evaluation")
  try:
    if _REDRAW.value:
      redraw(output)
    else:
      settings = Settings(
        tasks=_TASKS.value,
        lengths=[int(n) for n in _LENGTHS.value],
        depths=[float(d) for d in _DEPTHS.value],
        samples=_SAMPLES.value,
        seed=_SEED.value,
        edges=_EDGES.value and [int(n) for n in _EDGES.value],
        max_tokens=_MAX.value,
        source=_SOURCE.value,
        chunk_size=_CHUNK.value,
        extrapolate=_EXTRAPOLATE.value,
      )
      evaluate(workdir, output, settings)
  except (ValueError, OSError, CheckpointError) as error:
    sys.exit(f"evaluate.py: {error}")
  print(f"Results: {output}")


if __name__ == "__main__":
  app.run(main)
