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
# # Exact gradients, chunk by chunk
#
# A sequence is cut into chunks, and one chunk is in memory at a time. The
# gradient is not an approximation: it equals that of the whole sequence to the
# last digits of fp64. This notebook shows why, in pictures, in thirty lines
# of JAX, and in numbers. It needs no accelerator. If jaxchunk is not installed,
# begin with the first cells of `quickstart.ipynb`.

# %%
import dataclasses
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.patches import Rectangle

import jaxchunk as jc

LONGEST = int(os.environ.get("JAXCHUNK_LONGEST", 2**17))  # Tokens, at the end.
BLUE, ORANGE, GREEN = "#56B4E9", "#D55E00", "#009E73"

# %% [markdown]
# ## Where tokens meet
#
# In a decoder, tokens meet in one place only: a query reads the keys and
# values of the tokens before it. Cut the sequence into chunks, and chunk $j$
# needs nothing of an earlier chunk $i$ but its keys and values $KV_i$, which
# are small beside its activations. With $\mathcal L_j$ the loss on chunk $j$,
#
# $$
# \mathcal L = \sum_j \mathcal L_j(\theta, KV_0, \dots, KV_{j-1}), \qquad
# dKV_i = \sum_{j > i} \frac{\partial \mathcal L_j}{\partial KV_i}.
# $$
#
# **Left:** forward, in ascending order, chunk 2 reads a row. **Right:** what is
# owed to the keys and values of chunk 1 is a column. Go *down* from the last
# chunk: when it is chunk 1's turn, chunks 3 and 2 have already added their
# share, and $dKV_1$ is complete.

# %%
N = 4


def draw_blocks(axes, title, lit, colour):
  for row in range(N):
    for column in range(row + 1):
      fill = colour if (row, column) in lit else "#E8E8E8"
      box = Rectangle((column, row), 0.92, 0.92, fc=fill, ec="white")
      axes.add_patch(box)
  axes.set(xlim=(-0.1, N + 0.9), ylim=(N, -0.1), aspect="equal")
  axes.set_xticks(np.arange(N) + 0.46, [f"$KV_{i}$" for i in range(N)])
  axes.set_yticks(np.arange(N) + 0.46, [f"chunk {i}" for i in range(N)])
  axes.tick_params(length=0, labelsize=11)
  axes.spines[:].set_visible(False)
  axes.set_title(title, loc="left")


def arrow(axes, start, stop, label, at):
  style = {"arrowstyle": "-|>", "lw": 2, "color": "black"}
  axes.annotate("", stop, start, arrowprops=style)
  axes.text(*at, label, ha="center", va="center", fontsize=10)


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
row = {(2, 0), (2, 1), (2, 2)}
draw_blocks(left, "Forward: chunk 2 reads a row", row, BLUE)
arrow(left, (4.2, 0.1), (4.2, 3.8), "time", (4.55, 1.95))
draw_blocks(right, "Backward: a column adds up", {(3, 1), (2, 1)}, ORANGE)
right.add_patch(Rectangle((1, 1), 0.92, 0.92, fc=GREEN, ec="white"))
right.text(1.46, 2.46, "adds", ha="center", va="center", color="white")
right.text(1.46, 3.46, "adds", ha="center", va="center", color="white")
right.text(1.46, 1.46, "takes", ha="center", va="center", color="white")
arrow(right, (4.2, 3.8), (4.2, 0.1), "time", (4.55, 1.95))
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The idea in thirty lines
#
# Two layers of attention and a loss. `chunk` runs one chunk on what the earlier
# ones left, and returns its loss and its own keys and values.

# %%
SIZE, WIDTH, LAYERS = 16, 8, 2


