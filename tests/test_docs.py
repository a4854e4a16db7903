"""What the documentation names is there: paths, options, links; and the site can be built."""

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TOP = ("fedlora", "client", "server", "strategies", "simulations", "adapter", "benchmarks", "docs", "examples",
       "tests", "deploy")
"""Folders of the repository whose paths pages name."""

GENERATED = {"changelog.md", "contributing.md", "security.md", "reference/commands.md", "reference/files.md"}
"""Pages that docs/generate makes, beside those of the API."""

OTHERS = {"--superlink", "--node-config", "--run-config", "--stream", "--no-deps", "--index-url", "--extra-index-url",
          "--constraint", "--editable", "--simulation", "--build-arg", "--gpus"}
"""Options of other programs that pages name by themselves."""

FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"(fedlora-(client|server|simulate|adapter)|(\S*python\S* )?-m benchmarks)\b")


@cache
def options() -> set[str]:
    """Every option of every command."""
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "generate" / "commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.commands()
    assert {"fedlora-client", "fedlora-client budget", "fedlora-server forget", "fedlora-simulate audit"} <= set(found)
    return {name for parser in found.values() for action in parser._actions for name in action.option_strings}


def spans(text: str) -> list[str]:
    """Inline code of a page."""
    return re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", FENCE.sub("", text))


def lines(text: str) -> list[str]:
    """Lines of a page's code blocks, continued ones joined."""
    return [line for _, _, block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]


@cache
def sources() -> set[str]:
    return {str(file.relative_to(ROOT)) for top in TOP for file in (ROOT / top).rglob("*.py")}


def is_there(path: str) -> bool:
    if path.partition("/")[0] in TOP and "/" in path:
        return (ROOT / path).exists() or ("*" in path and any(ROOT.glob(path)))
    return any(f"/{file}".endswith(f"/{path}") for file in sources())


def test_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "architecture.md", "privacy.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page):
    named = {span.partition(":")[0].partition("::")[0] for span in spans(page.read_text("utf-8"))}
    paths = {name for name in named if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", name)
             and ((name.partition("/")[0] in TOP and "/" in name) or name.endswith(".py"))
             and not name.rpartition("/")[2].startswith("my_")}
    assert not {path for path in paths if not is_there(path)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_that_a_page_points_to_is_in_the_file_it_names(page):
    """Pages write `name` in `file.py`, or several names with commas and "and"."""
    text = page.read_text("utf-8")
    for names, file in re.findall(r"((?:`\w+`(?:,\s+and\s+|,\s+|\s+and\s+)?)+)\s+in\s+`([\w/]+\.py)`", text):
        source = (ROOT / file).read_text("utf-8")
        missing = [name for name in re.findall(r"`(\w+)`", names)
                   if not re.search(rf"^\s*(def|class) {name}\b|^{name}\b", source, re.MULTILINE)]
        assert not missing, f"{page.name}: {file} has no {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_file_that_a_page_runs_exists(page):
    named = {word for line in lines(page.read_text("utf-8")) if line.startswith("pytest ")
             for word in line.split() if word.startswith("tests/")}
    assert not {path for path in named if not (ROOT / path).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_a_page_names_exists(page):
    text = page.read_text("utf-8")
    code = [span for span in spans(text) if span.startswith("-") or OURS.match(span)]
    code += [OURS.split(line, maxsplit=1)[-1] for line in lines(text) if OURS.search(line)]
    named = {name for piece in code for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*", piece)}
    assert not named - options() - OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)
               if not re.match(r"[a-z]+:", target)} - {""}
    lost = {target for target in targets if not (page.parent / target).exists()}
    assert not {target for target in lost if not (
        page.parent.name == "docs" and (target in GENERATED or target.startswith("reference/api/")))}


def test_docstrings_keep_their_tables_and_brackets_as_markdown(monkeypatch):
    pytest.importorskip("griffe", reason="the documentation's tools are not installed: pip install '.[docs]'")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    from docstrings import as_markdown

    written = ("Title of <name>, `<name>`.\n\nPaper   Here\nsigma   noise\n\n"
               "Args:\n    a, b: two of\n        them.\n    c: one.")
    assert as_markdown(written).split("\n\n") == [
        "Title of &lt;name>, `<name>`.", "    Paper   Here\n    sigma   noise",
        "Args:\n    a: two of\n        them.\n    b: two of\n        them.\n    c: one."]


def test_the_site_is_built_strictly_and_asks_no_other_host_for_anything(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="the documentation's tools are not installed: pip install '.[docs]'")
    packages = (ROOT, *(ROOT / top for top in ("client", "server", "strategies", "simulations", "adapter")))
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"], cwd=ROOT, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(map(str, packages))})
    assert done.returncode == 0, done.stdout
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        html = page.read_text("utf-8")
        fetched = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?([^\"' >]+)", html)
        assert not [address for address in fetched if re.match(r"(https?:)?//", address)], page
    styles = [style.read_text("utf-8") for style in (tmp_path / "site").rglob("*.css")]
    assert styles and not [style for style in styles if re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style)]
