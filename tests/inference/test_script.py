"""scripts/generate.py from a checkpoint to text, and its errors."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.data.chat import ChatTemplate
from jaxchunk.data.config import DataConfig
from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.models.config import ModelConfig
from jaxchunk.training import checkpoint
from jaxchunk.training.config import Config, to_json
from jaxchunk.training.initial import abstract_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"


_TEMPLATE = """{% for m in messages %}{{ m.role }}:{{ m.content }}
{% endfor %}{% if add_generation_prompt %}4{% endif %}"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Step 1 repeats the last token; step 2 counts up."""
  folder = tmp_path_factory.mktemp("run")
  cfg = ModelConfig(
    vocab_size=259, d_model=64, num_layers=1, num_heads=2, d_ff=8
  )
  config = Config(model=cfg, data=DataConfig(tokenizer="byte"))
  _, state, _ = abstract_model(cfg)
  embed = np.random.default_rng(0).standard_normal((259, 64))
  params = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.to_pure_dict(state)
  )
  params["embed"] = jnp.asarray(embed, jnp.float32)
  params["final_norm"]["scale"] = jnp.ones(64)
  with checkpoint.open_manager(folder, config.checkpoint) as manager:
    for step in (1, 2):
      head = np.roll(embed, step - 1, axis=0)
      checkpoint.write(
        manager,
        step,
        arrays={
          "params": {**params, "head": jnp.asarray(head, jnp.float32)},
          "optimizer": {"count": jnp.zeros((), jnp.int32)},
        },
        meta={"config": to_json(config)},
      )
  ByteTokenizer().save(folder / checkpoint.TOKENIZER)
  ChatTemplate(_TEMPLATE).save(folder / checkpoint.TOKENIZER)
  return folder


CASES = {
  "text": {
    "prompt_file": "prompt.txt",
    "temperature": 0,
    "chunk_size": 8,
    "max_new_tokens": 5,
  },
  "no run": {"workdir": "nowhere", "prompt": "a"},
  "chat": {
    "chat": True,
    "prompt": "12",
    "system": "0",
    "temperature": 0,
    "max_new_tokens": 3,
  },
  "system alone": {"prompt": "a", "system": "0"},
  "bad number": {"temperature": -1, "prompt": "a"},
}


@pytest.fixture(scope="module")
def results(workdir):
  """What became of each case, run side by side."""
  (workdir / "prompt.txt").write_text("12")

  def run(options):
    flags = {"workdir": workdir} | options
    return subprocess.run(
      [sys.executable, str(SCRIPT)] + [f"--{k}={v}" for k, v in flags.items()],
      cwd=workdir,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
      capture_output=True,
      text=True,
      timeout=240,
    )

  with ThreadPoolExecutor() as pool:
    return dict(zip(CASES, pool.map(run, CASES.values()), strict=True))


def test_text_goes_on_to_the_last_token(results):
  done = results["text"]
  assert (done.stdout, done.returncode) == ("34567", 0), done.stderr
  speed = r"prefill: 3 tokens in \S+ s.*, decode: 4 tokens in \S+ s.*"
  # Orbax may have had something to say before.
  assert re.search(rf"(^|\n)\n{speed}\n$", done.stderr)


def test_a_chat_is_laid_out_by_the_template(results):
  done = results["chat"]
  # The model counts up from the template's last character.
  assert (done.stdout, done.returncode) == ("567", 0), done.stderr
  turns = len("system:0\nuser:12\n4")
  assert f"prefill: {turns} tokens" in done.stderr


@pytest.mark.parametrize(
  ("case", "message"),
  [
    ("no run", "/nowhere has no folder 'checkpoints'"),
    ("system alone", "--system goes with --chat"),
    ("bad number", "temperature=-1.0 must be 0"),
  ],
)
def test_a_mistake_is_answered_in_a_line(results, case, message):
  done = results[case]
  assert (done.stdout, done.returncode) == ("", 1)
  assert done.stderr.startswith("generate.py: ") and message in done.stderr
  assert done.stderr.count("\n") == 1
