"""What transformers saves computes the same here, and the other way round."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxchunk as jc
from jaxchunk.inference.generate import generate
from jaxchunk.interop.hugging_face import from_hugging_face

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(jc.__file__).parents[1] / "benchmarks"))

import hf_models

# Of the range of the logits: fp32 rounding over the layers.
_TOLERANCE = 2e-5


def _tokens(seed, *shape):
  return np.random.default_rng(seed).integers(0, hf_models.VOCAB, shape)


def _logits(model, tokens):
  with torch.no_grad():
    return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
  """The models are too small to gain from more, and tests share the cores."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


@pytest.mark.parametrize("name", hf_models.CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
  theirs = hf_models.random_model(name, seed=0)
  theirs.save_pretrained(tmp_path / "theirs")
  length = hf_models.LENGTH
  ours = jc.load_hf(tmp_path / "theirs", context_length=length)
  tokens = _tokens(0, 2, length)
  want = _logits(theirs, tokens)
  got = np.asarray(jax.jit(lambda model: model(tokens.astype(np.int32)))(ours))
  assert np.abs(got - want).max() <= _TOLERANCE * np.ptp(want)
  jc.save_hf(ours, tmp_path / "ours")
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  ).eval()
  # Where a tensor lies in memory decides how torch adds up.
  gap = np.abs(_logits(again, tokens) - want).max()
  assert gap <= _TOLERANCE * np.ptp(want)


@pytest.mark.parametrize("name", ["gemma2", "phi3 longrope", "mixtral"])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
  theirs = hf_models.random_model(name, seed=1)
  theirs.save_pretrained(tmp_path)
  prompt = _tokens(1, 70)
  with torch.no_grad():
    want = theirs.generate(
      torch.from_numpy(prompt[None]).long(), max_new_tokens=50, do_sample=False
    )[0, 70:]
  ours = jc.load_hf(tmp_path)
  got = list(generate(ours, prompt, max_new_tokens=50, chunk_size=32))
  assert got == want.tolist()


def test_shorter_sequences_have_the_short_factors(tmp_path):
  theirs = hf_models.random_model("phi3 longrope", seed=2)
  theirs.save_pretrained(tmp_path)
  length = hf_models.ORIGINAL
  ours = jc.load_hf(tmp_path, context_length=length)
  tokens = _tokens(2, 2, length)
  want = _logits(theirs, tokens)
  got = np.asarray(ours(tokens.astype(np.int32)))
  assert np.abs(got - want).max() <= _TOLERANCE * np.ptp(want)


def test_gradients_are_those_of_transformers(tmp_path):
  # Of the families the one with the most to go wrong.
  theirs = hf_models.random_model("gemma2", seed=3)
  theirs.save_pretrained(tmp_path)
  ours = jc.load_hf(tmp_path)
  shape = (2, hf_models.LENGTH)
  tokens, targets = _tokens(3, *shape), _tokens(4, *shape)
  scores = theirs(torch.from_numpy(tokens).long()).logits
  want_loss = torch.nn.functional.cross_entropy(
    scores.flatten(0, 1), torch.from_numpy(targets).long().flatten()
  )
  want_loss.backward()
  grads = {n: p.grad.numpy() for n, p in theirs.named_parameters()}

  @jax.jit
  @jax.value_and_grad
  def loss_and_gradients(model):
    scores = jax.nn.log_softmax(model(tokens.astype(np.int32)))
    picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)
    return -jnp.mean(picked)

  loss, got = loss_and_gradients(ours)
  np.testing.assert_allclose(loss, want_loss.item(), rtol=1e-6)
  want = from_hugging_face(grads, ours.cfg)
  for (path, g), w in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    error = np.abs(np.asarray(g) - np.asarray(w)).max()
    assert error <= _TOLERANCE * np.ptp(w), jax.tree_util.keystr(path)
