"""Evaluates the newest checkpoint of a run, from its workdir."""

import dataclasses
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxchunk.data.accounting import KEPT
from jaxchunk.data.corpus import (
  Corpus,
  heldout_examples,
  open_corpus,
  read_examples,
)
from jaxchunk.data.tokenizers import load_tokenizer
from jaxchunk.evaluation import pictures, results
from jaxchunk.evaluation.bits_per_byte import (
  BitsPerByte,
  bits_per_byte,
  score_documents,
)
from jaxchunk.evaluation.lengths import check_lengths
from jaxchunk.evaluation.results import Results
from jaxchunk.evaluation.scoring import Cell, model_scorer, score_cell
from jaxchunk.evaluation.tasks import NEEDLE_TASKS, Haystack, make_samples
from jaxchunk.models.transformer import Transformer
from jaxchunk.training import config as config_lib
from jaxchunk.training.checkpoint import load_for_inference
from jaxchunk.training.config import Config
from jaxchunk.types import Example

BITS_PER_BYTE = "bpb"
CHOICES = {
  BITS_PER_BYTE: (),
  "needle": ("needle",),
  "multi_needle": ("multi_needle",),
  "variable_tracking": ("variable_tracking",),
  "aggregation": ("common_words", "frequent_words"),
}
"""What can be asked for, and the synthetic tasks that it stands for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What to evaluate.

  Attributes:
    tasks: Names out of `CHOICES`.
    lengths: Of the synthetic tasks' samples, in tokens.
    depths: Of needles, 0 (begin) to 1 (end).
    samples: For each task, length and depth.
    seed: Of the samples.
    edges: Borders of buckets for bits per byte; `None` is powers of two.
    max_tokens: Most held-out tokens; `None` is the run's `train.eval_tokens`.
    source: Documents in place of the run's held-out ones; all are taken.
    chunk_size: C; `None` is the run's.
    extrapolate: Allow lengths beyond the model's positions.
  """

  tasks: Sequence[str] = tuple(CHOICES)
  lengths: Sequence[int] = (1024, 2048, 4096)
  depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
  samples: int = 10
  seed: int = 0
  edges: Sequence[int] | None = None
  max_tokens: int | None = None
  source: str | None = None
  chunk_size: int | None = None
  extrapolate: bool = False

  def validate(self) -> None:
    """Checks what can be checked without a model.

    Raises:
      ValueError: A value is impossible; names it and the remedy.
    """
    for task in self.tasks:
      if task not in CHOICES:
        raise ValueError(f"task {task!r} is not one of {list(CHOICES)}")
    for name in ("tasks", "lengths", "depths"):
      values = list(getattr(self, name))
      if not values or len(set(values)) < len(values):
        raise ValueError(
          f"{name}={values} must name at least one and none twice"
        )
    for name in ("samples", "chunk_size", "max_tokens"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    for depth in self.depths:
      if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must be from 0 (begin) to 1 (end)")


@dataclasses.dataclass(frozen=True)
class _Subject:
  """What is evaluated: a model and documents.

  Attributes:
    model: The model.
    corpus: Documents, with the model's tokenizer.
    examples: Of them, those for bits per byte.
    trained_length: Tokens of the longest document that it was trained on.
    chunk_size: C.
    batch_tokens: Most tokens under way at a time.
    about: Its description for the results.
  """

  model: Transformer
  corpus: Corpus
  examples: list[Example]
  trained_length: int
  chunk_size: int
  batch_tokens: int
  about: dict[str, Any]


def evaluate(
  workdir: Path,
  output: Path,
  settings: Settings,
  *,
  say: Callable[[str], object] = tqdm.write,
) -> Results:
  """Evaluates, and writes `evaluation.json` and pictures.

  The file is written again after each part, so that a killed evaluation
  leaves what it found.

  Args:
    workdir: Of a run of `scripts/train.py`.
    output: A folder.
    settings: What to evaluate.
    say: Gets a line about each part.

  Raises:
    ValueError: A setting does not fit the model or the documents.
    OSError: A file cannot be read or written.
    CheckpointError: There is no checkpoint that can be read.
  """
  settings.validate()
  subject = _open(workdir, settings)
  start = time.perf_counter()
  beyond = check_lengths(
    settings.lengths,
    subject.model.cfg,
    trained_length=subject.trained_length,
    extrapolate=settings.extrapolate,
  )
  if beyond:
    say(
      f"Lengths {beyond} are beyond the {subject.trained_length:,} tokens of "
      "the longest document trained on: the model extrapolates there"
    )
  cells: list[Cell] = []
  found = Results(
    f"{workdir.absolute().name}: step {subject.about['step']:,}, "
    f"{subject.about['parameters']:,} parameters",
    {**subject.about, "settings": dataclasses.asdict(settings)},
    _bits_per_byte(subject, settings, say),
    cells,
  )
  path = output / results.FILE_NAME
  results.write(path, found)
  for cell in _cells(subject, settings, beyond):
    cells.append(cell)
    say(_describe(cell))
    results.write(path, found)
  seconds = round(time.perf_counter() - start, 1)
  found = dataclasses.replace(found, about={**found.about, "seconds": seconds})
  results.write(path, found)
  pictures.draw(found, output)
  return found


def redraw(output: Path) -> Results:
  """Draws the pictures again, from `evaluation.json` alone."""
  found = results.read(output / results.FILE_NAME)
  pictures.draw(found, output)
  return found


def _open(workdir: Path, settings: Settings) -> _Subject:
  model, folder, step = load_for_inference(workdir)
  config = _read_config(workdir)
  data = config.data
  tokenizer = load_tokenizer(folder, parse_special=data.parse_special)
  trained = open_corpus(data, tokenizer=tokenizer)
  corpus = trained
  if settings.source is not None:
    data = dataclasses.replace(
      data, source=settings.source, heldout_fraction=0.0
    )
    corpus = open_corpus(data, tokenizer=tokenizer)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
  about = {
    "step": step,
    "parameters": parameters,
    "source": data.source,
    "documents_fingerprint": corpus.source.fingerprint,
    "tokenizer_fingerprint": tokenizer.fingerprint,
    "trained_length": int(trained.lengths[trained.reasons == KEPT].max()),
    "jaxchunk": importlib.metadata.version("jaxchunk"),
    "jax": jax.__version__,
  }
  return _Subject(
    model=model,
    corpus=corpus,
    examples=_examples(corpus, config, settings),
    trained_length=about["trained_length"],
    chunk_size=settings.chunk_size or config.train.chunk_size,
    batch_tokens=data.batch_tokens,
    about=about,
  )


def _read_config(workdir: Path) -> Config:
  path = workdir / "config.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist; name the --workdir of a run of scripts/train.py"
    )
  values = json.loads(path.read_text(encoding="utf-8"))
  config: Config = config_lib.from_json(Config, values)
  return config


