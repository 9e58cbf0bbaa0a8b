"""What a report shows besides the metrics of the steps: `run.json`."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxchunk.data.accounting import EXCLUSIONS, KEPT, Accounting
from jaxchunk.training.schedule import Schedule

FILE_NAME = "run.json"
CONFIG_NAME = "config.json"


@dataclasses.dataclass(frozen=True)
class Lengths:
  """How many documents have which length.

  Attributes:
    edges: Borders of the bins, in tokens, bin by bin larger.
    counts: Documents in each bin, by what becomes of them.
  """

  edges: list[float]
  counts: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes against the length of a sequence, one line a way to train.

  Attributes:
    lengths: In tokens.
    bytes: Of each line, at each length.
  """

  lengths: list[int]
  bytes: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class RunInfo:
  """What a report shows besides the metrics; kept in `run.json`.

  Attributes:
    title: Heads the report.
    chunk_size: C.
    lengths: The documents of the corpus.
    accounting: Where all tokens read so far went.
    schedule: The step that is pictured.
    memory: Predicted or measured.
  """

  title: str
  chunk_size: int
  lengths: Lengths
  accounting: Accounting
  schedule: Schedule | None = None
  memory: Memory | None = None


def document_lengths(lengths: np.ndarray, reasons: np.ndarray) -> Lengths:
  """Counts documents in bins of equal ratio, four to a doubling at most.

  Args:
    lengths: Tokens of each document.
    reasons: `accounting.KEPT` or an index into `accounting.EXCLUSIONS`.
  """
  sizes = np.maximum(lengths, 1)
  low, high = math.log2(sizes.min()), math.log2(sizes.max() + 1)
  bins = int(np.clip((high - low) * 4, 1, 48))
  edges = np.exp2(np.linspace(low, max(high, low + 0.1), bins + 1))
  names = {KEPT: "trained", **dict(enumerate(EXCLUSIONS))}
  counts = {
    name: np.histogram(sizes[reasons == reason], edges)[0].tolist()
    for reason, name in names.items()
    if (reasons == reason).any()
  }
  return Lengths(edges.tolist(), counts)


def write_info(workdir: Path, info: RunInfo) -> None:
  """Writes `run.json`, whole or not at all."""
  path = workdir / FILE_NAME
  values = dataclasses.asdict(info)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(values), encoding="utf-8")
  temporary.replace(path)


def read_info(workdir: Path) -> RunInfo:
  """Reads `run.json`.

  Raises:
    FileNotFoundError: The folder has none: no run has finished a step there.
  """
  path = workdir / FILE_NAME
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist; name the --workdir of a run of scripts/train.py"
    )
  values = json.loads(path.read_text(encoding="utf-8"))
  schedule, memory = values["schedule"], values["memory"]
  if schedule is not None:
    # Runs of older versions have no costs, and so no picture.
    schedule = _read_schedule(schedule) if "costs" in schedule else None
  return RunInfo(
    title=values["title"],
    chunk_size=values["chunk_size"],
    lengths=Lengths(**values["lengths"]),
    accounting=Accounting.from_json(values["accounting"]),
    schedule=schedule,
    memory=memory and Memory(**memory),
  )


def _read_schedule(values: dict[str, Any]) -> Schedule:
  return Schedule(
    title=values["title"],
    lanes=[[(op, i) for op, i in lane] for lane in values["lanes"]],
    costs=[[(f, b) for f, b in lane] for lane in values["costs"]],
    shares=values["shares"],
  )


def read_config(workdir: Path) -> dict[str, Any] | None:
  """The values of `config.json`; `None` if there is none that can be read."""
  try:
    values = json.loads((workdir / CONFIG_NAME).read_text(encoding="utf-8"))
  except (FileNotFoundError, json.JSONDecodeError):
    return None
  return values if isinstance(values, dict) else None
