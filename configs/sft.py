"""Fine-tunes a published model on conversations, all parameters.

Command:  python scripts/train.py --config=configs/sft.py:MODEL --workdir=DIR
            --config.data.source=talk.jsonl
          where MODEL is a folder in the format of Hugging Face.
Hardware: Parameters, gradients and AdamW's moments take 16 bytes a parameter:
          a model of 1B on one device of 24 GB, one of 4B on one of 80 GB.
          Memory besides follows the chunk and, by keys and values, the longest
          conversation.
Expected: Conversations of any length, none cut. Export the result with
          scripts/export.py.
"""

from pathlib import Path

from jaxchunk.data.config import DataConfig
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.training.config import (
  CheckpointConfig,
  Config,
  ConfigError,
  TrainConfig,
)


def get_config(model: str = "") -> Config:
  """The configuration for a folder."""
  if not model:
    raise ConfigError("name the model's folder: --config=configs/sft.py:MODEL")
  folder = str(Path(model).expanduser().resolve())
  return Config(
    # Parameters in fp32, so that small updates are not rounded away.
    model=load_config(folder, param_dtype="float32"),
    data=DataConfig(
      source="talk.jsonl",
      format="messages",
      tokenizer=folder,
      batch_tokens=65_536,
      heldout_fraction=0.02,
    ),
    train=TrainConfig(
      init_from=folder,
      num_steps=1000,
      chunk_size=2048,
      learning_rate=1e-5,
      weight_decay=0.0,
      warmup_steps=50,
      eval_every=100,
    ),
    checkpoint=CheckpointConfig(save_every=200, keep_last=2),
  )
