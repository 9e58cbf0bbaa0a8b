"""README and docs: code runs, links lead somewhere, names and errors exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
  [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
)
# Documents whose blocks stand alone and run in seconds; others only compile.
QUICK = ("getting_started", "configs")
every_document = pytest.mark.parametrize(
  "document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix()
)


def python_blocks():
  """Every block once, by the first document that has it."""
  blocks = {}
  for document in DOCUMENTS:
    text = document.read_text(encoding="utf-8")
    for n, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.S)):
      blocks.setdefault(code, f"{document.stem}-{n}")
  return [pytest.param(code, id=name) for code, name in blocks.items()]


@pytest.mark.parametrize("code", python_blocks())
def test_python_compiles_or_runs(code, request):
  code = compile(code, request.node.callspec.id, "exec")
  if request.node.callspec.id.rpartition("-")[0] not in QUICK:
    return
  names = {"__name__": "a_document"}
  exec(code, names)
  if "get_config" in names:
    from jaxchunk.training.config import validate

    validate(names["get_config"]())


@pytest.mark.fast
@every_document
def test_relative_links_resolve(document):
  text = document.read_text(encoding="utf-8")
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if "://" not in target and not target.startswith("#"):
      path = document.parent / target.partition("#")[0]
      assert path.exists(), f"{document.name} links to {target}"


@pytest.mark.fast
@every_document
def test_files_named_exist(document):
  text = document.read_text(encoding="utf-8")
  folders = "|".join(("benchmarks", "colab", "configs", "docs", "jaxchunk"))
  found = re.findall(
    rf"(?<![\w/.-])((?:{folders}|kernels|scripts|tests)/[\w/]+\.\w+)", text
  )
  # NAME stands for what the reader adds.
  for name in {n for n in found if "NAME" not in n}:
    assert (ROOT / name).exists(), f"{document.name} names {name}"


@pytest.mark.fast
def test_messages_are_those_of_the_code():
  """Each text of the first table is raised somewhere, up to its values."""
  source = "".join(
    path.read_text(encoding="utf-8")
    for folder in ("jaxchunk", "kernels", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
  )
  # Texts that go on in a second literal.
  source = re.sub(r'"\s+f?"', "", source)
  text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
  messages = re.findall(r"^\| `([^`]+)` \|", text, re.M)
  assert len(messages) > 10
  for message in messages:
    for part in message.split("…"):
      assert part.strip() in source, part


@pytest.mark.fast
def test_every_dependency_has_its_line():
  import tomllib

  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = project["optional-dependencies"]
  needed = [*project["dependencies"], *extras["test"], *extras["docs"]]
  text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
  for requirement in needed:
    name = re.match(r"[\w-]+", requirement)[0]
    assert name in text, f"{name} is not in docs/dependencies.md"
