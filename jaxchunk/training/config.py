"""A run's configuration: typed, checked before anything is built.

A file in `configs/` defines `get_config() -> Config`; any field can be set on
the command line, `--config.train.learning_rate=3e-4`.
"""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from jaxchunk.chunking.layouts import (
  check_experts,
  check_heads,
  check_pipeline,
)
from jaxchunk.chunking.memory import MemorySpace, Strategy
from jaxchunk.chunking.ops import Keep
from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.data import config as data_config
from jaxchunk.data.config import DataConfig
from jaxchunk.kernels.attention.backends import Backend
from jaxchunk.models.config import ModelConfig
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.tables import Pipeline, Schedule
from jaxchunk.sharding.rules import AXES, Rules

OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "muon"]
ScheduleName = Literal["cosine", "wsd"]

# What may change while the parameters keep their meaning.
_FREE_MODEL_FIELDS = ("model.context_length", "model.dropout", "model.dtype")


class ConfigError(ValueError):
  """A configuration cannot be used; names the field and the remedy."""


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
  """How to train.

  Attributes:
    init_from: A folder in the format of Hugging Face whose weights a new run
      begins with; `jaxchunk.interop.load_config` makes its `model`. `None`
      draws them. Of a model with adapters (`model.lora`) only these are
      trained and saved, and the folder is read again at every start.
    num_steps: Updates to make; the data may end earlier
      (`data.num_epochs`).
    seed: Of the initial parameters and of dropout.
    chunk_size: C, tokens in a chunk.
    live_chunks: K, chunks whose activations are kept between the forward and
      the backward pass; the others are computed again.
    strategy: Order of the work inside a sequence; `None` lets the library
      choose.
    keep: What live chunks keep of each layer: "all" that the backward pass
      reads, or "inputs", from which the rest is computed again.
    spaco_rate: Share of the chunks, drawn at random, that run backward
      (`jaxchunk.SpaCO`); `None` runs all and is exact.
    kv_memory: "host" keeps keys, values and their gradients in host memory
      and brings them to the device a chunk at a time (chunk-outer only).
    implementation: Of attention: "xla" (what `None` means), which runs
      everywhere, or the kernels "pallas_tpu" or "pallas_gpu" (Hopper).
    optimizer_memory: "host" keeps the optimizer's state of matrices and
      embeddings in host memory and brings it to the device a layer at a time
      (not Adafactor's).
    stochastic_rounding: Round parameters in bf16 up or down at random, so
      that small updates count. `model.param_dtype="bfloat16"` then saves the
      copy in fp32.
    optimizer: `"adamw"`, `"adamw8bit"` (its moments take a byte a number),
      `"adafactor"` or `"muon"` (matrices by Muon, the
      rest by AdamW).
    learning_rate: The peak.
    schedule: `"cosine"`, or `"wsd"`: warm-up, stable, decay.
    warmup_steps: Steps of linear warm-up.
    decay_steps: Steps of the final decay of `"wsd"`.
    final_learning_rate: Where the schedule ends, as a share of the peak.
    weight_decay: Times the learning rate, on matrices alone.
    clip_norm: Largest global norm of a gradient; `None` does not clip.
    beta1: Decay of Adam's first moment, and of Muon's for what Adam updates.
    beta2: Decay of Adam's second moment.
    epsilon: Adam's.
    muon_beta: Decay of Muon's momentum.
    max_skipped_steps: Stop with an error after so many steps in a row whose
      loss or gradient is not finite.
    eval_every: Steps between evaluations on held-out documents; 0 is never.
    eval_tokens: Most held-out tokens to evaluate on.
    log_documents: Write the ids of each step's documents to
      `documents.jsonl`.
  """

  init_from: str | None = None
  num_steps: int = 1000
  seed: int = 0
  chunk_size: int = 2048
  live_chunks: int = 1
  strategy: Strategy | None = None
  keep: Keep = "all"
  spaco_rate: float | None = None
  kv_memory: MemorySpace = "device"
  implementation: Backend | None = None
  optimizer_memory: MemorySpace = "device"
  stochastic_rounding: bool = False
  optimizer: OptimizerName = "adamw"
  learning_rate: float = 1e-3
  schedule: ScheduleName = "cosine"
  warmup_steps: int = 100
  decay_steps: int = 200
  final_learning_rate: float = 0.1
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  muon_beta: float = 0.95
  max_skipped_steps: int = 10
  eval_every: int = 100
  eval_tokens: int = 100_000
  log_documents: bool = False


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig:
  """When to save and what to keep.

  Attributes:
    save_every: Steps between checkpoints. The end of a run and a signal to
      stop save too.
    keep_last: How many of the newest to keep.
    keep_every: Keep those at multiples of this for ever; `None` keeps none.
  """

  save_every: int = 100
  keep_last: int = 2
  keep_every: int | None = None


