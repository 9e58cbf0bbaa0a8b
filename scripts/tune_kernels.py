"""Times block sizes of attention on this machine's device.

python scripts/tune_kernels.py [--backend=xla] [--widths=64,128] [--write]

Prints the fastest for each head width, and how they compare with those of
kernels/attention/tables.py, into which `--write` puts them.
"""

import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
from absl import app, flags
from tqdm import tqdm

from jaxchunk.kernels.attention import tables, tuning
from jaxchunk.kernels.attention.backends import BACKENDS

_BACKEND = flags.DEFINE_enum(
  "backend", None, BACKENDS, "By default the device's own."
)
_WIDTHS = flags.DEFINE_list("widths", ["64", "128", "256"], "H.")
_QUERIES = flags.DEFINE_integer("queries", None, "T; by the device.")
_PREFIX = flags.DEFINE_integer("prefix", 0, "Keys before the queries.")
_HEADS = flags.DEFINE_integer("kv_heads", 4, "K.")
_GROUP = flags.DEFINE_integer("group", 1, "G, query heads of a key head.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns; the best counts.")
_WRITE = flags.DEFINE_bool("write", False, "Write the table.")


def progress(items: Iterable[Any], name: str) -> Iterable[Any]:
  """A bar on stderr."""
  return tqdm(items, desc=name, file=sys.stderr, leave=False)


def main(argv: list[str]) -> None:
  """Tunes every width and prints a JSON line for each."""
  if len(argv) > 1:
    sys.exit(f"tune_kernels.py: {argv[1]!r} is not a flag; write --name=value")
  device = jax.default_backend()
  backend = _BACKEND.value or {"cpu": "xla"}.get(device, f"pallas_{device}")
  queries = _QUERIES.value or (2048 if device == "cpu" else 8192)
  entries = {}
  for width in map(int, _WIDTHS.value):
    problem = tuning.Problem(
      backend, width, queries, _PREFIX.value, _HEADS.value, _GROUP.value
    )
    entries[problem.key], found = tuning.tune(
      problem, rounds=_ROUNDS.value, progress=progress
    )
    head = {"device": problem.key[0], "backend": backend, "width": width}
    print(json.dumps(head | {"jax": jax.__version__} | found), flush=True)
  if _WRITE.value:
    path = pathlib.Path(tables.__file__).resolve()
    tuning.write_table(backend, entries, path)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
  app.run(main)
