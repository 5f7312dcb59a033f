"""What the pages show works: recipes validate, commands parse, links lead somewhere, and cheap commands run."""

from __future__ import annotations

import argparse
import ast
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lwm_core import registry
from lwm_core.cli import main
from lwm_core.cli.main import _add_plugin_verb, make_parser
from lwm_core.llama_config import to_huggingface
from lwm_core.model import preset
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary

ROOT = Path(__file__).parent.parent
GUIDES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PAGES = [*GUIDES, *sorted([*ROOT.glob("plugins/*/*.md"), *ROOT.glob("contrib/*/*.md")])]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
CHEAP = {"recipes", "plugins", "config", "doctor", "plan"}


def _blocks(language: str, pages: list[Path]) -> Iterator[tuple[str, str]]:
    """Page and text of each block of code in a language."""
    for page in pages:
        for found in FENCE.finditer(page.read_text()):
            if found[1] == language:
                yield str(page.relative_to(ROOT)), found[2]


def _is_recipe(text: str) -> bool:
    """Whether a block is a whole recipe and not an excerpt."""
    table = tomllib.loads(text)
    return "extends" in table or ("data" in table and ("stages" in table or "context" in table))


# The plugins' own pages list alternatives of one key in one block, which is no TOML; they show no whole recipe.
TOML = list(_blocks("toml", GUIDES))
RECIPES = [(page, text) for page, text in TOML if _is_recipe(text)]
LAUNCHER = re.compile(r"^(\w+=\w+ )*torchrun .*--no-python ")
LINES = [LAUNCHER.sub("", line) for _, text in _blocks("sh", PAGES) for line in text.splitlines()]
SHELL = sorted({line.split("  #")[0].strip() for line in LINES if line.startswith("lwm ")})
INLINE = sorted({word for page in PAGES for word in re.findall(r"(?<!`)`(lwm [^`\n]+)`(?!`)", page.read_text())})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a reader stands who has a Llama and wrote down the README's recipe, and files with a name."""
    (tmp_path / "my-run.toml").write_text(next(text for page, text in RECIPES if page == "README.md"))
    for _, text in TOML:
        if named := re.match(r"# (\S+\.toml)\n", text):
            (tmp_path / named[1]).write_text(text)
    (tmp_path / "my-llama").mkdir()
    llama = to_huggingface(preset("7b", Vocabulary(32_000)), RopeSpec(), 4096, "bfloat16")
    (tmp_path / "my-llama" / "config.json").write_text(json.dumps(llama))
    monkeypatch.chdir(tmp_path)
    for name in ("LWM_PLUGINS", "LWM_PLUGINS_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    registry.refresh()
    return tmp_path


def test_the_readme_shows_a_recipe_and_commands() -> None:
    """What the tests below run over is there."""
    assert "README.md" in {page for page, _ in RECIPES}
    assert "lwm run first-run" in SHELL
    assert any(command.split()[1] in CHEAP for command in SHELL)


@pytest.mark.parametrize(("page", "text"), TOML)
def test_every_toml_block_reads(page: str, text: str) -> None:
    """TOML in the pages is TOML."""
    assert tomllib.loads(text), page


@pytest.mark.parametrize(("page", "text"), RECIPES)
def test_recipes_validate(page: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe shown in a page is valid with the plugins of this repository."""
    source = folder / "shown.toml"
    source.write_text(text)
    code = main(["config", "validate", str(source)])
    assert code == 0, f"{page}: {capsys.readouterr()}"


def test_a_wrong_option_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The check above can fail: the option of another plugin is refused."""
    source = folder / "shown.toml"
    source.write_text((folder / "my-run.toml").read_text().replace('"mix"', '"text-file"'))
    assert main(["config", "validate", str(source)]) != 0
    assert "weights" in "".join(capsys.readouterr())


@pytest.mark.parametrize("command", [*SHELL, *INLINE])
def test_commands_parse(command: str) -> None:
    """A command shown whole parses; one that is only named (``lwm config schema``, ``lwm report``) has its verb."""
    parser, verbs = make_parser()
    words = shlex.split(command)[1:]
    if words[0] not in verbs.choices:
        _add_plugin_verb(words[0], verbs)
    if command in SHELL:
        assert parser.parse_args(words).verb == words[0]
        return
    for word in words:
        assert word in verbs.choices, f"{command}: there is no {word!r}"
        inner = [a for a in verbs.choices[word]._actions if isinstance(a, argparse._SubParsersAction)]
        if not inner:
            return
        verbs = inner[0]


@pytest.mark.parametrize("command", [one for one in SHELL if one.split()[1] in CHEAP and "--aot" not in one])
def test_cheap_commands_run(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands that only look at things do so without an error; one that compiles is the plugin's to test."""
    code = main(shlex.split(command)[1:])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert shown.out


def test_sessions_and_folders_that_are_shown_are_there() -> None:
    """``nox -s NAME`` names a session of the noxfile; ``pip install -e FOLDER`` names a distribution's folder."""
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    sessions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    texts = [page.read_text() for page in PAGES]
    shown = {name for text in texts for name in re.findall(r"nox -s ([\w-]+)", text)}
    assert {"quickstart", "tests"} <= shown <= sessions | {"NAME"}
    installs = [line for line in LINES if line.startswith("pip install")]
    folders = {folder for line in installs for folder in re.findall(r"-e (\S+)", line)}
    assert folders and not [folder for folder in folders if not (ROOT / folder / "pyproject.toml").is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    """A relative link names a file that is there."""
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not missing


def test_the_figure_of_the_ring_shows_what_the_code_does(tmp_path: Path) -> None:
    """Pairs by rank as counted by hand for 4 ranks of 8 tokens, and the committed file is not empty of them."""
    pytest.importorskip("matplotlib")
    script = ROOT / "docs" / "figures" / "ring.py"
    scope = runpy.run_path(str(script))
    pairs = {title: scope["work"](layout, mask, 32).sum(axis=1).tolist() for title, layout, mask in scope["PANELS"]}
    assert pairs["contiguous, causal"] == [36, 100, 164, 228]  # 8·9/2, and 64 more with each rank before
    assert pairs["zigzag, causal"] == [132] * 4  # a quarter of 32·33/2
    assert pairs["contiguous, window of 8"] == [36, 64, 64, 64]
    scope["draw"](tmp_path / "ring.svg")
    assert (tmp_path / "ring.svg").read_text().count("<path") == scope["OUT"].read_text().count("<path")
