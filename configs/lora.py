"""Fine-tunes adapters beside a published model, on conversations.

Command:  python scripts/train.py --config=configs/lora.py:MODEL --workdir=DIR
            --config.data.source=talk.jsonl
          where MODEL is a folder in the format of Hugging Face. MODEL,nf4 or
          MODEL,int8 holds its matrices in four or eight bits (QLoRA).
Hardware: The model as it is published (2 bytes a parameter in bf16, about 0.53
          in nf4, embedding and head apart) and 16 bytes for each of the
          adapters, which are about 1% as many: a model of 8B on one device of
          24 GB, in nf4 on one of 12 GB.
Expected: No gradients are computed for the model's own matrices. Checkpoints
          hold the adapters alone. Export them, or the merged model, with
          scripts/export.py.
"""

import re
from pathlib import Path
from typing import Any

from jaxchunk.data.config import DataConfig
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.models.lora import LoRA
from jaxchunk.models.quantized import Quantization
from jaxchunk.training.config import (
  CheckpointConfig,
  Config,
  ConfigError,
  TrainConfig,
)


def get_config(model: str = "") -> Config:
  """The configuration for a folder, perhaps with how to hold its matrices."""
  parts = re.fullmatch(r"(.*?)(?:,(nf4|int8))?", model)
  if parts is None or not parts[1]:
    raise ConfigError("name the model's folder: --config=configs/lora.py:MODEL")
  folder = str(Path(parts[1]).expanduser().resolve())
  kind: Any = parts[2]
  quantization = Quantization(kind=kind) if kind else None
  return Config(
    model=load_config(
      folder, lora=LoRA(rank=16, alpha=32.0), quantization=quantization
    ),
    data=DataConfig(
      source="talk.jsonl",
      format="messages",
      tokenizer=folder,
      batch_tokens=32_768,
      heldout_fraction=0.02,
    ),
    train=TrainConfig(
      init_from=folder,
      num_steps=1000,
      chunk_size=2048,
      learning_rate=2e-4,
      weight_decay=0.0,
      warmup_steps=50,
      eval_every=100,
    ),
    checkpoint=CheckpointConfig(save_every=200, keep_last=2),
  )
