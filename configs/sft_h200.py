"""Fine-tunes a published 8B on long conversations, all parameters, one H200.

Command:  python scripts/train.py --config=configs/sft_h200.py:MODEL,128k
            --workdir=DIR --config.data.source=talk.jsonl
          where MODEL is a folder in the format of Hugging Face, and 32k, 128k
          or 512k the longest conversation; longer ones are left out and
          counted. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.97, and for 512k
          XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=240.
Hardware: One H200 (139.8 GiB; 135.6 without the 3% left to the runtime).
          Compiled for Llama 3.1 8B, at its peak:
            32k   70.8 GiB
            128k  96.8 GiB
            512k  84.0 GiB, and 192.0 GiB of host memory
          A checkpoint is copied to 30.2 GiB of host memory while it is written.
Expected: Not run on hardware yet. The figures are those of
          python scripts/compile.py --config=configs/sft_h200.py:MODEL,128k
            --target=h200
          A sequence beyond the context that the model was made for has the
          positions that `model.rope` gives it.
"""

from pathlib import Path
from typing import Any

from jaxchunk.data.config import DataConfig
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.training.config import (
  CheckpointConfig,
  Config,
  ConfigError,
  TrainConfig,
)

# Up to 128k everything is on the device. At 512k keys and values are on the
# host; in chunks of 8192 arithmetic takes longer than their copies.
_LENGTHS: dict[str, tuple[int, dict[str, Any]]] = {
  "32k": (32_768, {"chunk_size": 2048}),
  "128k": (131_072, {"chunk_size": 2048}),
  "512k": (524_288, {"chunk_size": 8192, "kv_memory": "host"}),
}


def get_config(argument: str = "") -> Config:
  """The configuration for a folder, and a length behind a comma."""
  model, _, length = argument.rpartition(",")
  if length not in _LENGTHS:
    model, length = argument, "32k"
  if not model:
    raise ConfigError(
      "name the model's folder, and one of "
      f"{', '.join(_LENGTHS)}: --config=configs/sft_h200.py:MODEL,128k"
    )
  folder = str(Path(model).expanduser().resolve())
  longest, options = _LENGTHS[length]
  return Config(
    # Two bytes a parameter, and no copy in fp32: rounding at random keeps
    # updates smaller than half a unit.
    model=load_config(folder, dtype="bfloat16", param_dtype="bfloat16"),
    data=DataConfig(
      source="talk.jsonl",
      format="messages",
      tokenizer=folder,
      batch_tokens=max(131_072, longest),
      max_document_tokens=longest,
      heldout_fraction=0.02,
    ),
    train=TrainConfig(
      init_from=folder,
      num_steps=1000,
      optimizer="adamw8bit",
      stochastic_rounding=True,
      implementation="pallas_gpu",
      learning_rate=1e-5,
      weight_decay=0.0,
      warmup_steps=50,
      eval_every=100,
      **options,
    ),
    checkpoint=CheckpointConfig(save_every=200, keep_last=2),
  )
