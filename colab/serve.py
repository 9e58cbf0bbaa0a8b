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
# # Serve a model: many texts at once
#
# One engine continues many prompts in the same steps, computes equal beginnings
# once, and runs adapters side by side. Here it does so in this process, then
# behind OpenAI's HTTP interface on this machine alone.
#
# Nothing is downloaded: a tiny model learns the Zen of Python by heart in a few
# seconds, and an adapter to say the contrary.

# %%
import os

STEPS = int(os.environ.get("JAXCHUNK_STEPS", "30"))

# %% [markdown]
# ## Install
#
# Nothing to do where jaxchunk is installed with the extra `serve`. On Colab,
# pick a GPU or a TPU under *Runtime > Change runtime type*, and write into
# `SOURCE` where your copy of the repository is. The other extra decides what
# jax runs on:
#
# | Runtime | What is installed |
# |---|---|
# | GPU | `jaxchunk[serve,cuda]` |
# | TPU | `jaxchunk[serve,tpu]` |
# | neither | `jaxchunk[serve]` |
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
  name = f"jaxchunk[serve,{extra}]" if extra else "jaxchunk[serve]"
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
# ## A model, and an adapter for it
#
# In place of this: `jc.load_hf("a folder of Hugging Face")`, and
# `load_peft(model, "a folder of PEFT")` from `jaxchunk.interop.peft`.

# %%
import contextlib
import importlib
import io

import numpy as np
import optax
from flax import nnx

from jaxchunk.data.bpe import SPECIALS, train_bpe
from jaxchunk.data.tokenizers import JsonTokenizer
from jaxchunk.models.adapters import add_lora
from jaxchunk.models.lora import LoRA

with contextlib.redirect_stdout(io.StringIO()) as printed:
  importlib.import_module("this")
ZEN = printed.getvalue().strip()
LINES = ZEN.splitlines()[2:]


CONTRARY = [
  line.replace("better", "worse").replace("never", "always") for line in LINES
]
pad, bos, eos = SPECIALS
definition = train_bpe(512, [ZEN, *CONTRARY], SPECIALS)
tokenizer = JsonTokenizer(definition, pad=pad, bos=bos, eos=eos)


def pack(texts):
  """A row of texts, each a segment of its own."""
  ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
  following = [[*row[1:], tokenizer.eos_id] for row in ids]
  numbers = np.repeat(np.arange(len(ids)) + 1, [len(row) for row in ids])
  return {
    "tokens": np.concatenate(ids)[None],
    "targets": np.concatenate(following)[None],
    "segment_ids": numbers[None],
  }


def learn(model, texts, *, steps, rate, trainable=nnx.Param):
  """Plain Adam; for more than a page of text there is `scripts/train.py`."""
  batch, optimizer = pack(texts), optax.adam(rate)

  @jax.jit
  def step(model, moments):
    loss, grads = jc.full_value_and_grad(model, batch, trainable=trainable)
    updates, moments = optimizer.update(nnx.to_pure_dict(grads), moments)
    params = nnx.to_pure_dict(nnx.state(model, trainable))
    return loss, optax.apply_updates(params, updates), moments

  moments = optimizer.init(nnx.to_pure_dict(nnx.state(model, trainable)))
  for _ in range(steps):
    loss, params, moments = step(model, moments)
    nnx.update(model, params)
  print(f"{steps} steps, loss {loss:.2f}")


cfg = jc.ModelConfig(
  vocab_size=512,
  d_model=128,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  d_ff=384,
  tie_embeddings=True,
  context_length=1024,
)
model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
learn(model, [ZEN, *LINES], steps=STEPS, rate=5e-3)
contrary = add_lora(model, LoRA(rank=8))
learn(contrary, CONTRARY, steps=STEPS, rate=1e-2, trainable=nnx.LoRAParam)

# %% [markdown]
# ## The engine
#
# All programs are compiled now, one for each number of tokens in `step_sizes`
# (here one, to be quick: a step of few tokens runs 64 all the same); none is
# compiled later, whatever comes. Keys and values lie in pages of
# `page_size` tokens. The defaults of `EngineConfig` are for larger models.