@dataclasses.dataclass(kw_only=True)
class LayoutConfig:
  """Which devices do what; see `jaxchunk.sharding.mesh.Layout`.

  Attributes:
    stage: Pipeline stages: each has a part of the layers.
    data: Groups of devices with lanes of their own and all parameters.
    fsdp: Groups with lanes of their own that share the parameters.
    expert: Groups with lanes of their own that share the experts.
    context: Devices of a group, which share each sequence; divides
      `train.chunk_size`.
    tensor: Devices that share heads, the MLP and the vocabulary.
    fsdp_over_context: Whether the devices that share a sequence also share the
      parameters, as those of fsdp do.
    gather: Where shared parameters are gathered: "layer" by layer, or all once
      a "step".
    slices: TPU slices, or hosts of GPUs, joined by a slower network.
    slices_over: The axis that spans them.
    schedule: How stages take turns, a name of
      `jaxchunk.sharding.pipeline.tables.BUILDERS`.
    vocab_over_stages: Whether embedding and head are over all stages, rather
      than on the first and the last.
  """

  stage: int = 1
  data: int = 1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1
  fsdp_over_context: bool = False
  gather: Literal["layer", "step"] = "layer"
  slices: int = 1
  slices_over: Literal["stage", "data", "fsdp"] = "data"
  schedule: Schedule = "1f1b"
  vocab_over_stages: bool = False

  def layout(self) -> Layout | None:
    """The layout; `None` for one device.

    Raises:
      ValueError: A size is impossible.
    """
    sizes = dataclasses.asdict(self)
    rules = {}
    if sizes.pop("fsdp_over_context"):
      rules["embed"] = ("fsdp", "context")
    if sizes.pop("vocab_over_stages"):
      rules["vocab"] = ("stage", "tensor")
    pipeline = Pipeline(schedule=sizes.pop("schedule"))
    layout = Layout(**sizes, rules=Rules(rules), pipeline=pipeline)
    return None if layout.num_devices == 1 else layout


@dataclasses.dataclass(kw_only=True)
class ProcessesConfig:
  """How long the processes of a run wait for each other, in seconds.

  Attributes:
    startup_timeout: For one that has not come, or not compiled its programs
      when others have.
    silence_timeout: For a sign of life.
    stall_timeout: For one that lives and stays behind the others by a step.
  """

  startup_timeout: float = 300.0
  silence_timeout: float = 30.0
  stall_timeout: float = 50.0


@dataclasses.dataclass(kw_only=True)
class Config:
  """All that a run depends on."""

  model: ModelConfig
  data: DataConfig
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )
  layout: LayoutConfig = dataclasses.field(default_factory=LayoutConfig)
  processes: ProcessesConfig = dataclasses.field(
    default_factory=ProcessesConfig
  )


def validate(config: Config) -> None:
  """Checks every field that can be checked without reading anything.

  Raises:
    ConfigError: A field is impossible; names it, its value and the remedy.
  """
  if not isinstance(config, Config):
    raise ConfigError(
      f"get_config() returned {type(config).__name__}; it must return a "
      "jaxchunk.training.config.Config"
    )
  try:
    config.model.validate()
  except ValueError as error:
    raise ConfigError(f"model.{error}") from error
  if config.model.quantization is not None and config.model.lora is None:
    raise ConfigError(
      "model.quantization is set and model.lora is not: quantized matrices "
      "cannot be trained; set model.lora=LoRA() too, or neither"
    )
  try:
    data_config.validate(config.data)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  _check_types("train", config.train)
  _check_types("checkpoint", config.checkpoint)
  _check_types("layout", config.layout)
  _check_types("processes", config.processes)
  _validate_train(config.train)
  _validate_layout(config)
  validate_processes(config.processes)
  for name in ("save_every", "keep_last", "keep_every"):
    value = getattr(config.checkpoint, name)
    if value is not None:
      _check(f"checkpoint.{name}", value, value >= 1, "at least 1")


