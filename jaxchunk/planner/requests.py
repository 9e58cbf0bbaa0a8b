"""What a plan is asked for, read from names and files."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from jaxchunk.data.config import DataConfig
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.families import preset
from jaxchunk.models.lora import LINEARS, LoRA
from jaxchunk.planner.candidates import Request
from jaxchunk.planner.devices import machine
from jaxchunk.planner.lengths import read_lengths
from jaxchunk.training.config import (
  Config,
  ConfigError,
  TrainConfig,
  validate,
)


def read_request(
  *,
  model: str,
  lengths: str,
  target: str,
  trainable: str = "full",
  batch_tokens: int = 262_144,
  memory_gib: float | None = None,
  **train: str | None,
) -> Request:
  """A request from words.

  Args:
    model: A preset, a folder with a `config.json` or that file, both in bf16;
      or a configuration file, `configs/x.py` or `configs/x.py:ARGUMENT`, whose
      model and training are taken as they are.
    lengths: See `read_lengths`.
    target: See `devices.machine`.
    trainable: "full", or "lora" for adapters of rank 16 beside all matrices
      that can have some.
    batch_tokens: Of a global batch.
    memory_gib: GiB of a device to use.
    **train: Fields of `TrainConfig`; `None` leaves them as they are.

  Raises:
    ValueError: One cannot be read or found.
  """
  cfg, training = _model(model)
  given: dict[str, Any] = {n: v for n, v in train.items() if v is not None}
  if cfg.param_dtype == "bfloat16" and trainable == "full":
    # Updates are smaller than what such numbers can tell apart.
    given["stochastic_rounding"] = True
  training = dataclasses.replace(training, **given)
  if trainable == "lora" and cfg.lora is None:
    cfg = dataclasses.replace(cfg, lora=lora_of(cfg))
  request = Request(
    model=cfg.frozen(),
    lengths=read_lengths(lengths),
    machine=machine(target),
    train=training,
    batch_tokens=batch_tokens,
    memory_limit=None if memory_gib is None else int(memory_gib * 2**30),
  )
  validate(Config(model=cfg, data=DataConfig(), train=training))
  return request


def lora_of(cfg: ModelConfig) -> LoRA:
  """Adapters beside all matrices that can have some."""
  return LoRA() if cfg.moe is None else LoRA(targets=LINEARS[:4])


def _model(name: str) -> tuple[ModelConfig, TrainConfig]:
  path, _, argument = name.partition(":")
  if path.endswith(".py"):
    config = _config(Path(path), argument)
    return config.model, config.train
  folder = Path(path).expanduser()
  if folder.name == "config.json":
    folder = folder.parent
  if folder.is_dir():
    cfg = load_config(folder, dtype="bfloat16", param_dtype="bfloat16")
  else:
    cfg = preset(name, dtype="bfloat16", param_dtype="bfloat16")
  return cfg, TrainConfig()


def _config(path: Path, argument: str) -> Config:
  """What `get_config` of a file gives."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None or spec.loader is None or not path.is_file():
    raise ConfigError(f"model={path}: there is no such file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(argument) if argument else module.get_config()
  if not isinstance(config, Config):
    raise ConfigError(f"model={path}: get_config() gives no Config")
  return config
