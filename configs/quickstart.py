"""A small model on the sources of Python's standard library.

Command:  python scripts/train.py --config=configs/quickstart.py --workdir=DIR
Hardware: 2 CPU cores, 2 GB of memory; no network.
Expected: 2 to 5 minutes, 2.67 held-out bits per byte (a bigram model of bytes
has 3.50).

Documents have up to 24k tokens, a chunk has 512: memory follows the chunk.
"""

from jaxchunk.data.config import DataConfig
from jaxchunk.models.config import ModelConfig
from jaxchunk.training.config import CheckpointConfig, Config, TrainConfig


def get_config() -> Config:
  """The configuration."""
  return Config(
    model=ModelConfig(
      vocab_size=4096,
      d_model=192,
      num_layers=4,
      num_heads=3,
      num_kv_heads=1,
      head_dim=64,
      d_ff=512,
      tie_embeddings=True,
    ),
    data=DataConfig(
      source="stdlib",
      tokenizer="bpe:4096",
      batch_tokens=4096,
      max_document_tokens=24_576,
      heldout_fraction=0.05,
    ),
    train=TrainConfig(
      num_steps=28,
      chunk_size=512,
      live_chunks=16,
      learning_rate=3e-3,
      warmup_steps=10,
      eval_every=14,
      eval_tokens=32_768,
    ),
    checkpoint=CheckpointConfig(save_every=14, keep_last=2),
  )
