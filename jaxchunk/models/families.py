"""The published model families, as configurations.

A function per family sets what makes the family and takes every other field
of `ModelConfig` by keyword, so `gemma2(d_model=64, num_layers=4, ...)` is a
small Gemma 2. `PRESETS` holds the published sizes.

Sources: the `config.json` of each checkpoint on the Hugging Face hub.
"""

import dataclasses
import difflib
import types
from collections.abc import Callable, Mapping
from typing import Any

from jaxchunk.models.config import ModelConfig
from jaxchunk.models.moe import MoE
from jaxchunk.models.rope import LinearScaling, Llama3Scaling, Rope


def llama2(**fields: Any) -> ModelConfig:
  """Llama 2 (and 1): SwiGLU, RMSNorm, rotary embeddings.

  Args:
    **fields: Of `ModelConfig`; replace what the family sets.

  Returns:
    The configuration.
  """
  family: dict[str, Any] = {"vocab_size": 32_000, "norm_eps": 1e-5}
  return ModelConfig(**(family | fields))


def llama3(**fields: Any) -> ModelConfig:
  """Llama 3; from 3.1 on with a scaled `rope`, small ones tied.

  Args:
    **fields: Of `ModelConfig`; replace what the family sets.

  Returns:
    The configuration.
  """
  family: dict[str, Any] = {
    "vocab_size": 128_256,
    "norm_eps": 1e-5,
    "rope": Rope(theta=500_000.0),
  }
  return ModelConfig(**(family | fields))


def qwen2(**fields: Any) -> ModelConfig:
  """Qwen 2 and 2.5: biases on q, k and v; small ones tied.

  Beyond 32k tokens Qwen 2.5 is used with
  `YarnScaling(factor=4.0, original_length=32_768)`.

  Args:
    **fields: Of `ModelConfig`; replace what the family sets.

  Returns:
    The configuration.
  """
  family: dict[str, Any] = {
    "vocab_size": 151_936,
    "qkv_bias": True,
    "rope": Rope(theta=1_000_000.0),
  }
  return ModelConfig(**(family | fields))


def qwen3(**fields: Any) -> ModelConfig:
  """Qwen 3, dense: norms on q and k in place of biases.

  Args:
    **fields: Of `ModelConfig`; replace what the family sets.

  Returns:
    The configuration.
  """
  family: dict[str, Any] = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "qk_norm": True,
    "rope": Rope(theta=1_000_000.0),
  }
  return ModelConfig(**(family | fields))


def mistral(*, window: int | None = None, **fields: Any) -> ModelConfig:
  """Mistral: Llama's block; version 0.1 with a window on every layer.

  Args:
    window: Attention window; `None` is full attention.
    **fields: Of `ModelConfig`; replace what the family sets.

  Returns:
    The configuration.
  """
  family: dict[str, Any] = {
    "vocab_size": 32_000,
    "norm_eps": 1e-5,
    "window_pattern": (window,),
    "rope": Rope(theta=1_000_000.0),
  }
  return ModelConfig(**(family | fields))


def mixtral(*, window: int | None = None, **fields: Any) -> ModelConfig:
  """Mixtral: Mistral's block with experts, two for each token.

  Args:
    window: Attention window; `None` is full attention.
    **fields: Of `ModelConfig`; replace what the family sets. By default eight
      experts as wide as `d_ff`.

  Returns:
    The configuration.
  """
  experts = MoE(num_experts=8, experts_per_token=2, d_ff=fields["d_ff"])
  family: dict[str, Any] = {
    "vocab_size": 32_000,
    "norm_eps": 1e-5,
    "window_pattern": (window,),
    "rope": Rope(theta=1_000_000.0),
    "moe": experts,
  }
  return ModelConfig(**(family | fields))


def qwen3_moe(*, expert_d_ff: int = 768, **fields: Any) -> ModelConfig:
  """Qwen 3 with experts, eight of 128 for each token.

  Args:
    expert_d_ff: The width inside an expert.
    **fields: Of `ModelConfig`; replace what the family sets.

  Returns:
    The configuration.
  """
  experts = MoE(num_experts=128, experts_per_token=8, d_ff=expert_d_ff)
  return qwen3(**({"moe": experts} | fields))


