"""Every document of the standard library, the longest 189k tokens.

Command:  python scripts/train.py --config=configs/stdlib_all.py --workdir=DIR
Hardware: one GPU of 16 GB or more.
Expected: not measured yet.

No document is cut or left out; those longer than a batch are a step each.
"""

from jaxchunk.data.config import DataConfig
from jaxchunk.models.config import ModelConfig
from jaxchunk.training.config import CheckpointConfig, Config, TrainConfig


def get_config() -> Config:
  """The configuration."""
  return Config(
    model=ModelConfig(
      vocab_size=8192,
      d_model=768,
      num_layers=12,
      num_heads=12,
      num_kv_heads=4,
      head_dim=64,
      d_ff=2048,
      tie_embeddings=True,
      dtype="bfloat16",
    ),
    data=DataConfig(
      source="stdlib",
      tokenizer="bpe:8192",
      batch_tokens=131_072,
      num_epochs=20,
    ),
    train=TrainConfig(
      num_steps=600,
      chunk_size=4096,
      optimizer="muon",
      learning_rate=2e-3,
      schedule="wsd",
      warmup_steps=50,
      decay_steps=120,
      eval_every=50,
      eval_tokens=200_000,
    ),
    checkpoint=CheckpointConfig(save_every=100, keep_last=2, keep_every=200),
  )
