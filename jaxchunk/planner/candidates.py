"""Ways to run a model on a machine: what there is to choose from."""

import dataclasses
import math
from collections.abc import Iterator

from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.layouts import check_heads
from jaxchunk.chunking.memory import STRATEGIES, MemorySpace, Strategy
from jaxchunk.chunking.ops import Keep
from jaxchunk.data.config import DataConfig
from jaxchunk.models.config import ModelConfig
from jaxchunk.planner.devices import Machine
from jaxchunk.planner.lengths import Lengths
from jaxchunk.sharding.mesh import Layout, from_shape
from jaxchunk.sharding.pipeline.tables import Pipeline, Schedule
from jaxchunk.sharding.rules import Rules
from jaxchunk.training import fits
from jaxchunk.training.config import Config, LayoutConfig, TrainConfig

CHUNK_SIZES = (1024, 2048, 4096, 8192, 16384)
LIVE_CHUNKS = (1, 2, 4, 8)
SCHEDULES: tuple[Schedule, ...] = (
  "1f1b",
  "1f1b_aligned",
  "interleaved",
  "zb_h1",
  "zb_v",
  "v_half",
  "v_min",
)
# Of a chunk on each device that shares it: blocks of the kernels.
_LEAST_PART = 128
_MOST_TENSOR = 8
_MOST_STAGES = 16
_OVER_CONTEXT = Rules({"embed": ("fsdp", "context")})
_OVER_STAGES = Rules({"vocab": ("stage", "tensor")})


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be trained, and on what.

  Attributes:
    model: The model; frozen parameters are those without adapters, if it has
      some.
    lengths: Of the sequences to come.
    machine: The devices.
    train: What is not chosen here: the optimizer, where its state is.
    batch_tokens: Of a global batch.
    memory_limit: Bytes of a device to use; `None` is what the runtime leaves.
    host_memory: Bytes of host memory for one device.
    chunk_sizes: C to try.
  """

  model: ModelConfig
  lengths: Lengths
  machine: Machine
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  batch_tokens: int = 262_144
  memory_limit: int | None = None
  host_memory: int = 128 * 2**30
  chunk_sizes: tuple[int, ...] = CHUNK_SIZES

  @property
  def limit(self) -> int:
    """Bytes of a device that may be used."""
    if self.memory_limit is None:
      return fits.limit(self.machine.target)
    return self.memory_limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """One way to run.

  Attributes:
    layout: Of all devices.
    strategy: Which loop is outside.
    chunk_size: C.
    live_chunks: K.
    keep: What live chunks keep.
    kv_memory: Where keys, values and their gradients are.
    schedule: Of the stages, where there are several.
  """

  layout: Layout
  strategy: Strategy
  chunk_size: int
  live_chunks: int = 1
  keep: Keep = "all"
  kv_memory: MemorySpace = "device"
  schedule: Schedule | None = None

  @property
  def groups(self) -> int:
    """Groups of devices with lanes of their own."""
    return self.layout.data * self.layout.fsdp * self.layout.expert

  def __str__(self) -> str:
    parts = [layout_name(self.layout), self.strategy, f"C={self.chunk_size}"]
    if self.strategy == "chunk_outer":
      parts.append(f"K={self.live_chunks}")
    if self.keep != "all":
      parts.append(f"keep={self.keep}")
    if self.kv_memory == "host":
      parts.append("kv on host")
    if self.schedule is not None:
      parts.append(self.schedule)
    return " ".join(parts)


def layout_name(layout: Layout) -> str:
  """A layout in few words, with what shares the parameters."""
  sizes = [f"{name}={size}" for name, size in layout.shape.items() if size > 1]
  if layout.context > 1 and "context" in layout.rules["embed"]:
    sizes.append("fsdp_over_context")
  if layout.gather == "step":
    sizes.append("gather=step")
  if layout.stage > 1 and "stage" in layout.rules["vocab"]:
    sizes.append("vocab_over_stages")
  return ",".join(sizes) or "one device"


def config_of(request: Request, candidate: Candidate) -> Config:
  """The run's configuration, but for where its data is."""
  train = dataclasses.replace(
    request.train,
    chunk_size=candidate.chunk_size,
    live_chunks=candidate.live_chunks,
    strategy=candidate.strategy,
    keep=candidate.keep,
    kv_memory=candidate.kv_memory,
    implementation=request.machine.target.implementation,
  )
  data = DataConfig(
    batch_tokens=request.batch_tokens,
    max_document_tokens=request.lengths.longest,
  )
  layout = layout_config(candidate.layout)
  return Config(model=request.model, data=data, train=train, layout=layout)


def layout_config(layout: Layout) -> LayoutConfig:
  """The part of a configuration that says a layout.

  Raises:
    ValueError: Its stages are not even, which a run cannot say.
  """
  if layout.pipeline.layers is not None:
    raise ValueError(f"pipeline.layers={layout.pipeline.layers}: leave it out")
  return LayoutConfig(
    stage=layout.stage,
    data=layout.data,
    fsdp=layout.fsdp,
    expert=layout.expert,
    context=layout.context,
    tensor=layout.tensor,
    fsdp_over_context="context" in layout.rules["embed"],
    schedule=layout.pipeline.schedule,
    vocab_over_stages="stage" in layout.rules["vocab"],
    gather=layout.gather,
  )