def _validate_layout(config: Config) -> None:
  for name in (*AXES, "slices"):
    value = getattr(config.layout, name)
    _check(f"layout.{name}", value, value >= 1, "at least 1")
  try:
    layout = config.layout.layout()
  except ValueError as error:
    raise ConfigError(str(error)) from error
  if layout is None:
    return
  try:
    check_heads(layout, config.model)
    check_experts(layout, config.model)
    check_pipeline(layout, config.model, config.train.strategy)
  except (ValueError, NotImplementedError) as error:
    raise ConfigError(str(error)) from error
  size, devices = config.train.chunk_size, config.layout.context
  if size % devices:
    raise ConfigError(
      f"train.chunk_size={size} cannot be dealt out to "
      f"layout.context={devices} devices; take {-(-size // devices) * devices}"
    )
  for name, plain in (("spaco_rate", None), ("kv_memory", "device")):
    if (value := getattr(config.train, name)) != plain:
      raise ConfigError(
        f"train.{name}={value!r} runs on one device so far; leave it at "
        f"{plain!r}, or every size of the layout at 1"
      )


def validate_processes(processes: ProcessesConfig) -> None:
  """Checks what is needed before the processes meet.

  Raises:
    ConfigError: A time is impossible.
  """
  for name in ("startup_timeout", "silence_timeout", "stall_timeout"):
    value = getattr(processes, name)
    _check(f"processes.{name}", value, 1 <= value < math.inf, "at least 1")
  silence, stall = processes.silence_timeout, processes.stall_timeout
  if stall < silence:
    raise ConfigError(
      f"processes.stall_timeout={stall:g} is less than "
      f"processes.silence_timeout={silence:g}: who waits for a dead process "
      "would be taken for one that hangs; raise it"
    )


def _check_types(section: str, values: Any) -> None:
  for name, hint in typing.get_type_hints(type(values)).items():
    value = getattr(values, name)
    names = [n for option in options_of(hint) for n in typing.get_args(option)]
    kinds = tuple(o for o in options_of(hint) if isinstance(o, type))
    kinds += (int,) if float in kinds else ()
    # A bool is an int, and is not meant as one.
    fits = isinstance(value, kinds) and (type(value) is bool) == (bool in kinds)
    rule = " or ".join([*map(repr, names), *(kind.__name__ for kind in kinds)])
    _check(f"{section}.{name}", value, fits or value in names, rule)


def _validate_train(train: TrainConfig) -> None:
  least = {
    "num_steps": 1,
    "chunk_size": 1,
    "live_chunks": 0,
    "warmup_steps": 0,
    "max_skipped_steps": 1,
    "eval_every": 0,
    "eval_tokens": 1,
    "seed": 0,
  }
  for name, bound in least.items():
    value = getattr(train, name)
    _check(f"train.{name}", value, value >= bound, f"at least {bound}")
  _validate_spaco(train)
  if train.kv_memory == "host" and train.strategy == "layer_outer":
    raise ConfigError(
      "train.kv_memory='host' does not go with train.strategy='layer_outer'; "
      "set the strategy to 'chunk_outer' or None"
    )
  if train.kv_memory == "host" and train.spaco_rate is not None:
    raise ConfigError(
      "train.kv_memory='host' does not go with "
      f"train.spaco_rate={train.spaco_rate}; unset one of them"
    )
  if train.optimizer_memory == "host" and train.optimizer == "adafactor":
    raise ConfigError(
      "train.optimizer_memory='host' does not go with "
      "train.optimizer='adafactor', which scales an update by all layers "
      "together and keeps little; set it to 'device'"
    )
  for name in ("learning_rate", "epsilon", "clip_norm"):
    value = getattr(train, name)
    if name != "clip_norm" or value is not None:
      fits = 0 < value < math.inf
      _check(f"train.{name}", value, fits, "positive and finite")
  for name in ("beta1", "beta2", "muon_beta"):
    value = getattr(train, name)
    _check(f"train.{name}", value, 0 <= value < 1, "in [0, 1)")
  share = train.final_learning_rate
  _check("train.final_learning_rate", share, 0 <= share <= 1, "in [0, 1]")
  decay = train.weight_decay
  _check("train.weight_decay", decay, 0 <= decay < math.inf, "at least 0")
  ramps = train.warmup_steps
  if train.schedule == "wsd":
    _check(
      "train.decay_steps", train.decay_steps, train.decay_steps >= 1, ">= 1"
    )
    ramps += train.decay_steps
  if ramps > train.num_steps:
    raise ConfigError(
      f"train.warmup_steps and decay_steps need {ramps} steps, more than "
      f"train.num_steps={train.num_steps}; shorten them"
    )


