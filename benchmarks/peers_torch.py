"""torch and what is built on it as contestants of `peers.py`.

Needs no jax, so that an interpreter of another environment can run it. The
two contestants of "own code" follow published algorithms: StreamBP
(arXiv 2506.03077) and the tiling of ALST (arXiv 2506.13996).
"""

import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from peers_job import (
  BETAS,
  DECAY,
  EPSILON,
  Job,
  adapters_path,
  alpha_of,
  read_documents,
  watch_resident,
  weights_path,
)
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# What a contestant makes of a model: the sum of the losses of a document's
# targets, after its gradients were added.
Backward = Callable[[torch.Tensor], float]


def device_of(job: Job) -> str:
  """Large shapes are for a GPU."""
  return "cuda" if torch.cuda.is_available() and job.shape != "small" else "cpu"


def build(job: Job, folder: pathlib.Path, attention: str = "sdpa") -> Any:
  """The Llama of transformers with the parent's weights, or random ones."""
  sizes = job.sizes
  config = transformers.LlamaConfig(
    vocab_size=sizes.vocab,
    hidden_size=sizes.d_model,
    num_hidden_layers=sizes.layers,
    num_attention_heads=sizes.heads,
    num_key_value_heads=sizes.kv_heads,
    head_dim=sizes.head_dim,
    intermediate_size=sizes.d_ff,
    rms_norm_eps=1e-6,
    tie_word_embeddings=sizes.tied,
    max_position_embeddings=1 << 22,
    attn_implementation=attention,
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
  )
  if job.threads:
    torch.set_num_threads(job.threads)
  torch.manual_seed(0)
  torch.set_default_dtype(getattr(torch, job.dtype))
  with torch.device(device_of(job)):
    model = transformers.LlamaForCausalLM(config)
  torch.set_default_dtype(torch.float32)
  path = weights_path(folder, job.shape)
  if path.exists():
    with np.load(path) as arrays:
      state = {name: torch.from_numpy(arrays[name]) for name in arrays}
    # A tied head is not in the file.
    missing, extra = model.load_state_dict(state, strict=False)
    if extra or set(missing) - {"lm_head.weight"}:
      raise ValueError(f"weights do not fit: {missing}, {extra}")
  if job.lora:
    model = adapted(model, job, adapters_path(folder, job))
  return model.train()


def adapted(model: Any, job: Job, path: pathlib.Path) -> Any:
  """With PEFT's adapters, the parent's or random ones."""
  import peft

  if path.exists():
    return peft.PeftModel.from_pretrained(model, path, is_trainable=True)
  config = peft.LoraConfig(
    r=job.lora,
    lora_alpha=alpha_of(job),
    target_modules="all-linear",
    task_type="CAUSAL_LM",
  )
  return peft.get_peft_model(model, config)


def trained(model: Any) -> list[tuple[str, Any]]:
  """Parameters that get gradients, by name."""
  return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def adamw(model: Any, job: Job) -> torch.optim.Optimizer:
  """AdamW; the matrices of layers decay, as in `jaxchunk.training`."""
  matrices, others = [], []
  for name, p in trained(model):
    (matrices if p.ndim == 2 and ".layers." in name else others).append(p)
  groups = [
    {"params": matrices, "weight_decay": DECAY},
    {"params": others, "weight_decay": 0.0},
  ]
  return torch.optim.AdamW(
    groups, lr=job.learning_rate, betas=BETAS, eps=EPSILON
  )


def plain(model: Any, job: Job) -> Backward:
  """Per-layer gradient checkpointing, and logits of the whole document."""
  model.gradient_checkpointing_enable()

  def backward(row: torch.Tensor) -> float:
    logits = model(input_ids=row[:, :-1]).logits
    loss = functional.cross_entropy(logits[0], row[0, 1:], reduction="sum")
    loss.backward()
    return loss.item()

  return backward


