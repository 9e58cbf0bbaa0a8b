"""Fine-tunes adapters of a published 8B on long conversations, on 24 GB.

Command:  python scripts/train.py --config=configs/lora_24gb.py:MODEL
            --workdir=DIR --config.data.source=talk.jsonl
          where MODEL is a folder in the format of Hugging Face. Conversations
          of more than 64k tokens are left out and counted. Set
          XLA_PYTHON_CLIENT_MEM_FRACTION=0.97.
Hardware: One GPU of 24 GB (CUDA counts 23.5 GiB; 22.8 without the 3% left to
          the runtime). Compiled for Llama 3.1 8B and an RTX 4090, at its peak:
            64k   19.1 GiB, and 24.0 GiB of host memory
          Longer conversations take more of the host alone: 384 KiB a token.
Expected: Not run on hardware yet. The figures are those of
          python scripts/compile.py --config=configs/lora_24gb.py:MODEL
            --target=rtx4090
"""

from pathlib import Path

from jaxchunk.data.config import DataConfig
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.models.lora import LoRA
from jaxchunk.training.config import (
  CheckpointConfig,
  Config,
  ConfigError,
  TrainConfig,
)


def get_config(model: str = "") -> Config:
  """The configuration for a folder."""
  if not model:
    raise ConfigError(
      "name the model's folder: --config=configs/lora_24gb.py:MODEL"
    )
  folder = str(Path(model).expanduser().resolve())
  return Config(
    model=load_config(
      folder,
      dtype="bfloat16",
      param_dtype="bfloat16",
      lora=LoRA(rank=16, alpha=32.0),
    ),
    data=DataConfig(
      source="talk.jsonl",
      format="messages",
      tokenizer=folder,
      batch_tokens=65_536,
      max_document_tokens=65_536,
      heldout_fraction=0.02,
    ),
    train=TrainConfig(
      init_from=folder,
      num_steps=1000,
      chunk_size=1024,
      # The matrices leave room for a chunk, not for what grows with a sequence.
      kv_memory="host",
      learning_rate=2e-4,
      weight_decay=0.0,
      warmup_steps=50,
      eval_every=100,
    ),
    checkpoint=CheckpointConfig(save_every=200, keep_last=2),
  )
