"""The longest context that fits on one device, compiled without having it.

  python benchmarks/longest_context.py [--only=REGEX] [--cache=FILE]
      [--picture=FILE.png] [--record]

One H200, one v5p and one H100 of 80 GB; models of 1B, 8B and 32B in bf16; full
training (adamw8bit, stochastic rounding), the same with the moments on the
host, and LoRA of rank 16; by chunk size and by where what grows with the
sequence is. By the compiler's own account (`jaxchunk.training.fits`), with the
Pallas kernels. All that lies on the device has to fit, while a lane runs and
during the update, into what a reserve of 3% leaves.

Memory is linear in a lane's capacity, so it is compiled at a short one and at
the longest power of two of chunks that fits, which is what runs; the exact
limit is on the line through both. With keys and values on the host, that of a
stated size is what limits. Needs the extra `aot`; a program takes a minute.
"""

import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import matplotlib.figure
from absl import app, flags
from common import record, report, rounded

from jaxchunk import targets
from jaxchunk.chunking.memory import state_bytes_per_token
from jaxchunk.data.config import DataConfig
from jaxchunk.models.families import preset
from jaxchunk.models.lora import LoRA
from jaxchunk.training import fits
from jaxchunk.training.config import Config, TrainConfig

_ONLY = flags.DEFINE_string("only", "", "Rows whose name this is found in.")
_CACHE = flags.DEFINE_string(
  "cache", None, "A JSON file of what was compiled before; it is added to."
)
_HOST = flags.DEFINE_integer(
  "host_gib", 128, "Host memory for one device.", lower_bound=1
)
_PICTURE = flags.DEFINE_string("picture", None, "Where to draw, if anywhere.")
_RECORD = flags.DEFINE_bool("record", False, "Write benchmarks/results/.")

