"""Writes the newest checkpoint of a run in the format of Hugging Face.

  python scripts/export.py --workdir=runs/sft --output=my-model
  python scripts/export.py --workdir=runs/lora --output=my-adapters --adapters

A model with adapters is merged, or with --adapters these alone are written for
PEFT. Tokenizer, chat template and architecture are those of the model that the
run began with.
"""

import sys

from absl import app, flags, logging

from jaxchunk.training.checkpoint import CheckpointError
from jaxchunk.training.export import export_run

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "A folder.", required=True)
_ADAPTERS = flags.DEFINE_bool("adapters", False, "Adapters alone, for PEFT.")
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "Of the weights; by default that of the parameters.",
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace weights there.")


def main(argv: list[str]) -> None:
  """Ends with one line on stderr if that is not possible."""
  if len(argv) > 1:
    sys.exit(f"export.py: {argv[1]!r} is not a flag; write --name=value")
  logging.set_verbosity(logging.WARNING)
  try:
    done = export_run(
      _WORKDIR.value,
      _OUTPUT.value,
      adapters=_ADAPTERS.value,
      dtype=_DTYPE.value,
      overwrite=_OVERWRITE.value,
    )
  except (ValueError, OSError, CheckpointError) as error:
    sys.exit(f"export.py: {error}")
  print(done)


if __name__ == "__main__":
  app.run(main)
