"""Small random models of `transformers`, and what they answer."""

from typing import Any

import numpy as np
import torch
import transformers

from jaxchunk.models.config import ModelConfig

# The models are too small to gain from more, and tests share the cores.
torch.set_num_threads(1)

_MODELS = {
  "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
  "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
  "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
  "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
  "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
  "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
  "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}


def random_model(family: str, cfg: ModelConfig, **fields: Any) -> Any:
  """A model of the family with the sizes of cfg and random weights.

  What makes the family (its pattern of windows, its norms, its activation,
  its scale of scores) is left to transformers' own defaults.
  """
  make_config, make_model = _MODELS[family]
  config = make_config(
    vocab_size=cfg.vocab_size,
    hidden_size=cfg.d_model,
    intermediate_size=cfg.d_ff,
    num_hidden_layers=cfg.num_layers,
    num_attention_heads=cfg.num_heads,
    num_key_value_heads=cfg.kv_heads,
    head_dim=cfg.head_width,
    rms_norm_eps=cfg.norm_eps,
    attn_implementation="eager",  # the others leave out the soft-cap
    pad_token_id=None,
    **({"tie_word_embeddings": cfg.tie_embeddings} | fields),
  )
  model = make_model(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      noise = torch.randn(p.shape, generator=generator)
      # Trained scales and biases; products of unit size.
      p.copy_(p + 0.3 * noise if p.ndim == 1 else noise * p.shape[1] ** -0.5)
  return model


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
  """What transformers says."""
  with torch.no_grad():
    return model(torch.from_numpy(tokens).long()).logits.numpy()


def weights(model: Any) -> dict[str, np.ndarray]:
  """Parameters by name; a tied one is there once."""
  return {k: v.detach().numpy() for k, v in model.named_parameters()}


def loss_and_gradients(
  model: Any, tokens: np.ndarray, targets: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
  """The mean cross-entropy and its gradients by name."""
  scores = model(torch.from_numpy(tokens).long()).logits
  loss = torch.nn.functional.cross_entropy(
    scores.flatten(0, 1), torch.from_numpy(targets).long().flatten()
  )
  loss.backward()
  grads = {k: v.grad.numpy() for k, v in model.named_parameters()}
  return loss.item(), grads
