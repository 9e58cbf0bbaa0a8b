"""A run as a model of EleutherAI's lm-evaluation-harness.

    import lm_eval
    from jaxchunk.evaluation.harness import JaxchunkLM

    model = JaxchunkLM("runs/quick")
    lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

Importing this module also registers the name `jaxchunk`. What it does is in
`jaxchunk.evaluation.requests`, which does without the package.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from jaxchunk.data.tokenizers import load_tokenizer
from jaxchunk.evaluation import requests as requests_lib
from jaxchunk.training.checkpoint import load_for_inference

try:
  _model: Any = importlib.import_module("lm_eval.api.model")
  _registry: Any = importlib.import_module("lm_eval.api.registry")
except ImportError as error:
  raise ImportError(
    f"jaxchunk.evaluation.harness needs the lm_eval package ({error}); install "
    "it with: pip install 'jaxchunk[eval]'"
  ) from error


@_registry.register_model("jaxchunk")
class JaxchunkLM(_model.LM):
  """The newest checkpoint of a run of `scripts/train.py`.

  Args:
    workdir: Of the run.
    chunk_size: C, tokens that run at a time.
    batch_tokens: Most tokens under way at a time for log-likelihoods.
    bos: Begin texts with the BOS token, as documents of training do.
    extrapolate: Allow texts beyond the model's positions.
  """

  def __init__(
    self,
    workdir: str,
    *,
    chunk_size: int = 512,
    batch_tokens: int = 16_384,
    bos: bool = True,
    extrapolate: bool = False,
    **harness: Any,
  ):
    # The harness adds these to every model's arguments.
    ignored = {"batch_size", "max_batch_size", "device"}
    if unknown := sorted(set(harness) - ignored):
      raise ValueError(f"model arguments {unknown} are unknown")
    super().__init__()
    self._model, folder, _ = load_for_inference(workdir)
    self._tokenizer = load_tokenizer(folder)
    self._batch_tokens = batch_tokens
    self._options: dict[str, Any] = {
      "chunk_size": chunk_size,
      "bos": bos,
      "extrapolate": extrapolate,
    }

  @property
  def tokenizer_name(self) -> str:
    """Names the tokenizer in the harness's caches."""
    fingerprint: str = self._tokenizer.fingerprint
    return fingerprint

  def loglikelihood(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """See `requests.loglikelihood`."""
    pairs = [request.args for request in requests]
    with tqdm(total=len(pairs), disable=disable_tqdm) as bar:
      found = requests_lib.loglikelihood(
        self._model,
        self._tokenizer,
        pairs,
        batch_tokens=self._batch_tokens,
        progress=bar.update,
        **self._options,
      )
    for pair, result in zip(pairs, found, strict=True):
      self.cache_hook.add_partial("loglikelihood", pair, result)
    return found

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """See `requests.loglikelihood_rolling`."""
    texts = [request.args for request in requests]
    with tqdm(total=len(texts), disable=disable_tqdm) as bar:
      found = requests_lib.loglikelihood_rolling(
        self._model,
        self._tokenizer,
        [text for (text,) in texts],
        batch_tokens=self._batch_tokens,
        progress=bar.update,
        **self._options,
      )
    for text, result in zip(texts, found, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", text, result)
    return found

  def generate_until(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """See `requests.generate_until`."""
    arguments = [request.args for request in requests]
    texts = requests_lib.generate_until(
      self._model, self._tokenizer, arguments, **self._options
    )
    found = []
    for pair, text in zip(
      arguments,
      tqdm(texts, total=len(arguments), disable=disable_tqdm),
      strict=True,
    ):
      found.append(text)
      self.cache_hook.add_partial("generate_until", pair, text)
    return found
