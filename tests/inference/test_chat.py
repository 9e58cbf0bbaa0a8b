"""Questions laid out by a template, and where answers end."""

import json

import pytest

from jaxchunk.data.bpe import train_bpe
from jaxchunk.data.chat import CHATML, ChatTemplate, load_template
from jaxchunk.inference.chat import Chat

pytestmark = pytest.mark.fast


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
  """A tokenizer whose turns end with a token that is not its EOS."""
  specials = ("<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
  definition = train_bpe(300, ["some text of some kind"], specials)
  (tmp_path / "tokenizer.json").write_text(definition)
  names = {"eos_token": "<|eos|>", "pad_token": "<|pad|>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
  return tmp_path


def test_the_end_of_a_turn_is_that_of_the_template(folder):
  ChatTemplate(CHATML).save(folder)
  chat = Chat.load(folder)
  end = chat.tokenizer.encode("<|im_end|>").tolist()
  assert chat.end_of_turn() == frozenset(end) and len(end) == 1
  text = chat.prompt("Who?", system="Be brief.")
  assert text == (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
  )
  ids = chat.tokenizer.encode(text)
  assert (ids == end[0]).sum() == 2


def test_a_template_without_special_tokens_ends_nowhere(folder):
  plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
  ChatTemplate(plain).save(folder)
  assert Chat.load(folder).end_of_turn() == frozenset()


def test_a_saved_template_is_found_again_with_its_tokens(folder):
  tokens = {"bos_token": "<|im_start|>", "eos_token": "other"}
  ChatTemplate("{{ bos_token }}{{ eos_token }}", tokens).save(folder)
  again = load_template(None, str(folder))
  # What the tokenizer says of its own tokens stands.
  assert again.tokens["eos_token"] == "<|eos|>"
  assert again.render([]) == "<|im_start|><|eos|>"


def test_a_tokenizer_without_a_template_is_named(folder):
  with pytest.raises(ValueError, match="has no chat template"):
    Chat.load(folder)