def phi3(*, window: int | None = None, **fields: Any) -> ModelConfig:
  """Phi 3 and 4: Llama's block, q, k, v and gate, up published as one matrix.

  Args:
    window: Attention window of every layer; `None` is full attention.
    **fields: Of `ModelConfig`; replace what the family sets. Those for long
      contexts have a `LongRopeScaling`; Phi 4 mini has
      `rope=Rope(fraction=0.75, ...)` and is tied.

  Returns:
    The configuration.
  """
  family: dict[str, Any] = {
    "vocab_size": 32_064,
    "norm_eps": 1e-5,
    "window_pattern": (window,),
  }
  return ModelConfig(**(family | fields))


def smollm(**fields: Any) -> ModelConfig:
  """SmolLM 1 and 2: a small Llama, tied.

  Args:
    **fields: Of `ModelConfig`; replace what the family sets.

  Returns:
    The configuration.
  """
  family: dict[str, Any] = {
    "vocab_size": 49_152,
    "norm_eps": 1e-5,
    "rope": Rope(theta=100_000.0),
    "tie_embeddings": True,
  }
  return ModelConfig(**(family | fields))


def olmo2(**fields: Any) -> ModelConfig:
  """OLMo 2: norms on outputs alone, and on all heads of q, and of k, at once.

  Args:
    **fields: Of `ModelConfig`; replace what the family sets.

  Returns:
    The configuration.
  """
  family: dict[str, Any] = {
    "vocab_size": 100_352,
    "rope": Rope(theta=500_000.0),
    "qk_norm": True,
    "qk_norm_over": "all",
    "pre_norms": False,
    "post_norms": True,
  }
  return ModelConfig(**(family | fields))


def gemma(**fields: Any) -> ModelConfig:
  """Gemma 1: GeGLU, scaled and tied embeddings, norms by 1 + scale.

  Args:
    **fields: Of `ModelConfig`; replace what the family sets.

  Returns:
    The configuration.
  """
  return ModelConfig(**(_gemma_fields() | fields))


def gemma2(*, window: int = 4096, **fields: Any) -> ModelConfig:
  """Gemma 2: every other layer a window, soft-caps, norms on both sides.

  Args:
    window: Attention window of the even layers.
    **fields: Of `ModelConfig`; replace what the family sets. Give
      `attention_scale` where it is not `head_dim ** -0.5`.

  Returns:
    The configuration.
  """
  family = _gemma_fields() | {
    "window_pattern": (window, None),
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
    "post_norms": True,
  }
  return ModelConfig(**(_shortened(family, fields) | fields))


def gemma3(*, window: int = 1024, **fields: Any) -> ModelConfig:
  """Gemma 3, text: five window layers, then a full one; norms on q and k.

  Args:
    window: Attention window of the window layers.
    **fields: Of `ModelConfig`; replace what the family sets. Sizes from 4B
      have `rope=Rope(theta=1e6, scaling=LinearScaling(factor=8.0))`.

  Returns:
    The configuration.
  """
  family = _gemma_fields() | {
    "vocab_size": 262_144,
    "window_pattern": (*(window,) * 5, None),
    "rope": Rope(theta=1_000_000.0),
    "local_rope": Rope(theta=10_000.0),
    "qk_norm": True,
    "post_norms": True,
  }
  return ModelConfig(**(_shortened(family, fields) | fields))


def _gemma_fields() -> dict[str, Any]:
  return {
    "vocab_size": 256_000,
    "head_dim": 256,
    "activation": "gelu_tanh",
    "tie_embeddings": True,
    "unit_offset_norm": True,
    "scale_embeddings": True,
  }


