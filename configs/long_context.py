"""Stretches a published model to a longer context and trains it there.

Command:  python scripts/train.py --config=configs/long_context.py:MODEL,LENGTH
            --workdir=DIR --config.data.source=documents.jsonl
          where MODEL is a folder in the format of Hugging Face and LENGTH a
          number of tokens. MODEL,LENGTH,METHOD chooses how the rotary
          embedding is stretched: yarn (the default), linear or theta.
Hardware: Parameters in bf16 and moments of a byte, 8 bytes a parameter with
          the gradient: a model of 8B on one device of 80 GB or more.
Expected: An epoch goes from short documents to long ones, so that the first
          steps settle the embedding at little cost; documents longer than
          LENGTH are left out and counted. The held-out loss of long documents
          falls below that of the model as published
          (scripts/evaluate.py shows it by position).
"""

from pathlib import Path

from jaxchunk.data.config import DataConfig
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.models.context import extend_context
from jaxchunk.training.config import (
  CheckpointConfig,
  Config,
  ConfigError,
  TrainConfig,
)


def get_config(model: str = "") -> Config:
  """The configuration for a folder and a length."""
  path, _, rest = model.partition(",")
  length, _, method = rest.partition(",")
  if not path or not length.isdecimal():
    raise ConfigError(
      "name the model's folder and the new context length in tokens: "
      "--config=configs/long_context.py:MODEL,131072"
    )
  folder = str(Path(path).expanduser().resolve())
  published = load_config(folder, param_dtype="bfloat16")
  try:
    stretched = extend_context(published, int(length), method=method or "yarn")
  except ValueError as error:
    raise ConfigError(f"configs/long_context.py:{model}: {error}") from error
  return Config(
    model=stretched,
    data=DataConfig(
      source="documents.jsonl",
      tokenizer=folder,
      batch_tokens=max(4 * int(length), 262_144),
      max_document_tokens=int(length),
      length_stages=(published.context_length or 8192,),
      heldout_fraction=0.02,
    ),
    train=TrainConfig(
      init_from=folder,
      num_steps=500,
      chunk_size=8192,
      optimizer="adamw8bit",
      stochastic_rounding=True,
      learning_rate=1e-5,
      warmup_steps=20,
      eval_every=50,
      eval_tokens=4 * int(length),
    ),
    checkpoint=CheckpointConfig(save_every=100, keep_last=2),
  )
