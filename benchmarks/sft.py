"""Fine-tuning on conversations: the same losses as transformers and PEFT?

  python benchmarks/sft.py [--ways=full,lora,dora,qlora] [--steps=20]
    [--seed=0]

The same small random model of transformers, the same conversations in the same
steps, AdamW with the same settings, fp32. Here `training.loop` runs by chunks,
with its own reading of the chat template; there a plain loop over whole
conversations, tokenised and masked by transformers, adapters by PEFT. Prints
the largest difference of the loss of any step, whether tokens and masks are
the same, and the first and last loss. For "qlora" the matrices are in nf4
here, and there what these codes mean, in fp32.
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
from absl import app, flags, logging
from common import report, rounded

_WAYS = flags.DEFINE_list(
  "ways", ["full", "lora", "dora", "qlora"], "What to train."
)
_STEPS = flags.DEFINE_integer("steps", 20, "Updates.", 2)
_SEED = flags.DEFINE_integer("seed", 0, "Of data, weights and adapters.")
_FAMILY = flags.DEFINE_string("family", "Qwen3", "Of the model.")
_CHUNK = flags.DEFINE_integer("chunk_size", 256, "C.", 1)

_TOLERANCE = 1e-4
_VOCAB = 1024


def make(folder: pathlib.Path) -> None:
  """Data, tokenizer and model, as people have them."""
  import sft_data
  import torch
  import transformers

  sft_data.write(folder, count=400, seed=_SEED.value, vocab=_VOCAB)
  torch.manual_seed(_SEED.value)
  config = getattr(transformers, f"{_FAMILY.value}Config")(
    vocab_size=_VOCAB,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
  )
  make_model = getattr(transformers, f"{_FAMILY.value}ForCausalLM")
  make_model(config).save_pretrained(folder / "model")


def lora_of(way: str) -> Any:
  """The adapters of a way to train."""
  from jaxchunk.models.lora import LoRA

  if way == "full":
    return None
  return LoRA(rank=8, alpha=16.0, dora=way == "dora")


def ours(way: str, folder: pathlib.Path) -> dict[str, Any]:
  """Trains here; losses, rates and documents of each step."""
  import jaxchunk as jc
  from jaxchunk.data.config import DataConfig
  from jaxchunk.interop.hugging_face import load_config
  from jaxchunk.interop.peft import save_peft
  from jaxchunk.models.adapters import add_lora
  from jaxchunk.models.quantized import Quantization
  from jaxchunk.training import loop, metrics
  from jaxchunk.training.config import Config, TrainConfig

  lora = lora_of(way)
  quantization = Quantization() if way == "qlora" else None
  base = jc.load_hf(folder / "model", quantization=quantization)
  jc.save_hf(base, folder / f"base-{way}", like=folder / "model")
  if lora is not None:
    save_peft(add_lora(base, lora, seed=_SEED.value), folder / way)
  config = Config(
    model=load_config(folder / "model", lora=lora, quantization=quantization),
    data=DataConfig(
      source=str(folder / "talk.jsonl"),
      format="messages",
      tokenizer=str(folder / "tokenizer"),
      batch_tokens=4096,
      heldout_fraction=0.0,
      seed=_SEED.value,
      cache_dir=str(folder / "cache"),
    ),
    train=TrainConfig(
      init_from=str(folder / "model"),
      num_steps=_STEPS.value,
      seed=_SEED.value,
      chunk_size=_CHUNK.value,
      learning_rate=1e-3,
      warmup_steps=2,
      eval_every=0,
      log_documents=True,
    ),
  )
  workdir = folder / f"run-{way}"
  loop.train(config, workdir)
  lines = list(metrics.read(workdir))
  documents = list(metrics.read(workdir, metrics.DOCUMENTS_NAME))
  return {
    "losses": [line["loss"] for line in lines],
    "rates": [line["learning_rate"] for line in lines],
    "chunks": [line["num_chunks"] for line in lines],
    "documents": [line["documents"] for line in documents],
    "train": config.train,
    "data": config.data,
  }


def theirs(
  way: str, folder: pathlib.Path, run: dict[str, Any]
) -> tuple[list[float], bool]:
  """Trains there; the losses, and whether tokens and masks were the same."""
  import torch
  import transformers

  from jaxchunk.data.corpus import open_corpus, read_examples

  records = [
    json.loads(line)
    for line in (folder / "talk.jsonl").read_text().splitlines()
  ]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
  model: Any = transformers.AutoModelForCausalLM.from_pretrained(
    folder / f"base-{way}", attn_implementation="sdpa"
  )
  if way != "full":
    import peft

    model = peft.PeftModel.from_pretrained(
      model, folder / way, is_trainable=True
    )
  train = run["train"]
  groups: dict[bool, list[Any]] = {True: [], False: []}
  for name, p in model.named_parameters():
    if p.requires_grad:
      embedding = "embed_tokens" in name or "lm_head" in name
      groups[p.ndim == 2 and not embedding].append(p)
  optimizer = torch.optim.AdamW(
    [
      {"params": groups[True], "weight_decay": train.weight_decay},
      {"params": groups[False], "weight_decay": 0.0},
    ],
    betas=(train.beta1, train.beta2),
    eps=train.epsilon,
  )
  trained = [p for group in groups.values() for p in group]
  corpus = open_corpus(run["data"])
  losses, same = [], True
  for rate, documents in zip(run["rates"], run["documents"], strict=True):
    rows = []
    for number in documents:
      encoded = tokenizer.apply_chat_template(
        records[number]["messages"],
        return_dict=True,
        return_assistant_tokens_mask=True,
      )
      ids = np.asarray(encoded["input_ids"])
      mask = np.asarray(encoded["assistant_masks"], bool)
      example = read_examples(corpus, [number])[0]
      same &= np.array_equal(ids[:-1], example.tokens)
      same &= np.array_equal(mask[1:], example.weights > 0)
      rows.append((ids, mask))
    count = sum(int(mask[1:].sum()) for _, mask in rows)
    total = 0.0
    for ids, mask in rows:
      row = torch.from_numpy(ids)[None]
      labels = torch.where(torch.from_numpy(mask)[None], row, -100)
      loss = model(row, labels=labels, num_items_in_batch=count).loss
      loss.backward()
      total += loss.item()
    torch.nn.utils.clip_grad_norm_(trained, train.clip_norm)
    for group in optimizer.param_groups:
      group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    losses.append(total)
  return losses, bool(same)


def main(_: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  figures = {}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    make(folder)
    for way in _WAYS.value:
      run = ours(way, folder)
      want, same = theirs(way, folder, run)
      gap = np.abs(np.asarray(run["losses"]) - np.asarray(want))
      figures[way] = {
        "largest_difference": float(gap.max()),
        "same_tokens_and_masks": same,
        "first_loss": run["losses"][0],
        "last_loss": run["losses"][-1],
        "chunks_a_step": sum(run["chunks"]) / len(run["chunks"]),
        "documents_a_step": sum(map(len, run["documents"])) / len(want),
      }
      print(f"{way}: {rounded(figures[way])}", file=sys.stderr, flush=True)
  worst = max(f["largest_difference"] for f in figures.values())
  ok = worst <= _TOLERANCE and all(
    f["same_tokens_and_masks"] for f in figures.values()
  )
  report("sft", steps=_STEPS.value, ways=rounded(figures, 6), ok=ok)
  sys.exit(not ok)


if __name__ == "__main__":
  app.run(main)