# %%
engine = jc.Engine(
  model,
  tokenizer,
  adapters={"contrary": contrary},
  max_length=512,
  max_sequences=8,
  step_tokens=64,
  step_sizes=(64,),
  page_size=16,
  kv_gib=0.01,
  seed=0,
  say=print,
)

# %%
prompts = ["Simple is", "Errors should", "Beautiful is", "Now is"]
for prompt, answer in zip(
  prompts, engine.generate(prompts, temperature=0, max_tokens=30), strict=True
):
  print(prompt + answer.text)

# %% [markdown]
# An adapter is named with the request. Requests with different adapters, and
# with none, run in the same steps.

# %%
answers = engine.generate(
  prompts, temperature=0, max_tokens=30, adapter="contrary"
)
for prompt, answer in zip(prompts, answers, strict=True):
  print(prompt + answer.text)

# %% [markdown]
# Several continuations of a prompt, each with its own draws. A seed gives the
# same texts whatever else runs.

# %%
params = jc.SamplingParams(
  n=4, temperature=1.5, top_p=0.95, seed=1, max_tokens=12, stop=("\n",)
)
again = [engine.generate("Although", params)[0] for _ in range(2)]
for completion in again[0].completions:
  print(repr(completion.text), completion.finish_reason)
assert again[0].completions == again[1].completions

# %% [markdown]
# As a stream, step by step; closing it early cancels the rest.

# %%
for event in engine.stream("There should", temperature=0, max_tokens=30):
  print(event.text, end="|")

# %% [markdown]
# ## Equal beginnings are computed once
#
# Each of these prompts begins as the one before and goes on. A full page whose
# tokens, adapter and everything before are the same is found by its hash and
# used again; here prompts come one after the other, but they may as well run at
# the same time.

# %%
import dataclasses

before = dataclasses.replace(engine.core.stats)
for number in (4, 8, 12):
  prompt = "\n".join(ZEN.splitlines()[: number + 2])
  engine.generate(prompt, temperature=0, max_tokens=1)
  now = engine.core.stats
  print(
    f"{len(engine.encode(prompt))} tokens: "
    f"{now.cached_tokens - before.cached_tokens} known, "
    f"{now.prompt_tokens - before.prompt_tokens} computed"
  )
  before = dataclasses.replace(now)

# %% [markdown]
# ## How sure it is
#
# `logprobs=3` reports the probability of each token and of the three likeliest,
# by the model alone, before temperature and the rest. Orange is what the model
# chose, grey what it thought of beside that. Two lines of the Zen begin so.

# %%
import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"


def draw_probabilities(axes, completion):
  """A bar a token, the others above it."""
  for at, entry in enumerate(completion.logprobs):
    bottom = np.exp(entry.logprob)
    axes.bar(at, bottom, color=ORANGE, width=0.9)
    for token, value in entry.top:
      if token != entry.token:
        height = np.exp(value)
        axes.bar(at, height, bottom=bottom, color=GREY, width=0.9, ec="white")
        bottom += height
  names = [tokenizer.decode([token]) for token in completion.tokens]
  axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
  axes.set(ylabel="probability", ylim=(0, 1.02))


figure, axes = plt.subplots(figsize=(9, 3))
[answer] = engine.generate(
  "If the implementation is", logprobs=3, temperature=0, max_tokens=24
)
draw_probabilities(axes, answer.completions[0])
axes.set_title("If the implementation is ...", loc="left")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## A text of a form
#
# The model has never seen JSON. With a guide only tokens can be drawn that the
# schema allows, so what it writes is valid anyway. `regex`, `choice` and
# `json_object` are the other guides.

# %%
import json

