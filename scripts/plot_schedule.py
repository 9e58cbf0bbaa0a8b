"""Draws what each device of a pipeline does when, and what it keeps.

  python scripts/plot_schedule.py --schedule=1f1b --devices=4 --lanes=8
  python scripts/plot_schedule.py --schedule=zb_v --lanes=4,1,2,1 --live=1

`--lanes=8` is 8 microbatches, `4,1,2,1` the chunks of each of four lanes, `4,`
one lane of four. `--measured` is a JSON file of what ran, in seconds:

  {"spans": [[device, kind, stage, item, start, stop], ...]}

with kinds F_keep, F_drop, B, W, embed and head; it is drawn below, and what is
simulated takes its mean times unless --costs is given. Prints one line.
"""

import sys

from absl import app, flags

from jaxchunk.sharding.pipeline import reading
from jaxchunk.sharding.pipeline.picture import draw_timeline
from jaxchunk.sharding.pipeline.simulate import event_driven, lockstep
from jaxchunk.sharding.pipeline.usage import peak_slots

_SCHEDULE = flags.DEFINE_string("schedule", "1f1b", f"Of {reading.NAMES}.")
_DEVICES = flags.DEFINE_integer("devices", 4, "P.")
_LANES = flags.DEFINE_string("lanes", "8", "Microbatches, or chunks of lanes.")
_LIVE = flags.DEFINE_integer("live", None, "Chunks of a lane kept; else all.")
_BATCHES = flags.DEFINE_integer("batches", 2, "Of two_bw, with --lanes each.")
_COSTS = flags.DEFINE_string(
  "costs",
  None,
  "Times F,B,W of a chunk on a device, 1,1,1 if unset; B takes W's time too in "
  "schedules without W.",
)
_MODE = flags.DEFINE_enum("mode", "lockstep", ["lockstep", "event"], "How.")
_MEASURED = flags.DEFINE_string("measured", None, "JSON of what was measured.")
_OUT = flags.DEFINE_string("out", "schedule.png", "Picture, .png or .svg.")


def main(argv: list[str]) -> None:
  """Draws; ends with one line on stderr if that is not possible."""
  if len(argv) > 1:
    sys.exit(f"plot_schedule.py: {argv[1]!r} is not a flag; write --name=value")
  simulate = lockstep if _MODE.value == "lockstep" else event_driven
  try:
    out = reading.picture_path(_OUT.value)
    lanes = reading.read_lanes(_LANES.value, _LIVE.value)
    table = reading.read_table(
      _SCHEDULE.value, _DEVICES.value, lanes, _BATCHES.value
    )
    measured = reading.read_measured(_MEASURED.value, table)
    costs = reading.read_costs(_COSTS.value, table, measured)
    timeline = simulate(table, costs)
    draw_timeline(
      table,
      timeline,
      measured=measured,
      unit="" if measured is None else "s",
      path=out,
    )
  except (ValueError, OSError) as error:
    sys.exit(f"plot_schedule.py: {error}")
  slots = {name: int(n.max()) for name, n in peak_slots(table).items()}
  print(
    f"{table.name}: {len(table.ticks)} ticks, makespan "
    f"{timeline.makespan:.6g}, bubble {timeline.bubble:.1%}, peak slots "
    f"{', '.join(f'{name} {count}' for name, count in slots.items())}: {out}"
  )


if __name__ == "__main__":
  app.run(main)
