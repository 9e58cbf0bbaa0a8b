# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # jaxchunk in five minutes
#
# Real text has documents of every length; accelerators want one shape.
# jaxchunk cuts and packs documents into **chunks of one fixed size**, and
# still computes *exactly* the loss and gradients of the whole documents.
#
# This notebook trains a small language model on the sources of Python's
# standard library (nothing is downloaded) for about a minute on two CPU cores,
# and lets it write. Why it is exact: `exact_chunks.ipynb`, beside this one.

# %%
import os

STEPS = int(os.environ.get("JAXCHUNK_STEPS", "80"))  # More is better.
WORKDIR = "runs/notebook"  # Checkpoints, metrics and pictures go here.

# %% [markdown]
# ## Install
#
# Nothing to do where jaxchunk is installed. On Colab, pick a GPU or a TPU
# under *Runtime > Change runtime type*, and write into `SOURCE` where your copy
# of the repository is. The extra decides what jax runs on:
#
# | Runtime | What is installed |
# |---|---|
# | GPU | `jaxchunk[cuda]` |
# | TPU | `jaxchunk[tpu]` |
# | neither | `jaxchunk` |
#
# **The restart:** Colab comes with its own jax and NumPy. If the session had
# loaded one of them before it was replaced, the old one stays in memory. The
# cell notices, and asks you to restart the session and to run all again; the
# second time it has nothing to install.

# %%
import importlib.metadata
import importlib.util
import subprocess
import sys

SOURCE = ""  # "git+https://.../jaxchunk.git", or the folder of a checkout.


def accelerator() -> str:
  """The extra that fits this machine: "cuda", "tpu" or none."""
  if os.path.exists("/dev/nvidiactl"):
    return "cuda"
  is_tpu = os.path.exists("/dev/accel0") or "TPU_ACCELERATOR_TYPE" in os.environ
  return "tpu" if is_tpu else ""


def install(source: str, extra: str) -> None:
  """Installs jaxchunk with pip, as `%pip install` would."""
  if not source:
    raise ValueError('SOURCE is ""; write where jaxchunk is to come from')
  name = f"jaxchunk[{extra}]" if extra else "jaxchunk"
  if "://" not in source:
    source = "file://" + os.path.abspath(source)
  pip = [sys.executable, "-m", "pip", "install", "--quiet"]
  subprocess.run([*pip, f"{name} @ {source}"], check=True)
  importlib.invalidate_caches()


def replaced() -> list[str]:
  """What this session loaded in another version than is now installed."""
  loaded = {
    name: getattr(sys.modules.get(name), "__version__", None)
    for name in ("jax", "jaxlib", "numpy", "ml_dtypes", "flax")
  }
  return [
    f"{name} {version}"
    for name, version in loaded.items()
    if version and version != importlib.metadata.version(name)
  ]


if importlib.util.find_spec("jaxchunk") is None:
  install(SOURCE, accelerator())
if old := replaced():
  raise RuntimeError(
    f"{', '.join(old)} still loaded: Runtime > Restart session, then run all"
  )

# %%
import jax

import jaxchunk as jc

print(f"jaxchunk {jc.__version__}, jax {jax.__version__} on {jax.devices()}")

# %% [markdown]
# ## The data
#
# A run is one typed configuration. Every field can be changed here, or on the
# command line of `scripts/train.py`.

# %%
from jaxchunk.data.config import DataConfig
from jaxchunk.training.config import CheckpointConfig, Config, TrainConfig