def _validate_spaco(train: TrainConfig) -> None:
  rate = train.spaco_rate
  if rate is None:
    return
  _check("train.spaco_rate", rate, 0 < rate <= 1, "in (0, 1], or None")
  if train.strategy == "layer_outer":
    raise ConfigError(
      f"train.spaco_rate={rate} with train.strategy='layer_outer': chunks can "
      "be left out only where the loop over chunks is outside; leave "
      "train.strategy at None"
    )
  if train.live_chunks > 1:
    raise ConfigError(
      f"train.spaco_rate={rate} with train.live_chunks={train.live_chunks}: "
      "no chunk stays alive there; set train.live_chunks to 0 or 1"
    )


def strategy_of(config: Config) -> Strategy | SpaCO | None:
  """The strategy as the executor takes it."""
  train = config.train
  if train.spaco_rate is not None:
    return SpaCO(train.spaco_rate)
  if config.layout.stage > 1:
    return "chunk_outer"
  return train.strategy


def _check(field: str, value: Any, fits: bool, rule: str) -> None:
  if not fits:
    raise ConfigError(f"{field}={value!r} must be {rule}")


def to_json(config: Any) -> dict[str, Any]:
  """A dataclass as plain JSON values; nested ones name their class."""

  def encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
      fields = {
        field.name: encode(getattr(value, field.name))
        for field in dataclasses.fields(value)
      }
      return {"class": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
      return [encode(item) for item in value]
    return value

  return encode(config)


def from_json(kind: Any, values: Any) -> Any:
  """The inverse of `to_json` for a value declared as `kind`.

  Raises:
    ConfigError: A field is unknown: the values come from another version.
  """
  choices = {option.__name__: option for option in dataclasses_of(kind)}
  if isinstance(values, Mapping) and values.get("class") in choices:
    cls = choices[values["class"]]
    hints = typing.get_type_hints(cls)
    given = {name: value for name, value in values.items() if name != "class"}
    if unknown := sorted(set(given) - set(hints)):
      raise ConfigError(
        f"the stored {cls.__name__} has unknown fields {unknown}: it was "
        "written by another version of jaxchunk"
      )
    return cls(**{n: from_json(hints[n], v) for n, v in given.items()})
  return tuple(values) if isinstance(values, list) else values


def options_of(kind: Any) -> tuple[Any, ...]:
  """The members of a union, or the type itself."""
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return typing.get_args(kind)
  return (kind,)


def dataclasses_of(kind: Any) -> list[type]:
  """The dataclasses among the members of a union, or the one type itself."""
  options = options_of(kind)
  return [
    o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)
  ]


def flat(config: Config) -> dict[str, Any]:
  """Every field by its path, as `train.seed`, in JSON values."""
  return dict(_flatten(to_json(config)))


def fingerprint(config: Config) -> str:
  """A short hash of every field."""
  text = json.dumps(to_json(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Difference:
  """A field that two configurations do not share."""

  field: str
  stored: Any
  present: Any

  def __str__(self) -> str:
    return f"{self.field} (stored {self.stored!r}, now {self.present!r})"

  @property
  def breaks_model(self) -> bool:
    """Whether stored parameters lose their meaning."""
    in_model = self.field.startswith("model.")
    return in_model and self.field not in _FREE_MODEL_FIELDS


def differences(stored: Mapping[str, Any], present: Config) -> list[Difference]:
  """The fields in which a stored configuration and the present one differ."""
  old = dict(_flatten(_normal(stored)))
  new = dict(_flatten(_normal(to_json(present))))
  return [
    Difference(field, old.get(field), new.get(field))
    for field in sorted(set(old) | set(new))
    if old.get(field) != new.get(field)
  ]


def _normal(values: Mapping[str, Any]) -> Mapping[str, Any]:
  """Fills in the model's defaults, so that `None` equals what it means."""
  model = from_json(ModelConfig, values["model"])
  return {**values, "model": to_json(model.frozen())}


def _flatten(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(values, Mapping):
    for name, value in values.items():
      yield from _flatten(value, f"{path}.{name}" if path else name)
  else:
    yield path, values