def chunk(w, past, x, y):
  """`past` holds [layer, k or v, tokens, width] of each earlier chunk."""
  left = []
  for layer in range(LAYERS):
    q, k, v = (x @ w[layer, n] for n in range(3))
    left.append(jnp.stack([k, v]))
    keys, values = jnp.concatenate([*(p[layer] for p in past), left[-1]], 1)
    seen = jnp.tri(len(x), len(keys), len(keys) - len(x), dtype=bool)
    scores = jnp.where(seen, q @ keys.T / WIDTH**0.5, -jnp.inf)
    x = x + jnp.tanh(jax.nn.softmax(scores) @ values @ w[layer, 3])
  return jnp.sum((x - y) ** 2), jnp.stack(left)


def by_chunks(w, xs, ys, flow=True):
  """The gradient by w, with the activations of one chunk at a time."""
  past = []
  for x, y in zip(xs, ys, strict=True):  # Ascending: keep keys and values.
    past.append(chunk(w, past, x, y)[1])
  owed = [jnp.zeros_like(kv) for kv in past]
  grad = jnp.zeros_like(w)
  for i in reversed(range(len(xs))):  # Descending: run again, and back.
    (loss, _), back = jax.vjp(chunk, w, past[:i], xs[i], ys[i])
    dw, dpast, _, _ = back((jnp.ones_like(loss), owed[i]))
    grad += dw
    if flow:
      owed = [a + b for a, b in zip(owed[:i], dpast, strict=True)]
  return grad


def error(got, want):
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


with jax.enable_x64(True):
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(LAYERS, 4, WIDTH, WIDTH)) / WIDTH**0.5)
  xs, ys = jnp.asarray(rng.normal(size=(2, 4, SIZE, WIDTH)))
  x, y = xs.reshape(-1, WIDTH), ys.reshape(-1, WIDTH)
  whole = jax.grad(lambda w: chunk(w, [], x, y)[0])(w)
  print(f"by chunks                   {error(by_chunks(w, xs, ys), whole):.1e}")
  cut = by_chunks(w, xs, ys, flow=False)
  print(f"gradient cut between chunks {error(cut, whole):.1e}")

# %% [markdown]
# The first number is rounding. The second is what training with truncated
# gradients gets wrong: the flow through $dKV$ is not a detail.
#
# ## The order of work
#
# The library does the same to whole models, in compiled loops. The last $K$
# chunks keep their activations (`live_chunks=K`), so they need not run twice:
# a dial between memory and time.

# %%
from jaxchunk.chunking.chunk_outer import schedule
from jaxchunk.training.schedule import Schedule, draw_schedule

# A chunk costs a tenth more for each chunk before it; backward is twice that.
costs = [[(1 + 0.1 * i, 2 + 0.2 * i) for i in range(8)]]

figure, axes = plt.subplots(2, 1, figsize=(10, 6.4))
for ax, live in zip(axes, (1, 4), strict=True):
  title = f"8 chunks, K = {live}"
  draw_schedule(ax, Schedule(title, [schedule(8, live)], costs, [1.0]))
axes[0].set_xlabel("")
axes[1].set_xlim(axes[0].get_xlim())
axes[1].get_legend().remove()
axes[1].set_title(axes[1].get_title(loc="left"), loc="left", pad=6)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Proof by numbers: gradients
#
# A small Llama-like model in fp64 (grouped-query attention, rotary positions,
# gated MLP), and three documents of 150, 31 and 7 tokens packed into a row.
# Each line is a way to cut; the number is the worst relative error over the
# loss and the gradients of all parameters, against autodiff of the whole row.

# %%
CONFIG = jc.ModelConfig(
  vocab_size=97,
  d_model=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  d_ff=64,
  dtype="float64",
  param_dtype="float64",
)
CUTS = [
  (32, 1, "chunk_outer"),
  (50, 2, "chunk_outer"),
  (32, 1, "layer_outer"),
]