_GIB = 2**30
_TARGETS = ("h200", "v5p", "h100")
_MODELS = {"8B": "llama3.1-8b", "1B": "llama3.2-1b", "32B": "qwen3-32b"}
_FULL = {"optimizer": "adamw8bit", "stochastic_rounding": True}
_TRAININGS: dict[str, dict[str, Any]] = {
  "full": _FULL,
  "full, moments on host": {**_FULL, "optimizer_memory": "host"},
  "lora": {},
}
_WAYS: dict[str, dict[str, Any]] = {
  "layer_outer": {"strategy": "layer_outer"},
  "chunk_outer": {"strategy": "chunk_outer"},
  "kv on host": {"strategy": "chunk_outer", "kv_memory": "host"},
}
_CHUNKS = (2048, 8192)
# Where lines begin, in chunks.
_SHORT = 8
# Published figures, by their authors, on hardware of other sizes.
_PUBLISHED = (
  {
    "row": "StreamBP, 8B, full SFT, one GPU of 80 GB",
    "tokens": 72_000,
    "source": "arXiv 2506.03077",
  },
  {
    "row": "ALST, Llama 8B, full SFT, one H100 of 80 GB, weights on host",
    "tokens": 500_000,
    "source": "arXiv 2506.13996",
  },
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table."""

  target: str
  model: str
  training: str
  chunk: int
  way: str

  def __str__(self) -> str:
    parts = (self.target, self.model, self.training, self.chunk, self.way)
    return "/".join(map(str, parts))

  @property
  def config(self) -> Config:
    """Of a run that the row is about."""
    lora = LoRA(rank=16) if self.training == "lora" else None
    return Config(
      model=preset(
        _MODELS[self.model], dtype="bfloat16", param_dtype="bfloat16", lora=lora
      ),
      data=DataConfig(),
      train=TrainConfig(
        chunk_size=self.chunk,
        implementation=targets.target(self.target).implementation,
        **_TRAININGS[self.training],
        **_WAYS[self.way],
      ),
    )


class Compiler:
  """Compiles what is not in the cache."""

  def __init__(self, path: str | None):
    self.path = pathlib.Path(path) if path else None
    self.known: dict[str, Any] = {}
    if self.path and self.path.exists():
      self.known = json.loads(self.path.read_text())

  def lane(self, row: Row, capacity: int) -> fits.Need:
    """Of a lane; the program is the same wherever the moments are."""
    config = row.config
    own, _ = fits.optimizer_bytes(config)
    config.train.optimizer_memory = "device"
    other, _ = fits.optimizer_bytes(config)
    training = row.training.partition(",")[0]
    same = dataclasses.replace(row, training=training)
    need = self._need(
      f"{same}/{capacity}", fits.lane_need, config, row.target, capacity
    )
    return dataclasses.replace(need, device=need.device - other + own)

  def update(self, row: Row) -> fits.Need:
    """Of the update, which knows no chunks."""
    name = f"{row.target}/{row.model}/{row.training}/update"
    return self._need(name, fits.update_need, row.config, row.target)

  def _need(self, name: str, function: Any, config: Any, *rest: Any) -> Any:
    key = f"jax {jax.__version__}: {name}"
    if key not in self.known:
      began = time.perf_counter()
      target, *numbers = rest
      need = function(config, targets.target(target), *numbers)
      seconds = time.perf_counter() - began
      said = need.refused or f"{need.device / _GIB:.2f} GiB"
      say(f"  {name}: {said} in {seconds:.0f} s")
      self.known[key] = dataclasses.asdict(need)
      if self.path:
        self.path.write_text(json.dumps(self.known, indent=1) + "\n")
    return fits.Need(**self.known[key])


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def below(tokens: float, chunk: int) -> int:
  """The longest power of two of chunks within so many tokens; 0 if none."""
  chunks = int(tokens) // chunk
  return chunk << (chunks.bit_length() - 1) if chunks else 0


def measure(row: Row, compiler: Compiler) -> dict[str, Any]:
  """The longest context of a row, and the figures behind it."""
  config, target = row.config, targets.target(row.target)
  limit = fits.limit(target)
  kept = fits.kept_bytes(config)
  own, moved = fits.optimizer_bytes(config)
  state = kept["parameters"] + kept["gradients"] + own
  line: dict[str, Any] = {"row": str(row), "state_gib": state / _GIB}
  if state > limit:
    return line | {"why_not": "the state alone does not fit"}
  update = compiler.update(row)
  line["update_gib"] = update.device / _GIB
  if update.refused or update.device > limit:
    return line | {"why_not": "the update does not fit"}
  grow = state_bytes_per_token(config.model, config.train.strategy)
  if config.train.kv_memory == "host":
    room = (_HOST.value * _GIB - moved) / grow
    line["host_bytes_per_token"] = grow
  else:
    short = compiler.lane(row, _SHORT * row.chunk)
    room = _SHORT * row.chunk + (limit - short.device) / grow
  return line | longest(row, compiler, limit, room)


def longest(
  row: Row, compiler: Compiler, limit: int, room: float
) -> dict[str, Any]:
  """Compiles at two capacities, the second the longest that fits.

  Args:
    row: Of the table.
    compiler: With its cache.
    limit: Bytes on the device.
    room: How many tokens there should be, by the formula.
  """
  short = _SHORT * row.chunk
  at_short = compiler.lane(row, short)
  if at_short.refused or at_short.device > limit:
    why = f"a lane of {short:,} tokens needs {at_short.device / _GIB:.1f} GiB"
    return {"why_not": why}
  top = max(below(room, row.chunk), 2 * short)
  at_top = compiler.lane(row, top)
  while top > 2 * short and (at_top.refused or at_top.device > limit):
    top //= 2
    at_top = compiler.lane(row, top)
  slope = (at_top.device - at_short.device) / (top - short)
  exact = short + (limit - at_short.device) / max(slope, 1e-9)
  found = {
    "bytes_per_token": slope,
    "device_gib": at_top.device / _GIB,
    "host_gib": at_top.host / _GIB,
    "compiled_tokens": top,
  }
  if row.config.train.kv_memory == "host":
    # Of both memories the one that is full first.
    room = min(room, exact)
    return found | {"tokens": int(room), "in_powers": below(room, row.chunk)}
  powers = top if at_top.device <= limit else short
  while powers == top and below(exact, row.chunk) > top:
    top *= 2
    more = compiler.lane(row, top)
    if more.refused is None and more.device <= limit:
      powers, found["compiled_tokens"] = top, top
      found["device_gib"] = more.device / _GIB
  return found | {"tokens": int(exact), "in_powers": powers}


def rows() -> Iterator[Row]:
  for target in _TARGETS:
    for model in _MODELS:
      for chunk in _CHUNKS:
        for training in _TRAININGS:
          for way in _WAYS:
            row = Row(target, model, training, chunk, way)
            if re.search(_ONLY.value, str(row)):
              yield row


def table(lines: list[dict[str, Any]]) -> str:
  """For people; `why_not` in place of figures that there are not."""
  head = (
    f"{'target/model/training/chunk/way':48} {'tokens':>9} {'2^n chunks':>10} "
    f"{'state':>6} {'update':>6} {'device':>6} {'host':>6} {'KB/token':>8}"
  )
  out = [head]
  for line in lines:
    if "tokens" not in line:
      out.append(
        f"{line['row']:48} {line['why_not']} (state {line['state_gib']:.1f})"
      )
      continue
    if "source" in line:
      out.append(f"{line['row']} ({line['source']}): {line['tokens']:,}")
      continue
    numbers = " ".join(
      f"{line[name]:6.1f}"
      for name in ("state_gib", "update_gib", "device_gib", "host_gib")
    )
    out.append(
      f"{line['row']:48} {line['tokens']:9,} {line['in_powers']:10,} {numbers} "
      f"{line['bytes_per_token'] / 1024:8.1f}"
    )
  return "\n".join(out)


def draw(path: str, lines: list[dict[str, Any]]) -> None:
  shown = [line for line in lines if line.get("tokens")]
  figure = matplotlib.figure.Figure(
    figsize=(9, 1 + 0.22 * len(shown)), layout="constrained"
  )
  axes = figure.subplots()
  names = [line["row"] for line in shown]
  colors = ["0.6" if "source" in line else "C0" for line in shown]
  axes.barh(names, [line["tokens"] for line in shown], color=colors)
  inner = [line.get("in_powers", 0) for line in shown]
  axes.barh(names, inner, color="C1", height=0.4)
  axes.set(
    xscale="log",
    xlabel="tokens (thin bar: in powers of two of chunks; grey: published)",
    title="Longest context on one device, compiled",
  )
  axes.invert_yaxis()
  axes.grid(alpha=0.3, axis="x")
  figure.savefig(path, dpi=150)


def main(_: list[str]) -> None:
  compiler, lines = Compiler(_CACHE.value), []
  for row in rows():
    say(str(row))
    lines.append(measure(row, compiler))
  lines += _PUBLISHED
  say(table(lines))
  figures = {
    "reserve": fits.RESERVE,
    "host_gib": _HOST.value,
    "limit_gib": {
      name: fits.limit(targets.target(name)) / _GIB for name in _TARGETS
    },
    "rows": {line.pop("row"): line for line in map(dict, lines)},
  }
  figures = rounded(figures)
  if _PICTURE.value:
    draw(_PICTURE.value, lines)
  if _RECORD.value:
    packages = ("jax", "libtpu", "jax-cuda13-pjrt")
    record("longest_context", figures, None, packages)
  report("longest_context", **figures)


if __name__ == "__main__":
  app.run(main)
