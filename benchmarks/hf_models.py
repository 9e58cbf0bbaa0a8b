"""Small random models of `transformers`, one for each family and feature.

Sequences of `LENGTH` tokens go beyond every edge: windows are shorter, and so
is the length of the first training where the rotary embedding is scaled.
"""

from typing import Any

import torch
import transformers

LENGTH, WINDOW, ORIGINAL, VOCAB = 96, 16, 40, 97

_SIZES = {
  "vocab_size": VOCAB,
  "hidden_size": 48,
  "intermediate_size": 80,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": LENGTH,
  "attn_implementation": "eager",  # the others leave out the soft-cap
  "bos_token_id": 1,
  "eos_token_id": None,  # generation goes on to its end
  "pad_token_id": None,
}


def _rope(kind: str, theta: float = 1e4, **fields: Any) -> dict[str, Any]:
  params = {"rope_type": kind, "rope_theta": theta, **fields}
  return {"rope_parameters": params}


_LONGROPE = _rope(
  "longrope",
  short_factor=[1.0, 1.5, 2.0],
  long_factor=[1.0, 3.0, 9.0],
  original_max_position_embeddings=ORIGINAL,
  partial_rotary_factor=0.5,
) | {"original_max_position_embeddings": ORIGINAL}

# Name: the model's class without "ForCausalLM", that of its configuration
# without "Config", and what differs from `_SIZES`.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
  "llama2": ("Llama", "Llama", {"num_key_value_heads": 4}),
  "llama3": ("Llama", "Llama", _rope("default", 5e5)),
  "llama3.1": (
    "Llama",
    "Llama",
    _rope(
      "llama3",
      5e5,
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=ORIGINAL,
    )
    | {"tie_word_embeddings": True},
  ),
  "smollm": (
    "Llama",
    "Llama",
    _rope("default", 1e5)
    | {
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "tie_word_embeddings": True,
    },
  ),
  "linear": ("Llama", "Llama", _rope("linear", factor=4.0)),
  "dynamic": (
    "Llama",
    "Llama",
    _rope("dynamic", factor=2.0) | {"max_position_embeddings": ORIGINAL},
  ),
  "yarn": (
    "Llama",
    "Llama",
    _rope(
      "yarn",
      factor=4.0,
      beta_fast=4.0,
      original_max_position_embeddings=ORIGINAL,
    )
    | {"max_position_embeddings": 4 * ORIGINAL},
  ),
  "mistral": ("Mistral", "Mistral", {"sliding_window": WINDOW}),
  "mistral nemo": (
    "Mistral",
    "Mistral",
    {"sliding_window": None, "head_dim": 32},
  ),
  "qwen2": (
    "Qwen2",
    "Qwen2",
    _rope("default", 1e6) | {"tie_word_embeddings": True},
  ),
  "qwen2 windows": (
    "Qwen2",
    "Qwen2",
    {
      "use_sliding_window": True,
      "sliding_window": WINDOW,
      "max_window_layers": 1,
    },
  ),
  "qwen3": ("Qwen3", "Qwen3", _rope("default", 1e6) | {"head_dim": 32}),
  "mixtral": (
    "Mixtral",
    "Mixtral",
    {"sliding_window": WINDOW, "num_local_experts": 5},
  ),
  "qwen3 moe": (
    "Qwen3Moe",
    "Qwen3Moe",
    _rope("default", 1e6)
    | {
      "head_dim": 32,
      "num_experts": 6,
      "num_experts_per_tok": 3,
      "moe_intermediate_size": 24,
      "norm_topk_prob": True,
    },
  ),
  "phi3": ("Phi3", "Phi3", {"sliding_window": WINDOW}),
  "phi3 longrope": ("Phi3", "Phi3", _LONGROPE),
  "phi4": (
    "Phi3",
    "Phi3",
    _rope("default", 2.5e5, partial_rotary_factor=0.5)
    | {"tie_word_embeddings": True},
  ),
  "olmo2": ("Olmo2", "Olmo2", _rope("default", 5e5)),
  "gemma": ("Gemma", "Gemma", {"num_key_value_heads": 1, "head_dim": 32}),
  # Scores and logits are around 1: caps of 2 and 1.5 bend them.
  "gemma2": (
    "Gemma2",
    "Gemma2",
    {
      "head_dim": 32,
      "sliding_window": WINDOW,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 1.5,
      "query_pre_attn_scalar": 24,
    },
  ),
  "gemma3": (
    "Gemma3",
    "Gemma3Text",
    {
      "num_hidden_layers": 7,
      "head_dim": 32,
      "sliding_window": WINDOW,
      "query_pre_attn_scalar": 32,
      "rope_parameters": {
        "full_attention": _rope("linear", 1e6, factor=8.0)["rope_parameters"],
        "sliding_attention": _rope("default")["rope_parameters"],
      },
    },
  ),
}


def random_model(name: str, seed: int) -> Any:
  """The model of a case, its weights drawn anew."""
  model_class, config_class, fields = CASES[name]
  config = getattr(transformers, f"{config_class}Config")(**_SIZES | fields)
  model = getattr(transformers, f"{model_class}ForCausalLM")(config).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for p in model.parameters():
      noise = torch.randn(p.shape, generator=generator)
      # Trained scales and biases; products of unit size.
      p.copy_(p + 0.3 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
  return model
