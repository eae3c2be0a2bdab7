"""README, CONTRIBUTING and docs/: links lead somewhere, files exist, commands have the flags typed there."""

import ast
import functools
import re
from pathlib import Path

import in_process
import pytest
import yaml

import llada
from llada import knobs
from llada.commands import program
from llada.config import Config
from llada.scaling.sweep_config import SweepConfig

ROOT = Path(__file__).resolve().parents[1]
# docs/isoflop, docs/plan and docs/repeat are reports, as commands wrote them.
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
WRITTEN = [path for path in DOCUMENTS if path.stem not in ("guarantees", "reliability", "benchmarks", "CHANGELOG")]
README_LINES = 200


def named(documents):
    return pytest.mark.parametrize("document", documents, ids=lambda path: path.name)


def anchors(text: str) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named(DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked.read_text()), f"{document.name} links to {target}"


@named(WRITTEN)
def test_files_that_are_named_exist(document):
    """In backticks: paths from the checkout, or from src/llada; `file.py:name` has that name in it."""
    for path, name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|md|txt|cfg))(?::(\w+))?`", document.read_text()):
        if path.startswith("runs/") or "NAME" in path:
            continue
        found = next((base / path for base in (ROOT, ROOT / "src" / "llada") if (base / path).exists()), None)
        assert found, f"{document.name} names {path}"
        assert not name or re.search(rf"\b{name}\b", found.read_text()), f"{path} has no {name}"


def commands(document: Path) -> list[str]:
    """What one could type: the lines of blocks, joined at backslashes, and what stands in backticks."""
    text = document.read_text()
    blocks = re.findall(r"^ *```(?:bash)?\n(.*?)^ *```", text, re.M | re.S)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return [line.partition(" # ")[0] for line in lines]


@functools.cache
def flags_of(command: str) -> set[str]:
    """Flags of a `llada` command, as its --help lists them."""
    return {"help"} | set(re.findall(r"^  --(?:\[no\])?(\w+):", in_process.llada(command, "--help").stdout, re.M))


@functools.cache
def config_keys() -> set[str]:
    keys = {key.name for key in knobs.keys(Config)} | {f"sweep.{key.name}" for key in knobs.keys(SweepConfig)}
    return keys | {key.rpartition(".")[0] for key in keys}


def flags_in(line: str) -> list[str]:
    return re.findall(r"(?<![\w-])--([A-Za-z][\w.]*)", line)


@named(WRITTEN)
def test_llada_commands_have_the_flags_that_are_typed(document):
    for line in commands(document):
        for command, rest in re.findall(r"(?<![\w./-])llada ([a-z_]+)((?: [^|;&]*)?)", line):
            assert command in program.COMMANDS, f"{document.name}: {line}"
            for flag in flags_in(rest):
                if not flag.startswith("config."):
                    assert flag in flags_of(command), f"{document.name}: {line}: llada {command} has no --{flag}"


@named(WRITTEN)
def test_config_keys_exist(document):
    for key in re.findall(r"--config\.([a-z][\w.]*)", document.read_text()):
        if "key" not in key.split("."):
            assert key.strip(".") in config_keys(), f"{document.name} types --config.{key}"


@named(WRITTEN)
def test_scripts_have_the_flags_that_are_typed(document):
    for line in commands(document):
        for script, rest in re.findall(r"(?<![\w./-])(?:python|bash) ((?:\w+/)+[\w.]+)((?: [^|;&]*)?)", line):
            assert (ROOT / script).exists(), f"{document.name}: {line}"
            for flag in flags_in(rest):
                known = flag in options_of(ROOT / script)
                # What follows a launcher's own words are flags of llada train or sweep.
                passed_on = script.startswith("launch/") and flag in flags_of("train") | {"config", "workdir"}
                assert known or passed_on or flag.startswith("config."), f"{document.name}: {script} has no --{flag}"


@functools.cache
def options_of(script: Path) -> set[str]:
    """Options of argparse in a script and in the modules beside it that it imports; words of a shell script."""
    text = script.read_text()
    if script.suffix == ".sh":
        # Names in quotes are what take_options of launch/common.sh reads.
        names = " ".join(re.findall(r'"([\w ]+)"', text)).split()
        return {*re.findall(r"--(\w+)", text), *names}
    options = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            options |= {str(a.value).lstrip("-") for a in node.args if isinstance(a, ast.Constant)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            beside = [script.with_name(f"{name}.py") for name in names if name]
            options |= {option for path in beside if path.exists() and path != script for option in options_of(path)}
    return options


def test_readme_is_short_and_has_no_figures_but_the_quickstarts():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES
    assert text.index("## Install") < text.index("## The program")
    measured = re.findall(r"\d[\d.,]* ?(?:x\b|%|GiB|GB|seconds|tokens per second|MFU)", text)
    assert not measured, measured


def test_every_page_is_in_the_index():
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.*"):
        assert f"docs/{page.name}" in text, page.name


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert citation["version"] == llada.__version__ and citation["license"] == "Apache-2.0"
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{llada.__version__}]" in changelog or "## [Unreleased]" in changelog