def _examples(
  corpus: Corpus, config: Config, settings: Settings
) -> list[Example]:
  """Documents for bits per byte: held out, or all of another source."""
  if BITS_PER_BYTE not in settings.tasks:
    return []
  limit = settings.max_tokens or config.train.eval_tokens
  if settings.source is None:
    examples = heldout_examples(corpus, max_tokens=limit)
  else:
    kept = np.flatnonzero(corpus.reasons == KEPT)
    fits = np.cumsum(corpus.lengths[kept] - 1) <= limit
    examples = read_examples(corpus, kept[fits])
  if not examples:
    raise ValueError(
      f"no document of {corpus.config.source!r} to evaluate on within "
      f"max_tokens={limit} (data.heldout_fraction="
      f"{corpus.config.heldout_fraction}); raise it, or name a --source"
    )
  return examples


def _bits_per_byte(
  subject: _Subject, settings: Settings, say: Callable[[str], object]
) -> BitsPerByte | None:
  if not subject.examples:
    return None
  check_lengths(
    [len(example) + 1 for example in subject.examples],
    subject.model.cfg,
    extrapolate=settings.extrapolate,
  )
  with _bar("bits per byte", sum(map(len, subject.examples))) as bar:
    scored = score_documents(
      subject.model,
      subject.corpus,
      subject.examples,
      chunk_size=subject.chunk_size,
      batch_tokens=subject.batch_tokens,
      progress=bar.update,
    )
  found = bits_per_byte(scored, edges=settings.edges)
  error = found.whole.standard_error
  say(
    f"bits per byte: {found.whole.bits_per_byte:.4f}"
    f"{'' if error is None else f' +- {error:.4f}'} on "
    f"{found.whole.documents} documents, {found.whole.bytes:,} bytes"
  )
  return found


def _cells(
  subject: _Subject, settings: Settings, beyond: Sequence[int]
) -> Iterator[Cell]:
  tasks = [task for name in settings.tasks for task in CHOICES[name]]
  if not tasks:
    return
  haystack = Haystack.of(subject.corpus)
  tokenizer = subject.corpus.tokenizer
  scorer = model_scorer(subject.model, tokenizer, chunk_size=subject.chunk_size)
  grid = [
    (task, length, depth)
    for task, length in itertools.product(tasks, settings.lengths)
    for depth in (settings.depths if task in NEEDLE_TASKS else [None])
  ]
  total = settings.samples * sum(length for _, length, _ in grid)
  with _bar("tasks", total) as bar:
    for task, length, depth in grid:
      samples = make_samples(
        task,
        length=length,
        count=settings.samples,
        tokenizer=tokenizer,
        haystack=haystack,
        depth=depth,
        seed=settings.seed,
      )
      bar.set_postfix_str(f"{task}, {length:,} tokens", refresh=False)
      yield score_cell(
        samples,
        scorer,
        extrapolated=length in beyond,
        progress=bar.update,
      )


def _describe(cell: Cell) -> str:
  depth = "" if cell.depth is None else f", depth {cell.depth:.0%}"
  return (
    f"{cell.task}, {cell.length:,} tokens{depth}: answer likeliest "
    f"{cell.ranked_first:.0%} (chance {cell.chance:.0%}), written "
    f"{cell.exact_match:.0%}"
  )


def _bar(name: str, tokens: int) -> Any:
  return tqdm(
    total=tokens,
    desc=name,
    unit="token",
    unit_scale=True,
    dynamic_ncols=True,
    disable=not sys.stderr.isatty(),
  )