config = Config(
  model=jc.ModelConfig(
    vocab_size=2048,
    d_model=128,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    d_ff=384,
    tie_embeddings=True,
  ),
  data=DataConfig(
    source="stdlib",  # Or the path of your .jsonl, .parquet or text files.
    tokenizer="bpe:2048",
    batch_tokens=4096,
    max_document_tokens=4096,  # To be quick; longer ones are counted.
  ),
  train=TrainConfig(
    num_steps=STEPS,
    chunk_size=1024,
    live_chunks=4,
    learning_rate=4e-3,
    warmup_steps=STEPS // 8,
    eval_every=max(STEPS // 2, 1),
    eval_tokens=16_384,
  ),
  checkpoint=CheckpointConfig(save_every=STEPS),
)

# %%
from jaxchunk.data.corpus import describe, open_corpus

corpus = open_corpus(config.data)  # Trains the tokenizer the first time.
print(describe(corpus))

# %% [markdown]
# ## The plan
#
# Left: lengths differ by a factor of thousands. Right: what becomes of twenty
# documents. A colour is a document, a box a chunk. Documents longer than a
# chunk run through several, a *lane*, which share one cache of keys and values;
# the others fill what is left. White is padding.

# %%
import matplotlib.pyplot as plt
import numpy as np

from jaxchunk.data.accounting import KEPT

CHUNK = config.train.chunk_size
BLUE, ORANGE = "#0072B2", "#D55E00"


def draw_lengths(axes):
  lengths = corpus.index.lengths
  kept = corpus.reasons == KEPT
  bins = np.geomspace(lengths.min(), lengths.max() + 1, 40)
  parts = [lengths[kept], lengths[~kept]]
  names = ["trained on", "too long here, or held out"]
  axes.hist(parts, bins, stacked=True, color=[BLUE, "#CCCCCC"], label=names)
  axes.axvline(CHUNK, color="black", ls="--", lw=1, label=f"chunk of {CHUNK:,}")
  axes.set(xscale="log", xlabel="tokens in the document", ylabel="documents")
  axes.set_title(f"{len(lengths)} documents", loc="left")
  axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
  axes.legend(frameon=False, loc="upper left", fontsize=9)


def draw_plan(axes, plan):
  colours = plt.get_cmap("tab20").colors
  for row, lane in enumerate(plan.lanes):
    for sequence, start in lane.sequences:
      size = plan.lengths[sequence]
      colour = colours[sequence % 20]
      axes.barh(row, size, left=start, color=colour, height=0.7)
    for chunk in range(lane.num_chunks):
      box = {"fc": "none", "ec": "black", "lw": 1}
      axes.barh(row, CHUNK, left=chunk * CHUNK, height=0.7, **box)
  axes.set(xlabel="tokens", ylabel="lane", yticks=range(len(plan.lanes)))
  axes.invert_yaxis()
  axes.set_title(
    f"{len(plan.lengths)} documents in {plan.num_chunks} chunks, "
    f"{plan.padding_fraction:.1%} padding",
    loc="left",
  )


kept = corpus.index.lengths[corpus.reasons == KEPT]
some = np.random.default_rng(0).choice(kept, 20, replace=False)
plan = jc.chunk_plan(some, CHUNK)
print(plan.summary())
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
draw_lengths(left)
draw_plan(right, plan)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Train
#
# Programs are compiled once for each power of two of chunks, then every batch
# runs through them. Interrupt whenever you like: the same cell goes on where it
# was. For a run from the start, choose another `WORKDIR`.

# %%
from jaxchunk.training import loop, metrics

result = loop.train(config, WORKDIR)
print(loop.describe_result(result))

# %%
steps = list(metrics.read(result.report.parent))
heldout = [s for s in steps if s.get("heldout_bits_per_byte") is not None]

figure, axes = plt.subplots(figsize=(7, 3.4))
axes.plot(
  [s["step"] for s in steps],
  [s["bits_per_byte"] for s in steps],
  color=BLUE,
  label="training",
)
axes.plot(
  [s["step"] for s in heldout],
  [s["heldout_bits_per_byte"] for s in heldout],
  "o",
  color=ORANGE,
  label="held-out documents",
)
axes.set(xlabel="step", ylabel="bits per byte")
axes.set_title("Loss", loc="left")
axes.grid(alpha=0.25)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The run drew a report of itself: loss, documents, where every token read went,
# padding, speed, memory against length, and the order in which chunks ran.

# %%
from IPython.display import Image, display

display(Image(result.report.with_name("report.png"), width=900))

# %% [markdown]
# ## Generate
#
# A prompt runs through the same chunk program; then tokens come one by one. A
# minute of training teaches the look of Python, not its meaning.

# %%
from jaxchunk.data.tokenizers import load_tokenizer
from jaxchunk.inference.sampling import Sampler
from jaxchunk.inference.text import continue_text
from jaxchunk.training.checkpoint import load_for_inference

PROMPT = "import os\n\n\ndef main(argv):\n    "

model, folder, _ = load_for_inference(WORKDIR)
pieces, clock = continue_text(
  model,
  load_tokenizer(folder),
  PROMPT,
  max_new_tokens=100,
  sampler=Sampler(temperature=0.7, top_p=0.9),
  chunk_size=128,
)
print(PROMPT + "".join(pieces))
print(clock)

# %% [markdown]
# ## Next
#
# - Your own text: `DataConfig(source="my.jsonl")`.
# - Longer documents: drop `max_document_tokens`. Memory follows the chunk and
#   the cache, not the activations of the longest document.
# - The gradient alone, in your own loop:
#   `loss, grads = jc.chunked_value_and_grad(model, batch, chunk_size=2048)`.
# - `exact_chunks.ipynb`: why this is exact, in pictures and numbers.
