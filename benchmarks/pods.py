"""Training steps compiled for pods that are not there: memory, traffic, time.

  python benchmarks/pods.py [--only=REGEX] [--cache=FILE] [--record]

A model of 8B at 128k, 512k and 1M tokens and one of 70B at 128k and 512k, in
bf16 with fp32 gradients and adamw8bit, on v5e:16x16, v5p:4x4x4, v6e:8x8 and
eight H200. Every group of devices of a layout runs one lane of that length; all
parameters, gradients and moments are split over all devices.

Of each cell a few layouts are weighed by formula, and the one that takes least
time of those that should fit is compiled: peak memory is the compiler's own
account of the lane's program, plus the optimizer's state beside it. FLOPs are
the formula's (`chunking.cost`), bytes sent are counted in the program
(`sharding.traffic`). Time is what products at the peak rate and bytes at the
speed of one link's two directions would take, the longer of the two: a bound,
not a forecast. A cell that does not fit says by how much and what would fit.
Needs the extra `aot`; a cell takes one to three minutes.
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
from absl import app, flags
from common import record, report, rounded
from flax import nnx

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.chunking.cost import plan_cost
from jaxchunk.chunking.executor import make_options
from jaxchunk.chunking.memory import (
  STRATEGIES,
  Strategy,
  chunk_bytes,
  state_bytes_per_token,
)
from jaxchunk.chunking.plan import chunk_plan
from jaxchunk.chunking.traces import trace_over
from jaxchunk.models.families import preset
from jaxchunk.planner.devices import machine
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.rules import Rules
from jaxchunk.sharding.traffic import traffic
from jaxchunk.training import fits
from jaxchunk.training.peak import peak_of

_ONLY = flags.DEFINE_string("only", "", "Cells whose name this is found in.")
_CACHE = flags.DEFINE_string(
  "cache", None, "A JSON file of what was compiled before; it is added to."
)
_RECORD = flags.DEFINE_bool("record", False, "Write benchmarks/results/.")

_GIB = 2**30
_MODELS = {"8B": "llama3.1-8b", "70B": "llama3.1-70b"}
_LENGTHS = {"8B": (131072, 524288, 1048576), "70B": (131072, 524288)}
_PODS = ("v5e:16x16", "v5p:4x4x4", "v6e:8x8", "h200:8")
# Of memory: what the formulas below may be wrong by.
_MARGIN = 0.85
_WEIGHED = 6
# Parameters are split over what shares a sequence, too.
_RULES = Rules({"embed": ("fsdp", "context")})
# bf16 parameters, fp32 gradients, two moments of 8 bits.
_STATE_BYTES = 2 + 4 + 2.1


@dataclasses.dataclass(frozen=True)
class Cell:
  """One line of the table."""

  pod: str
  model: str
  tokens: int

  def __str__(self) -> str:
    return f"{self.pod}/{self.model}/{self.tokens // 1024}k"

  @property
  def target(self) -> targets.Target:
    """The pod."""
    return targets.target(self.pod)

  @property
  def devices(self) -> tuple[jax.Device, ...]:
    """All of the pod's."""
    return self.target.devices


@dataclasses.dataclass(frozen=True)
class Way:
  """How a cell may run."""

  layout: Layout
  strategy: Strategy
  chunk: int

  def __str__(self) -> str:
    return f"{self.layout} {self.strategy} C={self.chunk}"


def config_of(model: str) -> jc.ModelConfig:
  """The cell's model, in bf16."""
  name = _MODELS[model]
  return preset(name, dtype="bfloat16", param_dtype="bfloat16").frozen()


def abstract(cfg: jc.ModelConfig) -> jc.Transformer:
  return nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))


def count(cfg: jc.ModelConfig) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(abstract(cfg)))