def layouts(request: Request) -> Iterator[Layout]:
  """The layouts of all devices that can split the model."""
  for sizes in _sizes(request.machine.count):
    for rules in (Rules(), _OVER_CONTEXT, _OVER_STAGES):
      needs = {_OVER_CONTEXT: "context", _OVER_STAGES: "stage"}.get(rules)
      if needs is not None and sizes[needs] == 1:
        continue
      if rules is _OVER_CONTEXT and sizes["stage"] > 1:
        continue
      layout = dataclasses.replace(from_shape(sizes), rules=rules)
      if not _splits(layout, request.model):
        continue
      yield layout
      if layout.stage == 1 and layout.splits("embed"):
        yield dataclasses.replace(layout, gather="step")


def _sizes(devices: int) -> Iterator[dict[str, int]]:
  for stage in _divisors(devices):
    if stage > _MOST_STAGES:
      continue
    for tensor in _divisors(devices // stage):
      if tensor > _MOST_TENSOR:
        continue
      rest = devices // (stage * tensor)
      for context in _divisors(rest):
        for fsdp in _divisors(rest // context):
          yield {
            "stage": stage,
            "data": rest // (context * fsdp),
            "fsdp": fsdp,
            "context": context,
            "tensor": tensor,
          }


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def _splits(layout: Layout, cfg: ModelConfig) -> bool:
  """Whether heads, widths and layers can be dealt out evenly."""
  try:
    check_heads(layout, cfg)
  except (ValueError, NotImplementedError):
    return False
  period = len(cfg.window_pattern)
  vocab = math.prod(layout.shape[axis] for axis in layout.rules["vocab"])
  whole = [
    (cfg.vocab_size, vocab),
    (cfg.mlp_width, layout.tensor),
    (cfg.moe.d_ff if cfg.moe else 0, layout.tensor),
    (cfg.num_layers, layout.stage * (period if layout.stage > 1 else 1)),
  ]
  shared = layout.fsdp
  if "context" in layout.rules["embed"]:
    shared *= layout.context
  if cfg.quantization is not None and layout.num_devices > layout.data:
    return False
  return cfg.d_model % shared == 0 and all(n % m == 0 for n, m in whole)


def candidates(request: Request, *, lean: bool = False) -> Iterator[Candidate]:
  """All ways of all layouts.

  Args:
    request: What there is to run.
    lean: Only those among which the one that needs least is.
  """
  longest = request.lengths.longest
  for layout in layouts(request):
    if lean and not _is_lean(layout):
      continue
    for size in request.chunk_sizes:
      if size % layout.context or size // layout.context < _LEAST_PART:
        continue
      if size > request.chunk_sizes[0] and size >= 2 * longest:
        continue
      chunks = capacity_chunks(-(-longest // size))
      for way in _ways(layout, request.model, chunks):
        if not lean or way.live_chunks == 1:
          yield dataclasses.replace(way, chunk_size=size)


def _staged_ways(
  layout: Layout, cfg: ModelConfig, chunks: int
) -> Iterator[Candidate]:
  """By each schedule whose stages all have as many layers."""
  for schedule in SCHEDULES:
    pipeline = Pipeline(schedule=schedule)
    stages = pipeline.placement(layout.stage).stages
    if cfg.num_layers % (stages * len(cfg.window_pattern)):
      continue
    for live in LIVE_CHUNKS:
      if live <= chunks:
        yield Candidate(
          layout=dataclasses.replace(layout, pipeline=pipeline),
          strategy="chunk_outer",
          chunk_size=0,
          live_chunks=live,
          schedule=schedule,
        )


def _is_lean(layout: Layout) -> bool:
  """Whether parameters are split over all devices, a layer at a time."""
  over = layout.context == 1 or "context" in layout.rules["embed"]
  return layout.stage * layout.data == 1 and layout.gather == "layer" and over


def _ways(layout: Layout, cfg: ModelConfig, chunks: int) -> Iterator[Candidate]:
  """Of lanes of so many chunks at most; for a chunk of any size."""
  if layout.stage > 1:
    yield from _staged_ways(layout, cfg, chunks)
    return
  for strategy in STRATEGIES if chunks > 1 else STRATEGIES[:1]:
    if strategy == "layer_outer":
      yield Candidate(layout=layout, strategy=strategy, chunk_size=0)
      continue
    for live in LIVE_CHUNKS:
      if live <= chunks:
        one = Candidate(
          layout=layout, strategy=strategy, chunk_size=0, live_chunks=live
        )
        yield one
        yield dataclasses.replace(one, keep="inputs")
  if layout.num_devices == 1 and chunks > 1:
    yield Candidate(
      layout=layout, strategy="chunk_outer", chunk_size=0, kv_memory="host"
    )