with jax.enable_x64(True):
  model = jc.Transformer(CONFIG, rngs=nnx.Rngs(0))
  segments = np.repeat([1, 2, 3], [150, 31, 7])[None]
  tokens, targets = rng.integers(0, 97, (2, *segments.shape))
  batch = {"tokens": tokens, "targets": targets, "segment_ids": segments}
  want = jax.tree.leaves(jc.full_value_and_grad(model, batch))
  worst = {}
  for size, live, strategy in CUTS:
    got = jc.chunked_value_and_grad(
      model, batch, chunk_size=size, live_chunks=live, strategy=strategy
    )
    name = f"{strategy}, C = {size}, K = {live}"
    worst[name] = max(map(error, jax.tree.leaves(got), want))
    print(f"{name:32} {worst[name]:.1e}")
assert max(worst.values()) < 1e-12

# %% [markdown]
# ## Proof by numbers: memory
#
# The programs are compiled, not run: the compiler says what each needs besides
# parameters and gradients. A whole row with a checkpoint at each layer grows
# with its activations. Chunks grow with keys, values and their gradients alone,
#
# $$ \text{bytes per token} = 2 L K_{kv} H \,(b_{KV} + b_{dKV}), $$
#
# with $L$ layers, $K_{kv}$ key/value heads of width $H$, and $b$ bytes a
# number: the dashed line has that slope.

# %%
from jaxchunk.chunking.memory import state_bytes_per_token

BIG = dataclasses.replace(
  CONFIG,
  d_model=512,
  num_layers=4,
  num_heads=8,
  head_dim=64,
  d_ff=1024,
  dtype="float32",
  param_dtype="float32",
)
shapes = nnx.eval_shape(lambda: jc.Transformer(BIG, rngs=nnx.Rngs(0)))
lengths = [n for n in 2 ** np.arange(11, 22, 2) if n <= LONGEST]


def bytes_by_chunks(length):
  lowered = jc.lower_chunked(
    shapes, capacity=length, chunk_size=1024, strategy="chunk_outer"
  )
  return lowered.compile().memory_analysis().temp_size_in_bytes


def bytes_of_whole_row(length):
  def loss(model, tokens):
    h = model.hidden(tokens, implementation="xla", remat=True)
    return jc.linear_cross_entropy(h, model.unembed, tokens)[0].sum()

  row = jax.ShapeDtypeStruct((1, length), jnp.int32)
  compiled = jax.jit(jax.grad(loss)).lower(shapes, row).compile()
  return compiled.memory_analysis().temp_size_in_bytes


chunks = np.array([bytes_by_chunks(n) for n in lengths])
rows = np.array([bytes_of_whole_row(n) for n in lengths])
slope = state_bytes_per_token(BIG, "chunk_outer")
measured = (chunks[-1] - chunks[-2]) / (lengths[-1] - lengths[-2])
print(f"formula {slope} bytes a token, compiled {measured:.0f}")

figure, axes = plt.subplots(figsize=(7, 4))
axes.plot(lengths, rows / 2**20, "s-", color=ORANGE, label="whole row, remat")
axes.plot(lengths, chunks / 2**20, "o-", color=GREEN, label="chunks of 1,024")
line = chunks[-1] + slope * (np.array(lengths) - lengths[-1])
axes.plot(lengths, line / 2**20, "k--", lw=1, label="slope of KV + dKV")
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
axes.set(xlabel="tokens in the sequence", ylabel="MiB, as compiled")
axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
axes.yaxis.set_major_formatter("{x:.0f}")
axes.grid(alpha=0.25)
axes.legend(frameon=False)
saved = rows[-1] / chunks[-1]
axes.set_title(f"{saved:.1f} x less at {lengths[-1]:,} tokens", loc="left")
plt.show()

# %% [markdown]
# How much is saved depends on the model: the fewer key/value heads beside its
# width, the more. With as many key/value heads as heads it can be nothing;
# `strategy=None` then takes the layer-outer order. The planner's formulas are
# in `jaxchunk.chunking.memory`, and derived in `docs/chunks.md`.