def ways(devices: int, cfg: jc.ModelConfig, tokens: int) -> Iterator[Way]:
  """Layouts to weigh: parameters split over all devices."""
  for tensor in (1, 2, 4, 8):
    context = 1
    while context * tensor <= devices and cfg.kv_heads % tensor == 0:
      chunk = min(max(2048, 256 * context), 8192, tokens)
      layout = Layout(
        fsdp=devices // (context * tensor),
        context=context,
        tensor=tensor,
        rules=_RULES,
      )
      width = layout.fsdp * context
      if chunk // context >= 128 and cfg.d_model % width == 0:
        for strategy in STRATEGIES:
          yield Way(layout, strategy, chunk)
      context *= 2


def expected_bytes(way: Way, cfg: jc.ModelConfig, tokens: int) -> float:
  """Memory of a device, by formula; what is compiled decides."""
  layout, tensor = way.layout, way.layout.tensor
  head = cfg.vocab_size * cfg.d_model
  layer = (count(cfg) - 2 * head) / cfg.num_layers
  own = count(cfg) * _STATE_BYTES / layout.num_devices
  # bf16, an fp32 gradient, and its copy where it is scattered.
  gathered = max(layer, head) * (2 + 4 + 4) / tensor
  grow = state_bytes_per_token(cfg, way.strategy)
  shared = layout.context * tensor
  if way.strategy == "layer_outer":
    # The layers' inputs are the same on all devices of "tensor".
    inputs = (cfg.num_layers + 1) * cfg.d_model * 2
    lane = tokens / layout.context * (inputs + (grow - inputs) / tensor)
    working = chunk_bytes(cfg, way.chunk) / cfg.num_layers / shared
  else:
    lane = tokens * grow / shared
    working = chunk_bytes(cfg, way.chunk) / shared
  return own + gathered + lane + working


def flops(way: Way, cfg: jc.ModelConfig, tokens: int) -> float:
  """Of a device for its part of a lane."""
  plan = chunk_plan([tokens], way.chunk)
  cost = plan_cost(cfg, plan, live_chunks=1, strategy=way.strategy)
  return cost.lanes[0] / (way.layout.context * way.layout.tensor)


def traced(way: Way, cell: Cell) -> jax.stages.Traced:
  model = abstract(config_of(cell.model))
  options = make_options(
    model,
    chunk_size=way.chunk,
    strategy=way.strategy,
    implementation=cell.target.implementation,
  )
  mesh = way.layout.mesh(cell.devices)
  with targets.tracing_for(cell.devices[0]):
    return trace_over(way.layout, model, cell.tokens, options, mesh=mesh)


def sent(way: Way, cell: Cell, program: jax.stages.Traced) -> dict[str, float]:
  """Bytes that a device sends, by the axes of the mesh."""
  trips = cell.tokens // way.chunk
  found: dict[str, float] = {}
  for one in traffic(program, way.layout.shape, trips=trips):
    axes = "+".join(one.axes)
    found[axes] = found.get(axes, 0) + one.total
  return found


def figures(way: Way, cell: Cell) -> dict[str, Any]:
  """What is known before compiling."""
  cfg, program = config_of(cell.model), traced(way, cell)
  moved = sent(way, cell, program)
  work = flops(way, cfg, cell.tokens)
  lanes = way.layout.num_devices // (way.layout.context * way.layout.tensor)
  compute = work / peak_of(cell.devices[0], "bfloat16").flops
  copies = sum(moved.values()) / machine(cell.pod).links.ring
  return {
    "way": str(way),
    "flops": work,
    "sent_bytes": moved,
    "compute_seconds": compute,
    "copy_seconds": copies,
    "seconds": max(compute, copies),
    "tokens_per_second": lanes * cell.tokens / max(compute, copies),
  }


