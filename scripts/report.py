"""Draws report.png and schedule.png again from the files of a run.

python scripts/report.py --workdir=runs/quick
"""

import sys
from pathlib import Path

from absl import app, flags

from jaxchunk.training import report

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of a run of train.py.", required=True
)


def main(argv: list[str]) -> None:
  """Draws, and prints the path."""
  if len(argv) > 1:
    sys.exit(f"report.py: {argv[1]!r} is not a flag; write --name=value")
  try:
    print(report.draw(Path(_WORKDIR.value)))
  except FileNotFoundError as error:
    sys.exit(f"report.py: {error}")


if __name__ == "__main__":
  app.run(main)
