"""Evaluates the newest checkpoint of a run of train.py.

  python scripts/evaluate.py --workdir=runs/quick --lengths=1024,4096

Writes evaluation.json and pictures; --redraw draws them from the file alone.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from jaxchunk.evaluation.run import CHOICES, Settings, evaluate, redraw
from jaxchunk.training.checkpoint import CheckpointError

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder: WORKDIR/evaluation.")
_LENGTHS = flags.DEFINE_list("lengths", ["1024", "2048", "4096"], "In tokens.")
_DEPTHS = flags.DEFINE_list("depths", ["0", ".25", ".5", ".75", "1"], "0 to 1.")
_EDGES = flags.DEFINE_list("edges", None, "Borders of bpb's buckets, tokens.")
_REDRAW = flags.DEFINE_bool("redraw", False, "Only draw the pictures again.")
_OTHERS = {
  "tasks": flags.DEFINE_list("tasks", list(CHOICES), f"Of {list(CHOICES)}."),
  "samples": flags.DEFINE_integer("samples", 10, "Per task, length, depth."),
  "seed": flags.DEFINE_integer("seed", 0, "Of the samples."),
  "max_tokens": flags.DEFINE_integer("max_tokens", None, "Of text for bpb."),
  "source": flags.DEFINE_string("source", None, "Other documents."),
  "chunk_size": flags.DEFINE_integer(
    "chunk_size", None, "Other than the run's."
  ),
  "extrapolate": flags.DEFINE_bool("extrapolate", False, "Allow any length."),
}


def main(argv: list[str]) -> None:
  """Evaluates; ends with one line on stderr if that is not possible."""
  if len(argv) > 1:
    sys.exit(f"evaluate.py: {argv[1]!r} is not a flag; write --name=value")
  if not (_WORKDIR.value or (_REDRAW.value and _OUTPUT.value)):
    sys.exit("evaluate.py: give --workdir (or --redraw with --output)")
  logging.set_verbosity(logging.WARNING)
  workdir = Path(_WORKDIR.value or "")
  output = Path(_OUTPUT.value or workdir / "evaluation")
  try:
    settings = Settings(
      lengths=[int(n) for n in _LENGTHS.value],
      depths=[float(d) for d in _DEPTHS.value],
      edges=_EDGES.value and [int(n) for n in _EDGES.value],
      **{name: flag.value for name, flag in _OTHERS.items()},
    )
    redraw(output) if _REDRAW.value else evaluate(workdir, output, settings)
  except (ValueError, OSError, CheckpointError) as error:
    sys.exit(f"evaluate.py: {error}")
  print(f"Results: {output}")


if __name__ == "__main__":
  app.run(main)
