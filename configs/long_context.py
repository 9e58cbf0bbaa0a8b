"""Stretches a published model to a longer context and trains it there.

Command:  python scripts/train.py --config=configs/long_context.py:MODEL,LENGTH
            --workdir=DIR --config.data.source=documents.jsonl
          where MODEL is a folder in the format of Hugging Face and LENGTH a
          number of tokens, by default four times what the model was made for.
          MODEL,LENGTH,METHOD chooses how the rotary embedding is stretched:
          yarn (the default), linear or theta.
Hardware: Parameters in bf16 and moments of a byte, 8 bytes a parameter with
          the gradient: a model of 8B on one device of 80 GB or more.
Expected: An epoch goes from short documents to long ones, so that the first
          steps settle the embedding at little cost; documents longer than
          LENGTH are left out and counted. The held-out loss of long documents
          falls below that of the model as published
          (scripts/evaluate.py shows it by position).
"""

import re
from pathlib import Path
from typing import Any

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
  parts = re.fullmatch(r"(.*?)(?:,(\d+))?(?:,(yarn|linear|theta))?", model)
  if parts is None or not parts[1]:
    raise ConfigError(
      "name the model's folder and the new context length in tokens: "
      "--config=configs/long_context.py:MODEL,131072"
    )
  folder = str(Path(parts[1]).expanduser().resolve())
  published = load_config(folder, param_dtype="bfloat16")
  length = int(parts[2] or 4 * (published.context_length or 8192))
  try:
    method: Any = parts[3] or "yarn"
    stretched = extend_context(published, length, method=method)
  except ValueError as error:
    raise ConfigError(f"configs/long_context.py:{model}: {error}") from error
  return Config(
    model=stretched,
    data=DataConfig(
      source="documents.jsonl",
      tokenizer=folder,
      batch_tokens=max(4 * length, 262_144),
      max_document_tokens=length,
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
      eval_tokens=4 * length,
    ),
    checkpoint=CheckpointConfig(save_every=100, keep_last=2),
  )
