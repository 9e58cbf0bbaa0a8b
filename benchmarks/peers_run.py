"""One contestant of `peers.py`, as a process of its own.

  python peers_run.py JOB FOLDER

Prints the figures as a JSON line, or why there are none.
"""

import json
import pathlib
import sys
from typing import Any

from peers_job import Job


def figures(job: Job, folder: pathlib.Path) -> dict[str, Any]:
  """What the contestant's own module measures."""
  if job.contestant.startswith("jaxchunk"):
    import peers_jax

    if job.task == "compile":
      return peers_jax.run_compile(job)
    return peers_jax.run(job, folder)
  if job.contestant.startswith("TRL"):
    import peers_trl

    return peers_trl.run(job, folder)
  import peers_torch

  return peers_torch.run(job, folder)


def main(arguments: list[str]) -> None:
  """Runs the job, reporting any failure as what it is."""
  job = Job(**json.loads(arguments[0]))
  try:
    line = figures(job, pathlib.Path(arguments[1]))
  except Exception as error:  # Reported, with its kind, beside the figures.
    text = str(error).strip().splitlines() or [""]
    line = {"skipped": f"{type(error).__name__}: {text[0][:160]}"}
  print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
