"""Files from elsewhere never run code. Experiment files are Python, and do; the documents say so."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# By the last names of a dotted call.
CALLS = {
    *("torch.load", "os.system", "os.popen", "pty.spawn", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "pd.read_pickle"),
    *("importlib.import_module", "import_module", "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive"),
}
TRUE = {"allow_pickle", "trust_remote_code", "shell"}
# Each is told why.
ALLOWED = {
    ("commands/experiment", "runpy"),  # the experiment file that --config names
    ("commands/program", "importlib.import_module"),  # llada.commands.NAME, NAME one of its own table
    ("data/text_files", "importlib.import_module"),  # gzip, bz2 or lzma, of a table
    ("scaling/figure", "importlib.import_module"),  # matplotlib
}


def dangers(tree: ast.AST) -> set[str]:
    """What in a module may run code that it reads, or unpack files where they say."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= ({(node.module or "").split(".")[0]} & MODULES) | (names & CALLS)
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            found.add(node.id)
        if isinstance(node, ast.Attribute):
            found |= {".".join(ast.unparse(node).split(".")[-2:])} & CALLS
        if isinstance(node, ast.keyword) and node.arg in TRUE and ast.unparse(node.value) != "False":
            found.add(node.arg)
    return found


def test_nothing_runs_code_from_files():
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        name = path.relative_to(ROOT / "src" / "llada").with_suffix("").as_posix()
        found |= {(name, danger) for danger in dangers(ast.parse(path.read_text()))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from dill import loads", "import marshal as m", "from os import system", "import shelve"),
        *("eval(x)", "exec(x)", "f = compile", "__import__('os')", "a.b.torch.load(x)", "os.system('ls')"),
        *("np.load(x, allow_pickle=True)", "np.load(x, allow_pickle=flag)", "f(trust_remote_code=True)"),
        *("subprocess.run(x, shell=True)", "yaml.load(x)", "tarfile.open(x)", "import runpy"),
    ],
)
def test_each_danger_would_be_seen(code):
    assert dangers(ast.parse(code))


@pytest.mark.parametrize("code", ["re.compile(x)", "np.load(x)", "run(x, shell=False)", "yaml.safe_load(x)", "'eval'"])
def test_what_is_harmless_is_not(code):
    assert not dangers(ast.parse(code))


@pytest.mark.parametrize("document", ["README.md", "docs/running.md"])
def test_documents_say_that_experiment_files_are_python(document):
    text = " ".join((ROOT / document).read_text().split())
    assert re.search(r"[Ee]xperiment files are Python", text)