def head_tiles(
  model: Any,
  x: torch.Tensor,
  targets: torch.Tensor,
  tile: int,
  norm: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> tuple[float, torch.Tensor]:
  """The summed loss by tiles of tokens, and its gradient by x `[1,T,D]`.

  Each tile's logits are gone before the next; the head's gradient is added.
  """
  total, grads = 0.0, []
  for part, wanted in zip(
    x.detach().split(tile, 1), targets.split(tile), strict=True
  ):
    mine = part.detach().requires_grad_()
    logits = model.lm_head(norm(mine))[0]
    loss = functional.cross_entropy(logits, wanted, reduction="sum")
    loss.backward()
    total += loss.item()
    grads.append(mine.grad)
  return total, torch.cat(grads, 1)


class TiledMLP(torch.nn.Module):
  """An MLP over tiles of tokens, each computed again in its backward pass."""

  def __init__(self, mlp: torch.nn.Module, tile: int):
    super().__init__()
    self.mlp = mlp
    self.tile = tile

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """`[1,T,D]` to the same."""
    tiles = x.split(self.tile, 1)
    if not torch.is_grad_enabled():
      return torch.cat([self.mlp(t) for t in tiles], 1)
    again = [checkpoint(self.mlp, t, use_reentrant=False) for t in tiles]
    return torch.cat(again, 1)


def alst_style(model: Any, job: Job) -> Backward:
  """Checkpointed layers, a tiled MLP and a tiled loss."""
  model.gradient_checkpointing_enable(
    gradient_checkpointing_kwargs={"use_reentrant": True}
  )
  model.enable_input_require_grads()
  for layer in model.model.layers:
    layer.mlp = TiledMLP(layer.mlp, job.chunk_size)

  def backward(row: torch.Tensor) -> float:
    h = model.model(input_ids=row[:, :-1]).last_hidden_state
    loss, dh = head_tiles(model, h, row[0, 1:], job.chunk_size)
    h.backward(dh)
    return loss

  return backward


def heads(x: torch.Tensor, linear: Any, width: int) -> torch.Tensor:
  """A projection, `[1,T,D]` to `[1,heads,T,H]`."""
  return linear(x).unflatten(-1, (-1, width)).transpose(1, 2)


def turn(
  x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
  """Rotary embedding of `[1,heads,T,H]`."""
  a, b = x.chunk(2, -1)
  cos, sin = (table[:, None] for table in rope)
  return x * cos + torch.cat((-b, a), -1) * sin


class Streamed:
  """A layer over chunks of queries, with keys and values of all tokens."""

  def __init__(self, layer: Any, tile: int):
    self.layer = layer
    self.width = layer.self_attn.head_dim
    self.tile = tile

  def keys(
    self, x: torch.Tensor, rope: Any
  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of tokens, `[1,K,T,H]`."""
    attention = self.layer.self_attn
    h = self.layer.input_layernorm(x)
    k = turn(heads(h, attention.k_proj, self.width), rope)
    return k, heads(h, attention.v_proj, self.width)

  def queries(
    self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Any
  ) -> torch.Tensor:
    """The layer's output for the last tokens of k and v, from their input."""
    layer, attention = self.layer, self.layer.self_attn
    q = heads(layer.input_layernorm(x), attention.q_proj, self.width)
    q = turn(q, rope)
    group = q.shape[1] // k.shape[1]
    k, v = (a.repeat_interleave(group, 1) for a in (k, v))
    o = attend_last(q, k, v)
    x = x + attention.o_proj(o.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))

  def parts(self, length: int) -> list[slice]:
    """Of the tokens."""
    starts = range(0, length, self.tile)
    return [slice(i, min(i + self.tile, length)) for i in starts]


def attend_last(
  q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
  """Causal attention of the last T of S tokens."""
  T, S = q.shape[2], k.shape[2]
  sdpa = functional.scaled_dot_product_attention
  if T == S:
    return sdpa(q, k, v, is_causal=True)
  if q.is_cuda:
    from torch.nn.attention.bias import causal_lower_right

    return sdpa(q, k, v, attn_mask=causal_lower_right(T, S))
  seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
  return sdpa(q, k, v, attn_mask=seen)


class StreamLayer(torch.autograd.Function):
  """Keeps a layer's input; the backward pass runs chunk by chunk."""

  @staticmethod
  def forward(ctx: Any, x: torch.Tensor, streamed: Streamed, rope: Any) -> Any:
    """The layer's output."""
    ctx.save_for_backward(x)
    ctx.streamed, ctx.rope = streamed, rope
    k, v = streamed.keys(x, rope)
    out = torch.empty_like(x)
    for part in streamed.parts(x.shape[1]):
      at = tuple(table[:, part] for table in rope)
      seen = slice(0, part.stop)
      out[:, part] = streamed.queries(
        x[:, part], k[:, :, seen], v[:, :, seen], at
      )
    return out

  @staticmethod
  def backward(ctx: Any, dout: torch.Tensor) -> Any:
    """Adds the parameters' gradients and returns the input's."""
    (x,) = ctx.saved_tensors
    streamed, rope = ctx.streamed, ctx.rope
    k, v = streamed.keys(x, rope)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dx = torch.empty_like(x)
    parts = streamed.parts(x.shape[1])
    for part in parts:
      at = tuple(table[:, part] for table in rope)
      seen = slice(0, part.stop)
      mine, keys, values = (
        a.detach().requires_grad_()
        for a in (x[:, part], k[:, :, seen], v[:, :, seen])
      )
      with torch.enable_grad():
        out = streamed.queries(mine, keys, values, at)
      out.backward(dout[:, part])
      dx[:, part] = mine.grad
      dk[:, :, seen] += keys.grad
      dv[:, :, seen] += values.grad
    for part in parts:
      at = tuple(table[:, part] for table in rope)
      mine = x[:, part].detach().requires_grad_()
      with torch.enable_grad():
        both = streamed.keys(mine, at)
      torch.autograd.backward(both, (dk[:, :, part], dv[:, :, part]))
      dx[:, part] += mine.grad
    return dx, None, None


def stream_style(model: Any, job: Job) -> Backward:
  """StreamBP: layers' inputs are kept, chunks of each computed again."""
  layers = [Streamed(layer, job.chunk_size) for layer in model.model.layers]

  def backward(row: torch.Tensor) -> float:
    base = model.model
    x = base.embed_tokens(row[:, :-1])
    rope = base.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
    for streamed in layers:
      x = StreamLayer.apply(x, streamed, rope)
    total, dx = head_tiles(model, x, row[0, 1:], job.chunk_size, base.norm)
    x.backward(dx)
    return total

  return backward


def stream_package(model: Any, job: Job) -> Backward:
  """The authors' own package, in the environment that it needs."""
  import streambp

  # Its gradients are divided by the targets so far: once, at the end.
  wrapped = streambp.StreamModel(
    model,
    gradient_accumulation_steps=1 << 30,
    logits_chunk_size=job.chunk_size,
    checkpoint_chunk_size=job.chunk_size,
    stream_checkpoint=True,
  )
  wrapped.gradient_checkpointing_enable()
  wrapped.train()

  def backward(row: torch.Tensor) -> float:
    out = wrapped(
      input_ids=row,
      labels=row,
      # Without it, chunks after the first see the wrong keys.
      attention_mask=torch.ones_like(row),
      use_cache=False,
      return_dict=True,
    )
    # Its mean is over the tokens, of which the first is no target.
    return out.loss.item() * row.shape[1]

  return backward


WAYS: dict[str, Callable[[Any, Job], Backward]] = {
  "transformers, checkpointing": plain,
  "StreamBP, streambp package": stream_package,
  "StreamBP-style (own code)": stream_style,
  "ALST-style (own code)": alst_style,
}


Step = Callable[[list[torch.Tensor]], float]


def make_step(
  model: Any, backward: Backward, optimizer: torch.optim.Optimizer | None
) -> Step:
  """A step over documents, to the mean loss before the update."""

  def step(rows: list[torch.Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    weight = sum(row.shape[1] - 1 for row in rows)
    total = sum(backward(row) for row in rows)
    if optimizer is not None:
      for _, p in trained(model):
        p.grad /= weight
      optimizer.step()
    return total / weight

  return step


def warm(
  model: Any,
  step: Step,
  optimizer: torch.optim.Optimizer | None,
  row: torch.Tensor,
) -> None:
  """Starts libraries and makes the optimizer's moments; nothing is learnt."""
  before = {k: v.clone() for k, v in model.state_dict().items()}
  step([row[:, :17]])
  model.zero_grad(set_to_none=True)
  model.load_state_dict(before)
  if optimizer is not None:
    for moments in optimizer.state.values():
      for moment in moments.values():
        moment.zero_()


def library() -> str:
  """What this interpreter has, which need not be the parent's."""
  return f"torch {torch.__version__}, transformers {transformers.__version__}"


def synchronize() -> None:
  """Waits for a GPU, if there is one."""
  if torch.cuda.is_available():
    torch.cuda.synchronize()


@contextlib.contextmanager
def watch(job: Job) -> Any:
  """Bytes above those at the beginning: resident, or the GPU's allocator's."""
  with watch_resident() as growth:
    if device_of(job) == "cuda":
      torch.cuda.reset_peak_memory_stats()
      before = torch.cuda.memory_allocated()
    yield growth
  if device_of(job) == "cuda":
    growth.grown = torch.cuda.max_memory_allocated() - before


def run(job: Job, folder: pathlib.Path) -> dict[str, Any]:
  """Trains and measures; see `peers.py` for the figures."""
  model = build(job, folder)
  device = device_of(job)
  optimizer = adamw(model, job) if job.update else None
  step = make_step(model, WAYS[job.contestant](model, job), optimizer)
  rows = [
    [torch.as_tensor(d, device=device, dtype=torch.long)[None] for d in docs]
    for docs in read_documents(folder, job)
  ]
  warm(model, step, optimizer, rows[0][0])
  losses, seconds = [], []
  with watch(job) as growth:
    for documents in rows:
      start = time.perf_counter()
      losses.append(step(documents))
      synchronize()
      seconds.append(time.perf_counter() - start)
  name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
  return {
    "losses": losses,
    "seconds": seconds,
    "peak_bytes": growth.grown,
    "device": name,
    "library": library(),
  }