def _shortened(
  family: dict[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
  """The family with no more of its pattern than there are layers."""
  pattern = family["window_pattern"][: fields.get("num_layers")]
  return family | {"window_pattern": pattern}


def preset(name: str, **fields: Any) -> ModelConfig:
  """A published configuration that may still be changed.

  Args:
    name: Of `PRESETS`, such as "llama3-8b".
    **fields: Of `ModelConfig`; replace the published ones.

  Returns:
    A configuration of the caller's own, not yet frozen.

  Raises:
    ValueError: There is no such preset; names the nearest.
  """
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.0)
    raise ValueError(f"there is no preset {name!r}; the nearest are {near}")
  return dataclasses.replace(PRESETS[name], **fields)


def _size(
  family: Callable[..., ModelConfig],
  d_model: int,
  num_layers: int,
  num_heads: int,
  num_kv_heads: int,
  d_ff: int,
  **fields: Any,
) -> ModelConfig:
  """A frozen member of a family."""
  return family(
    d_model=d_model,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    d_ff=d_ff,
    **fields,
  ).frozen()


_LLAMA31 = Rope(theta=500_000.0, scaling=Llama3Scaling(factor=8.0))
_LLAMA32 = Rope(theta=500_000.0, scaling=Llama3Scaling(factor=32.0))
_MISTRAL1 = Rope(theta=10_000.0)
_GEMMA3 = Rope(theta=1_000_000.0, scaling=LinearScaling(factor=8.0))

# Columns: d_model, num_layers, num_heads, num_kv_heads, d_ff. Qwen 2.5 are the
# base checkpoints: their instruct versions from 14B on have norm_eps=1e-6.
PRESETS: Mapping[str, ModelConfig] = types.MappingProxyType(
  {
    "llama2-7b": _size(llama2, 4096, 32, 32, 32, 11008),
    "llama2-13b": _size(llama2, 5120, 40, 40, 40, 13824),
    "llama2-70b": _size(llama2, 8192, 80, 64, 8, 28672),
    "llama3-8b": _size(llama3, 4096, 32, 32, 8, 14336),
    "llama3-70b": _size(llama3, 8192, 80, 64, 8, 28672),
    "llama3.1-8b": _size(llama3, 4096, 32, 32, 8, 14336, rope=_LLAMA31),
    "llama3.1-70b": _size(llama3, 8192, 80, 64, 8, 28672, rope=_LLAMA31),
    "llama3.1-405b": _size(llama3, 16384, 126, 128, 8, 53248, rope=_LLAMA31),
    "llama3.2-1b": _size(
      llama3, 2048, 16, 32, 8, 8192, rope=_LLAMA32, tie_embeddings=True
    ),
    "llama3.2-3b": _size(
      llama3, 3072, 28, 24, 8, 8192, rope=_LLAMA32, tie_embeddings=True
    ),
    "llama3.3-70b": _size(llama3, 8192, 80, 64, 8, 28672, rope=_LLAMA31),
    "qwen2-0.5b": _size(qwen2, 896, 24, 14, 2, 4864, tie_embeddings=True),
    "qwen2-1.5b": _size(qwen2, 1536, 28, 12, 2, 8960, tie_embeddings=True),
    "qwen2-7b": _size(qwen2, 3584, 28, 28, 4, 18944, vocab_size=152_064),
    "qwen2.5-0.5b": _size(qwen2, 896, 24, 14, 2, 4864, tie_embeddings=True),
    "qwen2.5-1.5b": _size(qwen2, 1536, 28, 12, 2, 8960, tie_embeddings=True),
    "qwen2.5-3b": _size(qwen2, 2048, 36, 16, 2, 11008, tie_embeddings=True),
    "qwen2.5-7b": _size(qwen2, 3584, 28, 28, 4, 18944, vocab_size=152_064),
    "qwen2.5-14b": _size(
      qwen2, 5120, 48, 40, 8, 13824, vocab_size=152_064, norm_eps=1e-5
    ),
    "qwen2.5-32b": _size(
      qwen2, 5120, 64, 40, 8, 27648, vocab_size=152_064, norm_eps=1e-5
    ),
    "qwen2.5-72b": _size(
      qwen2, 8192, 80, 64, 8, 29568, vocab_size=152_064, norm_eps=1e-5
    ),
    "qwen3-0.6b": _size(qwen3, 1024, 28, 16, 8, 3072, tie_embeddings=True),
    "qwen3-1.7b": _size(qwen3, 2048, 28, 16, 8, 6144, tie_embeddings=True),
    "qwen3-4b": _size(qwen3, 2560, 36, 32, 8, 9728, tie_embeddings=True),
    "qwen3-8b": _size(qwen3, 4096, 36, 32, 8, 12288),
    "qwen3-14b": _size(qwen3, 5120, 40, 40, 8, 17408),
    "qwen3-32b": _size(qwen3, 5120, 64, 64, 8, 25600),
    "qwen3-30b-a3b": _size(qwen3_moe, 2048, 48, 32, 4, 6144),
    "qwen3-235b-a22b": _size(
      qwen3_moe, 4096, 94, 64, 4, 12288, expert_d_ff=1536
    ),
    "mistral-7b-v0.1": _size(
      mistral, 4096, 32, 32, 8, 14336, window=4096, rope=_MISTRAL1
    ),
    "mistral-7b-v0.2": _size(mistral, 4096, 32, 32, 8, 14336),
    "mistral-7b-v0.3": _size(
      mistral, 4096, 32, 32, 8, 14336, vocab_size=32_768
    ),
    "mistral-nemo-12b": _size(
      mistral, 5120, 40, 32, 8, 14336, vocab_size=131_072, head_dim=128
    ),
    "mixtral-8x7b": _size(mixtral, 4096, 32, 32, 8, 14336),
    "mixtral-8x22b": _size(mixtral, 6144, 56, 48, 8, 16384),
    "phi3-mini-4k": _size(phi3, 3072, 32, 32, 32, 8192, window=2047),
    "phi4-14b": _size(
      phi3,
      5120,
      40,
      40,
      10,
      17920,
      vocab_size=100_352,
      rope=Rope(theta=250_000.0),
    ),
    "smollm2-135m": _size(smollm, 576, 30, 9, 3, 1536),
    "smollm2-360m": _size(smollm, 960, 32, 15, 5, 2560),
    "smollm2-1.7b": _size(
      smollm, 2048, 24, 32, 32, 8192, rope=Rope(theta=130_000.0)
    ),
    "olmo2-1b": _size(olmo2, 2048, 16, 16, 16, 8192),
    "olmo2-7b": _size(olmo2, 4096, 32, 32, 32, 11008),
    "olmo2-13b": _size(olmo2, 5120, 40, 40, 40, 13824),
    "olmo2-32b": _size(olmo2, 5120, 64, 40, 8, 27648),
    "gemma-2b": _size(gemma, 2048, 18, 8, 1, 16384),
    "gemma-7b": _size(gemma, 3072, 28, 16, 16, 24576),
    "gemma2-2b": _size(gemma2, 2304, 26, 8, 4, 9216),
    "gemma2-9b": _size(gemma2, 3584, 42, 16, 8, 14336),
    "gemma2-27b": _size(
      gemma2, 4608, 46, 32, 16, 36864, head_dim=128, attention_scale=144**-0.5
    ),
    "gemma3-270m": _size(gemma3, 640, 18, 4, 1, 2048, window=512),
    "gemma3-1b": _size(gemma3, 1152, 26, 4, 1, 6912, window=512),
    "gemma3-4b": _size(
      gemma3, 2560, 34, 8, 4, 10240, vocab_size=262_208, rope=_GEMMA3
    ),
    "gemma3-12b": _size(
      gemma3, 3840, 48, 16, 8, 15360, vocab_size=262_208, rope=_GEMMA3
    ),
    "gemma3-27b": _size(
      gemma3,
      5376,
      62,
      32,
      16,
      21504,
      vocab_size=262_208,
      head_dim=128,
      attention_scale=168**-0.5,
      rope=_GEMMA3,
    ),
  }
)