if importlib.util.find_spec("llguidance"):
  schema = {
    "type": "object",
    "properties": {
      "better": {"enum": ["beautiful", "ugly"]},
      "lines": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["better", "lines"],
    "additionalProperties": False,
  }
  [answer] = engine.generate("In short:", guide={"json": schema}, seed=0)
  print(json.loads(answer.text))
else:
  print("llguidance is not installed here: pip install 'jaxchunk[serve]'")

# %% [markdown]
# ## What a step does
#
# A step is one row of tokens of many sequences: each that is being continued
# has one in it, what is left goes to prompts, by parts, of at most
# `prompts_at_once` prompts (4). Below, six short requests run when two long
# prompts arrive, in step 10. The short ones go on in every step; the first long
# prompt gets the room that is left. The second begins like it, and finds most
# of its pages there when its turn comes.
#
# A step is planned before the tokens of the one before are known; a sequence
# whose end is learnt a step late runs once for nothing.

# %%
from matplotlib.colors import LogNorm

from jaxchunk.inference.core import Request


def watch(core, arrivals):
  """Runs requests, each from its step on; what ran in which step."""
  plans, plan = [], core.scheduler.schedule

  def schedule():
    plans.append(plan())
    return plans[-1]

  core.scheduler.schedule = schedule
  try:
    number = 0
    while arrivals or core.has_work:
      for request in arrivals.pop(number, ()):
        core.add(request)
      core.step()
      number += 1
  finally:
    core.scheduler.schedule = plan
  return plans


def make_request(name, prompt, tokens):
  """Greedy, and of a fixed number of tokens."""
  params = jc.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
  return Request(request_id=name, prompt=engine.encode(prompt), params=params)


def draw_steps(axes, plans, names):
  """A row a sequence, a column a step."""
  ran = np.full((len(names), len(plans)), np.nan)
  for step, plan in enumerate(plans):
    for work in plan.works:
      ran[names.index(work.sequence.request_id), step] = work.count
    for sequence, known in plan.admitted:
      row = names.index(sequence.request_id)
      if known:
        axes.text(step - 0.7, row, f"{known} known", ha="right", va="center")
  image = axes.imshow(ran, aspect="auto", cmap="viridis_r", norm=LogNorm(1, 64))
  for row, step in zip(*np.nonzero(ran > 1), strict=True):
    axes.text(
      step,
      row,
      f"{ran[row, step]:.0f}",
      color="white" if ran[row, step] > 8 else "black",
      ha="center",
      va="center",
      fontsize=7,
    )
  axes.set_yticks(range(len(names)), names)
  axes.set(xlabel="step")
  ticks = [1, 2, 4, 8, 16, 32, 64]
  bar = axes.figure.colorbar(image, ax=axes, label="tokens", ticks=ticks)
  bar.ax.set_yticklabels([str(tick) for tick in ticks])
  bar.ax.minorticks_off()


short = [make_request(f"short {n}", LINES[n], 12 + 4 * n) for n in range(6)]
long = "\n".join([*LINES, *CONTRARY])
late = [
  make_request("long 1", long, 12),
  make_request("long 2", long + "\n" + LINES[0], 12),
]
names = [request.request_id for request in (*short, *late)]
plans = watch(engine.core, {0: short, 10: late})
figure, axes = plt.subplots(figsize=(11, 3.6))
draw_steps(axes, plans, names)
axes.set_title("Tokens that each sequence ran in each step", loc="left")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Two schedulers on a computed clock
#
# Whose turn it is can be studied without a device: the same engine core, and a
# clock that adds up what steps would cost. `StallFree` lets a request begin as
# soon as there are pages for its prompt. When pages run out later, the last one
# loses its own and has to start again, and its reader waits. `PastFuture`
# guesses lengths from those of the past and lets a request begin only if all
# will have pages to their end: it begins later and is not interrupted.

# %%
from jaxchunk.inference.cost import LinearCost
from jaxchunk.inference.scheduler import SCHEDULERS, Limits
from jaxchunk.inference.simulate import Arrival, simulate

# About an 8B in bf16 on an H100.
COST = LinearCost(step=5.5e-3, token=4e-5, key=1e-9)
LIMITS = Limits(
  tokens=512, sequences=128, prompts=4, shapes=(1, 8, 64, 128, 256, 512)
)


def make_trace(requests=200, rate=60.0):
  """Requests at random times that ask for more than they will get."""
  rng = np.random.default_rng(0)
  times = np.cumsum(rng.exponential(1 / rate, requests))
  trace = []
  for time in times:
    length = int(np.clip(rng.lognormal(5, 1), 8, 2000))
    prompt = tuple(rng.integers(1, 32000, length).tolist())
    tokens = int(np.clip(rng.lognormal(5, 0.8), 4, 1000))
    trace.append(Arrival(float(time), prompt, tokens, 1000))
  return trace


trace = make_trace()
simulations = {
  name: simulate(
    trace,
    scheduler=name,
    limits=LIMITS,
    num_pages=200,
    page_size=64,
    cost=COST,
    max_length=4096,
  )
  for name in SCHEDULERS
}
for name, simulation in simulations.items():
  figures = simulation.figures()
  print(
    f"{name}: {figures['tokens_per_second']:,.0f} tokens a second, "
    f"{figures['preemptions']} times pages taken away"
  )


# %%
def draw_sorted(axes, simulations, seconds, title):
  """Each request's seconds, in order."""
  for (name, simulation), colour in zip(
    simulations.items(), (ORANGE, BLUE), strict=True
  ):
    values = np.sort([seconds(one) for one in simulation.served])
    share = np.arange(1, len(values) + 1) / len(values)
    axes.step(share, values, color=colour, label=name, lw=2)
  axes.set(xlabel="share of the requests", ylabel="seconds")
  axes.set_title(title, loc="left")
  axes.grid(alpha=0.25)
  axes.legend(frameon=False)


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
draw_sorted(left, simulations, lambda one: one.first, "To the first token")
draw_sorted(
  right,
  simulations,
  lambda one: max(one.between, default=0.0),
  "The longest wait inside of a text",
)
right.set_yscale("log")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Behind HTTP
#
# A folder of Hugging Face with its adapters, served by a process of its own, as
# `scripts/serve.py` does:
#
# ```bash
# python scripts/serve.py --model=served --adapter=contrary=served/contrary
# ```
#
# It listens on this machine alone, at a port that is free.

# %%
from jaxchunk.interop.peft import save_peft

jc.save_hf(model, "served", tokenizer=tokenizer, overwrite=True)
save_peft(contrary, "served/contrary", base="served")

SERVER = """
import asyncio
from jaxchunk.inference.engine import EngineConfig
from jaxchunk.inference.server.load import load_served
from jaxchunk.inference.server.main import serve

config = EngineConfig(
  max_length=512, max_sequences=4, step_tokens=16, step_sizes=(16,), kv_gib=0.01
)
served = load_served(
  model="served", adapters={"contrary": "served/contrary"}, config=config
)
ready = lambda address: print(address, flush=True)
assert asyncio.run(serve(served, port=0, ready=ready))
"""


@contextlib.contextmanager
def server():
  """Its address, while it runs."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  process = subprocess.Popen(
    [sys.executable, "-c", SERVER],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    try:
      address = process.stdout.readline().strip()
      if not address:
        raise RuntimeError("the server did not start; see above")
      yield address
    finally:
      process.terminate()  # It finishes what it has begun.
      process.wait(60)
  print(f"stopped, exit code {process.returncode}")


# %% [markdown]
# Any client of OpenAI's interface will do.

# %%
import urllib.request


def ask(address, **body):
  """A completion, by what comes with Python."""
  request = urllib.request.Request(
    f"{address}/v1/completions",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
  )
  with urllib.request.urlopen(request, timeout=60) as answer:
    return json.load(answer)


def talk(address):
  """By OpenAI's client, if it is there."""
  if importlib.util.find_spec("openai") is None:
    body = {"prompt": "Simple is", "temperature": 0, "max_tokens": 30}
    for name in ("served", "contrary"):
      print(ask(address, model=name, **body)["choices"][0]["text"])
    return
  from openai import OpenAI

  with OpenAI(base_url=f"{address}/v1", api_key="none") as client:
    print([one.id for one in client.models.list()])
    for name in ("served", "contrary"):
      with client.completions.create(
        model=name,
        prompt="Simple is",
        temperature=0,
        max_tokens=30,
        stream=True,
      ) as pieces:
        print(name, *(piece.choices[0].text for piece in pieces), sep="|")


with server() as address:
  talk(address)
  with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
    for line in answer.read().decode().splitlines():
      if line.startswith("jaxchunk_requests_total"):
        print(line)
