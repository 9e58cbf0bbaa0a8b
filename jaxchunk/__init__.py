"""jaxchunk: train and serve long-context models in JAX by chunks.

Names are loaded when first used, so `import jaxchunk.kernels.attention` loads
no Flax and `import jaxchunk` loads no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxchunk.chunking.gradient import (
    chunked_value_and_grad as chunked_value_and_grad,
  )
  from jaxchunk.chunking.gradient import lower_chunked as lower_chunked
  from jaxchunk.chunking.plan import ChunkPlan as ChunkPlan
  from jaxchunk.chunking.plan import chunk_plan as chunk_plan
  from jaxchunk.chunking.reference import (
    full_value_and_grad as full_value_and_grad,
  )
  from jaxchunk.chunking.spaco import SpaCO as SpaCO
  from jaxchunk.inference.engine import Engine as Engine
  from jaxchunk.inference.params import SamplingParams as SamplingParams
  from jaxchunk.interop.hugging_face import load_hf as load_hf
  from jaxchunk.interop.hugging_face import save_hf as save_hf
  from jaxchunk.kernels.attention.api import attention as attention
  from jaxchunk.kernels.attention.mask import AttentionMask as AttentionMask
  from jaxchunk.kernels.cross_entropy.api import (
    linear_cross_entropy as linear_cross_entropy,
  )
  from jaxchunk.kernels.linear_attention.api import (
    linear_attention as linear_attention,
  )
  from jaxchunk.models.config import ModelConfig as ModelConfig
  from jaxchunk.models.transformer import Transformer as Transformer

_EXPORTS = {
  "AttentionMask": "jaxchunk.kernels.attention.mask",
  "ChunkPlan": "jaxchunk.chunking.plan",
  "Engine": "jaxchunk.inference.engine",
  "ModelConfig": "jaxchunk.models.config",
  "SamplingParams": "jaxchunk.inference.params",
  "SpaCO": "jaxchunk.chunking.spaco",
  "Transformer": "jaxchunk.models.transformer",
  "attention": "jaxchunk.kernels.attention.api",
  "chunk_plan": "jaxchunk.chunking.plan",
  "chunked_value_and_grad": "jaxchunk.chunking.gradient",
  "full_value_and_grad": "jaxchunk.chunking.reference",
  "linear_attention": "jaxchunk.kernels.linear_attention.api",
  "linear_cross_entropy": "jaxchunk.kernels.cross_entropy.api",
  "load_hf": "jaxchunk.interop.hugging_face",
  "lower_chunked": "jaxchunk.chunking.gradient",
  "save_hf": "jaxchunk.interop.hugging_face",
}

__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  if name not in _EXPORTS:
    raise AttributeError(f"module 'jaxchunk' has no attribute {name!r}")
  return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_EXPORTS])
