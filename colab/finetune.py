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
# # Fine-tune a published model by chunks
#
# Weights, tokenizer and chat template from a folder of Hugging Face;
# conversations of any length; adapters (LoRA) trained **by chunks**, so that
# memory does not follow the longest conversation's activations; the result
# written back as such a folder.
#
# Nothing is downloaded: without a `MODEL` the notebook makes itself a tiny
# random one, which shows every step but learns little in a minute.

# %%
import os

STEPS = int(os.environ.get("JAXCHUNK_STEPS", "40"))
MODEL = ""  # A folder with config.json, *.safetensors and tokenizer.json.
DATA = ""  # A .jsonl file with a list of `messages` on every line.
WORKDIR = "runs/finetune"

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
# ## Conversations
#
# Without `DATA`, somebody asks about Python's standard library and is answered
# with docstrings, over one or more turns.

# %%
import ast
import json
import pathlib
import sysconfig

import numpy as np


def docstrings(modules=60):
  """Names and docstrings of functions of the standard library."""
  paths = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
  for path in paths[:modules]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
        yield f"{path.stem}.{node.name}", doc


def make_conversations(path, count=150):
  """Writes one conversation a line; most are short, a few long."""
  rng = np.random.default_rng(0)
  pool = list(docstrings())
  with open(path, "w", encoding="utf-8") as file:
    for _ in range(count):
      messages = []
      for _ in range(min(1 + int(rng.pareto(1.2)), 16)):
        name, doc = pool[rng.integers(len(pool))]
        messages += [
          {"role": "user", "content": f"What does {name} do?"},
          {"role": "assistant", "content": doc},
        ]
      file.write(json.dumps({"messages": messages}) + "\n")


if not DATA:
  DATA = "conversations.jsonl"
  make_conversations(DATA)
with open(DATA, encoding="utf-8") as lines:
  print(lines.readline()[:200], "...")

# %% [markdown]
# ## The model
#
# A folder as `save_pretrained` of transformers writes it. Here a small Qwen 3
# with random weights, and a tokenizer trained on the conversations, if there is
# no `MODEL`.

# %%
from flax import nnx

from jaxchunk.data.bpe import train_bpe
from jaxchunk.data.chat import CHATML
from jaxchunk.data.tokenizers import JsonTokenizer
from jaxchunk.models.families import qwen3


def make_model(folder):
  """A model of a million parameters, as if it had been published."""
  specials = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  with open(DATA, encoding="utf-8") as lines:
    definition = train_bpe(1024, lines, specials)
  tokenizer = JsonTokenizer(definition, eos="<|im_end|>", pad="<|pad|>")
  cfg = qwen3(
    vocab_size=1024,
    d_model=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    d_ff=384,
    tie_embeddings=True,
  )
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  jc.save_hf(model, folder, tokenizer=tokenizer, overwrite=True)
  pathlib.Path(folder, "chat_template.jinja").write_text(CHATML)


if not MODEL:
  MODEL = "tiny-model"
  make_model(MODEL)
print(sorted(path.name for path in pathlib.Path(MODEL).iterdir()))

# %% [markdown]
# ## What is trained on
#
# The chat template lays out each conversation; the loss counts what the
# assistant says. Orange is trained on, grey is only read.

# %%
import matplotlib.pyplot as plt

from jaxchunk.data.config import DataConfig
from jaxchunk.data.corpus import describe, open_corpus, read_examples

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"
data = DataConfig(
  source=DATA,
  format="messages",
  tokenizer=MODEL,
  batch_tokens=4096,
  heldout_fraction=0.05,
  cache_dir="cache",
)
corpus = open_corpus(data)
print(describe(corpus))

# %%
order = np.argsort(-corpus.lengths)[:40]
figure, axes = plt.subplots(figsize=(9, 4))
for row, example in enumerate(read_examples(corpus, order)):
  axes.barh(row, len(example), color=GREY, height=0.8)
  edges = np.flatnonzero(np.diff(example.weights, prepend=0, append=0))
  for start, stop in edges.reshape(-1, 2):
    axes.barh(row, stop - start, left=start, color=ORANGE, height=0.8)
axes.set(xlabel="tokens", yticks=[])
axes.invert_yaxis()
axes.set_title("The 40 longest conversations", loc="left")
plt.show()

# %% [markdown]
# ## Train adapters by chunks
#
# Only the adapters get gradients: for the model's own matrices none are
# computed, and checkpoints hold the adapters alone.

# %%
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.models.lora import LoRA
from jaxchunk.training import loop, metrics
from jaxchunk.training.config import CheckpointConfig, Config, TrainConfig

config = Config(
  model=load_config(MODEL, lora=LoRA(rank=8, alpha=16.0)),
  data=data,
  train=TrainConfig(
    init_from=MODEL,
    num_steps=STEPS,
    chunk_size=1024,
    learning_rate=1e-2,
    weight_decay=0.0,
    warmup_steps=STEPS // 8,
    eval_every=max(STEPS // 2, 1),
  ),
  checkpoint=CheckpointConfig(save_every=STEPS),
)
result = loop.train(config, WORKDIR)
print(loop.describe_result(result))

# %%
steps = list(metrics.read(result.report.parent))
figure, axes = plt.subplots(figsize=(7, 3.4))
axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], color=BLUE)
axes.set(xlabel="step", ylabel="nats a token of the assistant")
axes.set_title("Loss", loc="left")
axes.grid(alpha=0.25)
plt.show()

# %%
from IPython.display import Image, display

display(Image(result.report.with_name("report.png"), width=900))

# %% [markdown]
# ## Ask it
#
# The same template asks; the prompt runs through the chunk program.

# %%
from jaxchunk.data.chat import load_template
from jaxchunk.data.tokenizers import load_tokenizer
from jaxchunk.inference.generate import generate
from jaxchunk.training.checkpoint import load_for_inference

question = [{"role": "user", "content": "What does ast.walk do?"}]
template = load_template(None, MODEL)
prompt = template.render(question, add_generation_prompt=True)
tokenizer = load_tokenizer(MODEL, parse_special=True)
model, _, _ = load_for_inference(WORKDIR)
ids = generate(
  model,
  tokenizer.encode(prompt),
  max_new_tokens=60,
  chunk_size=64,
  eos_id=tokenizer.eos_id,
)
print(prompt + tokenizer.decode(list(ids)))

# %% [markdown]
# ## Export
#
# Merged, in the format that the model came in; or the adapters alone, for PEFT.

# %%
from jaxchunk.training.export import export_run

print(export_run(WORKDIR, "fine-tuned", overwrite=True))
print(export_run(WORKDIR, "adapters", adapters=True))

# %% [markdown]
# Where transformers is installed, it computes the same from what was written.

# %%
if importlib.util.find_spec("transformers") and importlib.util.find_spec(
  "torch"
):
  import torch
  import transformers

  theirs = transformers.AutoModelForCausalLM.from_pretrained("fine-tuned")
  row = tokenizer.encode(prompt)[None]
  with torch.no_grad():
    want = theirs(torch.from_numpy(row).long()).logits.numpy()
  gap = np.abs(np.asarray(jc.load_hf("fine-tuned")(row)) - want).max()
  print(f"largest difference of a logit: {gap:.1e} of {np.ptp(want):.1f}")
else:
  print("transformers is not installed here")
