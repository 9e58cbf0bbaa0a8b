"""scripts/evaluate.py: from a run's workdir to results and pictures."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.evaluation import results
from jaxchunk.evaluation.results import ResultsError
from jaxchunk.evaluation.run import Settings, evaluate, redraw
from jaxchunk.models.rope import Rope, YarnScaling
from jaxchunk.training import checkpoint
from jaxchunk.training.config import to_json
from jaxchunk.training.initial import abstract_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"
QUICK = Settings(lengths=[700], depths=[0.5], samples=1, chunk_size=512)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
  """Of a random model whose YaRN reaches to 1,500 positions."""
  folder = tmp_path_factory.mktemp("run")
  rope = Rope(scaling=YarnScaling(factor=1.5, original_length=1000))
  model = dataclasses.replace(config.model, rope=rope)
  config = dataclasses.replace(config, model=model)
  _, state, _ = abstract_model(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype),
    nnx.to_pure_dict(state),
  )
  with checkpoint.open_manager(folder, config.checkpoint) as manager:
    checkpoint.write(
      manager,
      7,
      arrays={
        "params": params,
        "optimizer": {"count": jnp.zeros((), jnp.int32)},
      },
      meta={"config": to_json(config)},
    )
  ByteTokenizer().save(folder / checkpoint.TOKENIZER)
  (folder / "config.json").write_text(json.dumps(to_json(config)))
  return folder


def test_everything_is_evaluated_and_written(workdir, tmp_path):
  lines = []
  found = evaluate(workdir, tmp_path, QUICK, say=lines.append)
  assert results.read(tmp_path / results.FILE_NAME) == dataclasses.replace(
    found, about=json.loads(json.dumps(found.about))
  )
  assert [(cell.task, cell.depth) for cell in found.cells] == [
    ("needle", 0.5),
    ("multi_needle", 0.5),
    ("variable_tracking", None),
    ("common_words", None),
    ("frequent_words", None),
  ]
  assert all(650 < cell.tokens <= 700 for cell in found.cells)
  assert found.bits_per_byte.whole.documents > 3
  assert found.about["step"] == 7
  # The documents trained on are shorter than the samples.
  assert found.about["trained_length"] < 700
  assert "[700] are beyond" in lines[0]
  assert all(cell.extrapolated for cell in found.cells)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {
    "evaluation.json",
    "bits_per_byte.png",
    "needle.png",
    "multi_needle.png",
    "tasks.png",
  }
  part = dataclasses.replace(QUICK, tasks=["bpb", "needle"])
  again = evaluate(workdir, tmp_path / "again", part, say=lines.append)
  assert again.cells == found.cells[:1]
  assert again.bits_per_byte == found.bits_per_byte
  (tmp_path / "needle.png").unlink()
  redraw(tmp_path)
  assert (tmp_path / "needle.png").exists()


BAD = {
  "task": ({"tasks": ["bpd"]}, "task 'bpd' is not one of"),
  "none": ({"lengths": []}, r"lengths=\[\] must name at least one"),
  "twice": ({"lengths": [9, 9]}, r"lengths=\[9, 9\] .* none twice"),
  "samples": ({"samples": 0}, "samples=0 must be at least 1"),
  "depth": ({"depths": [-0.1]}, "depth=-0.1 must be"),
  "positions": ({"lengths": [1501]}, "1501 is beyond .* 1500 positions"),
  "bucket": (
    {"tasks": ["bpb"], "edges": [9000]},
    "bucket from 9000 .* is empty",
  ),
  "documents": ({"max_tokens": 1}, "max_tokens=1 .*raise it"),
  "source": ({"source": "nowhere"}, "'nowhere' does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_named(case, workdir, tmp_path):
  change, message = BAD[case]
  settings = dataclasses.replace(QUICK, **change)
  with pytest.raises((ValueError, OSError), match=message):
    evaluate(workdir, tmp_path, settings)


@pytest.mark.fast
def test_nothing_to_redraw(tmp_path):
  with pytest.raises(ResultsError, match=r"evaluation\.json cannot be read"):
    redraw(tmp_path)


def test_a_mistake_is_answered_in_a_line(tmp_path):
  for flags, message in (
    ([f"--workdir={tmp_path}"], "has no folder 'checkpoints'"),
    ([f"--workdir={tmp_path}", "--redraw"], "evaluation.json cannot be read"),
  ):
    done = subprocess.run(
      [sys.executable, str(SCRIPT), *flags],
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
      capture_output=True,
      text=True,
      timeout=240,
    )
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.startswith("evaluate.py: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
