"""Says whether a run fits on devices that need not be there.

  python scripts/compile.py --config=configs/x.py --target=h200 [--longest=N]

The target is one device (h200), a slice (v5e:4x4) or a host (h200:8), as many
as the configuration's layout takes.

Compiles the run's programs: a lane of each capacity up to the longest sequence
(data.max_document_tokens unless --longest is given), and the update. Prints
what each takes on the device and of the host's memory, with all that lies
there meanwhile; exits with 1 if one does not fit. Needs the extra `aot`.
"""

import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from jaxchunk import targets
from jaxchunk.training import fits
from jaxchunk.training.config import Config, ConfigError, validate
from jaxchunk.training.flags import parse_flags

_CONFIG = config_flags.DEFINE_config_file("config")
_TARGET = flags.DEFINE_string(
  "target",
  "h200",
  f"What to compile for, out of {sorted(targets.TARGETS)}; 'v5e:4x4' is a "
  "slice, 'h200:8' a host.",
)
_LONGEST = flags.DEFINE_integer(
  "longest", None, "Tokens of the longest sequence.", lower_bound=1
)
flags.mark_flags_as_required(["config"])

_GIB = 2**30


def main(argv: list[str]) -> None:
  """Prints a line for each program."""
  if len(argv) > 1:
    sys.exit(f"compile.py: {argv[1]!r} is not a flag; write --name=value")
  config: Config = _CONFIG.value
  longest = _LONGEST.value or config.data.max_document_tokens
  try:
    validate(config)
    if longest is None:
      raise ConfigError(
        "data.max_document_tokens=None: name the longest sequence, --longest=N"
      )
    # Nothing runs; a device that is there is not touched.
    jax.config.update("jax_platforms", "cpu")
    target = targets.target(_TARGET.value)
    layout = config.layout.layout()
    devices = 1 if layout is None else layout.num_devices
    print(f"Compiled for {devices} x {target.device.device_kind}.")
    if layout is not None:
      print(layout.table())
  except (ConfigError, ValueError, RuntimeError) as error:
    sys.exit(f"compile.py: {error}")
  limit, worst = fits.limit(target), 0
  for name, size in fits.kept_bytes(config).items():
    print(f"{name:24} {size / _GIB:8.2f} GiB")
  print(f"{'while there runs':24} {'device':>8}     {'host':>8}")
  for need in fits.needs(config, target, longest):
    print(
      f"{need.program:24} {need.device / _GIB:8.2f} GiB "
      f"{need.host / _GIB:8.2f} GiB",
      flush=True,
    )
    if need.refused:
      print(f"  {need.refused}")
    worst = max(worst, need.device)
  fit = "fits" if worst <= limit else "does NOT fit"
  print(
    f"{worst / _GIB:.2f} of {limit / _GIB:.2f} GiB "
    f"({fits.RESERVE:.0%} of {target.kind} are left to the runtime): {fit}"
  )
  if worst > limit:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
