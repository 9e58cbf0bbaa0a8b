"""Models of transformers, loaded, run and saved here: are they the same?

  python benchmarks/hugging_face.py [--seed=0] [--only=gemma2,phi3] [--memory]

For a small random model of every family, each feature beyond its edge:
largest difference of the logits in fp32 over their range; greedy tokens that
differ out of `--tokens`; whether a saved model, loaded again, has the same
bits here, and the same logits in transformers.

`--memory` instead loads and saves a model of 400 MB in processes of their own
and prints the growth of the resident memory over the model's own, in units of
its largest tensor.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from absl import app, flags
from common import report, rounded

_SEED = flags.DEFINE_integer("seed", 0, "Of weights and tokens.")
_ONLY = flags.DEFINE_list("only", [], "Cases, if not all.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "To generate.", 1)
_MEMORY = flags.DEFINE_bool("memory", False, "Measure memory instead.")

_TOLERANCE = 2e-5
# The C library gives freed blocks of 1 MiB and more back at once.
_GIVE_BACK = {
  "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
  "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}
# Where transformers chooses by the length so far, it is past the edge.
_PROMPT = 96


def compare(name: str, seed: int, new_tokens: int) -> dict[str, Any]:
  """One case's figures."""
  import hf_models
  import jax
  import torch
  import transformers

  import jaxchunk as jc
  from jaxchunk.inference.generate import generate

  theirs = hf_models.random_model(name, seed)
  rng = np.random.default_rng(seed)
  shape = (2, hf_models.LENGTH)
  tokens = rng.integers(3, hf_models.VOCAB, shape, np.int32)
  prompt = rng.integers(3, hf_models.VOCAB, _PROMPT, np.int32)

  def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
      return model(torch.from_numpy(tokens).long()).logits.numpy()

  with tempfile.TemporaryDirectory() as folder:
    there, here = f"{folder}/theirs", f"{folder}/ours"
    theirs.save_pretrained(there, max_shard_size="40KB")
    length = hf_models.LENGTH
    ours = jc.load_hf(there, context_length=length)
    jc.save_hf(ours, here, like=there, max_shard_bytes=40_000)
    back = jc.load_hf(here, context_length=length)
    again = transformers.AutoModelForCausalLM.from_pretrained(
      here, attn_implementation="eager"
    ).eval()
  want = logits(theirs)
  got = np.asarray(jax.jit(lambda model: model(tokens))(ours))
  same = jax.tree.map(lambda a, b: bool((a == b).all()), ours, back)
  figures = {
    "logits_error": float(np.abs(got - want).max() / np.ptp(want)),
    "same_bits": all(jax.tree.leaves(same)) and ours.cfg == back.cfg,
    "transformers_reads_it": bool((logits(again) == want).all()),
  }
  if name == "dynamic":
    # Its base there follows the length so far, token by token.
    return figures
  with torch.no_grad():
    wanted = theirs.generate(
      torch.from_numpy(prompt[None]).long(),
      max_new_tokens=new_tokens,
      do_sample=False,
      eos_token_id=None,
    )[0, _PROMPT:].tolist()
  found = generate(ours, prompt, max_new_tokens=new_tokens, chunk_size=64)
  pairs = zip(found, wanted, strict=True)
  return figures | {"tokens_differ": sum(a != b for a, b in pairs)}


def memory() -> dict[str, float]:
  """Growth of resident memory over the model, in largest tensors."""
  script = pathlib.Path(__file__).with_name("hf_memory.py")
  with tempfile.TemporaryDirectory() as folder:
    figures = {}
    for task in ("make", "load", "save"):
      run = subprocess.run(
        [sys.executable, script, task, folder],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | _GIVE_BACK,
      )
      if task != "make":
        figures[f"{task}_over_largest_tensor"] = float(run.stdout)
  return figures


def main(_: list[str]) -> None:
  if _MEMORY.value:
    figures = memory()
    report("hugging_face_memory", **rounded(figures))
    sys.exit(max(figures.values()) > 2)
  import hf_models

  results = {}
  for name in _ONLY.value or hf_models.CASES:
    results[name] = compare(name, _SEED.value, _TOKENS.value)
    print(f"{name}: {rounded(results[name])}", file=sys.stderr, flush=True)
  worst = max(r["logits_error"] for r in results.values())
  differ = sum(r.get("tokens_differ", 0) for r in results.values())
  ok = worst <= _TOLERANCE and not differ
  ok &= all(
    r["same_bits"] and r["transformers_reads_it"] for r in results.values()
  )
  report(
    "hugging_face",
    worst_logits_error=rounded(worst),
    tokens_differ=differ,
    tokens_each=_TOKENS.value,
    cases=rounded(results),
    ok=ok,
  )
  sys.exit(not ok)


if __name__ == "__main__":
  app.run(main)
