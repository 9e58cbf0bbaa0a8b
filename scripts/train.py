"""Trains a model by chunks, or goes on with the run that a folder holds.

  python scripts/train.py --config=configs/quickstart.py --workdir=runs/quick

Any field of the configuration can be set: --config.train.learning_rate=3e-4.
Run the same command again to go on after SIGTERM, Ctrl-C or a crash. On several
hosts run it on each; outside Cloud TPU, Slurm, Open MPI and Kubernetes name
--coordinator_address, --num_processes and --process_id.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from jaxchunk.training import distributed, loop
from jaxchunk.training.checkpoint import CheckpointError
from jaxchunk.training.config import ConfigError
from jaxchunk.training.flags import parse_flags, profile_steps

_CONFIG = config_flags.DEFINE_config_file("config")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for checkpoints, metrics and pictures."
)
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps", None, "FIRST:LAST steps to trace for xprof, as in 10:12."
)
_ADDRESS = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT of process 0; a cluster tells it."
)
_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes there are; likewise."
)
_PROCESS = flags.DEFINE_integer(
  "process_id", None, "Which one this is, from 0; likewise."
)
flags.mark_flags_as_required(["config", "workdir"])
_ERRORS = (
  ConfigError,
  CheckpointError,
  distributed.ProcessError,
  loop.NonFiniteError,
)


def main(argv: list[str]) -> None:
  """Trains; ends with one line on stderr if that is not possible."""
  if len(argv) > 1:
    sys.exit(f"train.py: {argv[1]!r} is not a flag; write --name=value")
  try:
    distributed.initialize(
      _WORKDIR.value,
      _CONFIG.value,
      coordinator_address=_ADDRESS.value,
      num_processes=_PROCESSES.value,
      process_id=_PROCESS.value,
    )
    result = loop.train(
      _CONFIG.value,
      _WORKDIR.value,
      profile_steps=profile_steps(_PROFILE_STEPS.value),
    )
  except _ERRORS as error:
    distributed.fail(error)
  if distributed.leads():
    print(loop.describe_result(result))


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