def measure(cell: Cell) -> dict[str, Any]:
  """Compiles the fastest way that should fit, and others if it does not."""
  cfg, limit = config_of(cell.model), fits.limit(cell.target)
  known = list(ways(machine(cell.pod).count, cfg, cell.tokens))
  fit = [
    way
    for way in known
    if expected_bytes(way, cfg, cell.tokens) < _MARGIN * limit
  ]
  # What fits at all, however little is sent.
  least = min(known, key=lambda way: expected_bytes(way, cfg, cell.tokens))
  # Those that share lanes among few devices send least; a trace takes seconds.
  fit.sort(key=lambda way: way.layout.context * way.layout.tensor)
  weighed = [(figures(way, cell), way) for way in fit[:_WEIGHED] or [least]]
  weighed.sort(key=lambda pair: -pair[0]["tokens_per_second"])
  line: dict[str, Any] = {}
  for found, way in weighed[:3]:
    line = {"cell": str(cell), **found, **compiled(way, cell)}
    say(f"  {way}: {line['gib']:.2f} of {limit / _GIB:.2f} GiB")
    if line["gib"] * _GIB <= limit:
      return line
  return line | {"over_gib": line["gib"] - limit / _GIB} | would_fit(cell)


def would_fit(cell: Cell) -> dict[str, Any]:
  """The least power of two times the devices whose formula fits."""
  cfg, limit = config_of(cell.model), fits.limit(cell.target)
  devices = machine(cell.pod).count
  for factor in (2, 4, 8, 16):
    for way in ways(factor * devices, cfg, cell.tokens):
      if expected_bytes(way, cfg, cell.tokens) < _MARGIN * limit:
        return {"would_fit": f"{factor * devices} devices: {way}"}
  return {"would_fit": "no power of two up to 16 times the devices"}


def compiled(way: Way, cell: Cell) -> dict[str, Any]:
  """The compiler's account of a lane's program, and what lies beside it."""
  path = pathlib.Path(_CACHE.value) if _CACHE.value else None
  known = json.loads(path.read_text()) if path and path.exists() else {}
  key = f"jax {jax.__version__}: {cell}: {way}"
  if key not in known:
    began = time.perf_counter()
    known[key] = _compile(way, cell)
    say(f"  {way}: compiled in {time.perf_counter() - began:.0f} s")
    if path:
      path.write_text(json.dumps(known, indent=1) + "\n")
  cfg = config_of(cell.model)
  beside = count(cfg) * (_STATE_BYTES - 6) / way.layout.num_devices
  return {**known[key], "gib": (known[key]["program"] + beside) / _GIB}


def _compile(way: Way, cell: Cell) -> dict[str, Any]:
  program = traced(way, cell)
  try:
    memory: Any = program.lower().compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    text = str(error).partition("\n")[0]
    found = re.search(r"(?:Used |temporaries \()([\d.]+)G", text)
    if found is None:
      raise
    return {"program": float(found[1]) * _GIB, "refused": text}
  return {
    "program": memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  }


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def table(lines: list[dict[str, Any]]) -> str:
  head = (
    f"{'cell':20} {'GiB':>7} {'PFLOPs':>8} {'sent GB':>8} {'compute s':>9} "
    f"{'copies s':>8} {'tokens/s':>9}  way"
  )
  out = [head]
  for line in lines:
    out.append(
      f"{line['cell']:20} {line['gib']:7.2f} {line['flops'] / 1e15:8.1f} "
      f"{sum(line['sent_bytes'].values()) / 1e9:8.1f} "
      f"{line['compute_seconds']:9.1f} {line['copy_seconds']:8.1f} "
      f"{line['tokens_per_second']:9,.0f}  {line['way']}"
    )
    if "over_gib" in line:
      out.append(
        f"{'':20} does NOT fit, by {line['over_gib']:.2f} GiB; "
        f"{line['would_fit']}"
      )
  return "\n".join(out)


def main(_: list[str]) -> None:
  cells = [
    Cell(pod, model, tokens)
    for pod in _PODS
    for model, lengths in _LENGTHS.items()
    for tokens in lengths
  ]
  lines = []
  for cell in cells:
    if re.search(_ONLY.value, str(cell)):
      say(str(cell))
      lines.append(measure(cell))
  say(table(lines))
  found = rounded({line.pop("cell"): line for line in map(dict, lines)})
  if _RECORD.value:
    packages = ("jax", "libtpu", "jax-cuda13-pjrt")
    record("pods", {"cells": found}, None, packages)
  report("pods", cells=found)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  app.run(main)
