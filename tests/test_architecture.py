"""The house: one direction of imports, one home for shardings and equations, a small install."""

import ast
import dataclasses
import importlib.metadata
import re
import sys
from pathlib import Path

import marks
from packaging.requirements import Requirement

from llada import config

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "llada"

# Rooms from the ground up; a file imports from its own room or from rooms below, and objectives never see the model.
ROOMS = (
    "errors signals json_files paths files jax_internals processes knobs changes config_rules config mesh fsdp model "
    "objectives accounting data inference evaluation training scaling interop planning serving commands __main__"
).split()


def modules() -> dict[str, ast.Module]:
    files = {path.relative_to(SOURCE).with_suffix("").as_posix(): path for path in SOURCE.rglob("*.py")}
    return {name: ast.parse(path.read_text()) for name, path in files.items()}


def imports(tree: ast.Module) -> set[str]:
    """Our own modules imported at module level, as `room` or `room/file`."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llada":
            base = node.module.removeprefix("llada").strip(".").replace(".", "/")
            found |= {f"{base}/{a.name}".strip("/") for a in node.names} | {base}
    return {name for name in found if name in modules_by_name}


modules_by_name = modules()


def test_imports_point_one_way():
    for name, tree in modules_by_name.items():
        room = name.split("/")[0]
        if room == "__init__":
            assert not imports(tree)
            continue
        for target in imports(tree):
            assert ROOMS.index(target.split("/")[0]) <= ROOMS.index(room), f"{name} imports {target} from above"
            assert (room, target.split("/")[0]) != ("objectives", "model"), f"{name} imports the model"


def test_there_is_no_import_cycle():
    graph = {name: imports(tree) - {name} for name, tree in modules_by_name.items()}
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in graph[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_partition_specs_and_libraries_stay_in_their_rooms():
    homes = {
        "PartitionSpec": {"mesh"},
        "flax": {"model/transformer"},
        "grain": {"data/rows"},
        "array_record": {"data/record_files"},
        "sentencepiece": {"data/sentencepiece_tokenizer", "data/tokenizer_training"},
        "tokenizers": {"data/huggingface_tokenizer"},
        "jinja2": {"data/jinja_sandbox"},
        "orbax": {"training/checkpoint", "training/leaves"},
        "tensorstore": {"training/arrays"},
        "safetensors": {"interop/safetensors_files"},
        "scipy": {"scaling/parametric"},
        # Copied into exports, imported by nothing here.
        "torch": {"interop/modeling_llada", "interop/generation_llada"},
        "transformers": {f"interop/{name}_llada" for name in ("configuration", "generation", "modeling")},
        "optax": {"training/optimizer", "training/step"},
        "tensorboardX": {"training/metrics"},
        "starlette": {"serving/app"},
        "uvicorn": {"serving/server"},
        "lm_eval": {"evaluation/lm_eval", "evaluation/lm_eval_tasks", "commands/harness", "commands/lm_eval"},
    }
    for word, allowed in homes.items():
        users = {name for name in modules_by_name if re.search(rf"\b{word}\b", code_of(name))}
        assert users == allowed, f"{word} is used in {users}"


def test_only_files_about_a_platform_ask_for_it():
    """`mesh.platform()` is called where kernels and layouts are chosen, and nowhere between mathematics."""
    call = re.compile(r"(?<!\bplatform\.)\bplatform\(\)")
    users = {name for name in modules_by_name if call.search((SOURCE / f"{name}.py").read_text())}
    homes = {"model/attention_kernels", "model/projections", "fsdp", "objectives/vocabulary_head"}
    assert users == homes | {"mesh"}, users


def test_training_does_not_import_decoding():
    """Nothing that `llada train` reaches imports the layouts and caches of inference."""
    reached, todo = set(), ["commands/train", "training/loop", "training/step"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imports(modules_by_name[name])
    assert "model/transformer" in reached and "model/cached" not in reached


def code_of(name: str) -> str:
    """Import statements of a module, wherever they stand: where a library enters."""
    imports_ = (node for node in ast.walk(modules_by_name[name]) if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(ast.unparse(node) for node in imports_)


def test_every_public_definition_has_a_docstring():
    for name, tree in modules_by_name.items():
        assert ast.get_docstring(tree), name
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name}"


def test_files_and_functions_stay_readable():
    for name, tree in modules_by_name.items():
        assert len((SOURCE / f"{name}.py").read_text().splitlines()) <= 400, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_every_config_field_has_a_reader():
    readers = "\n".join((SOURCE / f"{name}.py").read_text() for name in modules_by_name if name != "config")
    resolved = {"kv_heads", "steps", "tokens", "data", "fsdp", "tensor"}  # read through properties, or by axis name
    for group in dataclasses.fields(config.Config):
        if dataclasses.is_dataclass(group.type):
            for field in dataclasses.fields(group.type):
                used = re.search(rf"\.{field.name}\b", readers)
                assert used or field.name in resolved, f"{group.name}.{field.name} is read nowhere"


def test_the_equation_map_of_the_readme_is_true():
    """Both ways: each row names a file, a function whose docstring has the tag, and a test file; no tag is missing."""
    rows = re.findall(r"^\| (Eq\. \(\d+\)[^|]*) \| `([\w/.]+):([\w.]+)` \| `([\w/.]+)` \|", readme(), re.M)
    assert len(rows) >= 5
    tags = set()
    for equation, file, function, test in rows:
        tag = re.match(r"Eq\. \(\d+\)", equation)[0]
        tree = ast.parse((ROOT / file).read_text())
        node = next(n for n in ast.walk(tree) if getattr(n, "name", None) == function.split(".")[-1])
        assert f"LLaDA {tag}" in ast.get_docstring(node), f"{file}:{function} does not say LLaDA {tag}"
        assert tag in (ROOT / test).read_text(), f"{test} does not say {tag}"
        tags.add(tag)
    for path in SOURCE.rglob("*.py"):
        for tag in re.findall(r"LLaDA (Eq\. \(\d+\))", path.read_text()):
            assert tag in tags, f"{path.name} has {tag}, README's map has not"


def test_the_tree_of_the_house_is_true():
    """docs/house.md: one line a file, none missing, none made up, rooms in the order of their imports."""
    files = re.findall(r"^    +([\w/]+\.py) ", (ROOT / "docs" / "house.md").read_text(), re.M)
    rooms = [ROOMS.index(file.removesuffix(".py").split("/")[0]) for file in files]
    assert rooms == sorted(rooms)
    listed = set(files)
    there = {f"{name}.py" for name in modules_by_name if not name.endswith("__init__")} - {"__main__.py"}
    assert listed == there, listed ^ there


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_install_is_small_and_has_no_tensorflow_or_torch():
    """The closure of setup.cfg's requirements without extras, the package itself included, as pip would resolve it."""
    seen, todo = set(), ["llada-jax"]
    while todo:
        requirement = Requirement(todo.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        key = (name, tuple(sorted(requirement.extras)))
        if key in seen:
            continue
        seen.add(key)
        for line in importlib.metadata.requires(name) or []:
            marker = Requirement(line).marker
            extras = requirement.extras or {""}
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(line)
    names = {name for name, _ in seen}
    assert len(names) <= 62, sorted(names)
    assert {"tensorflow-datasets", "grain", "orbax-checkpoint", "sentencepiece"} <= names
    assert not names & {"tensorflow", "torch", "tensorflow-cpu", "clu"}


def test_the_installed_versions_are_the_pins_or_within_the_ranges():
    """Pins on Python 3.11, where requirements.txt belongs; elsewhere the ranges of setup.cfg."""
    if sys.version_info[:2] == (3, 11):
        pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)
        assert len(pins) >= 50
        assert not [f"{name}=={version}" for name, version in pins if importlib.metadata.version(name) != version]
    for line in importlib.metadata.requires("llada-jax"):
        requirement = Requirement(line)
        if "extra" not in str(requirement.marker):
            assert importlib.metadata.version(requirement.name) in requirement.specifier, line


def test_fast_tests_are_of_every_room_and_marked_files_exist():
    """`-m fast` says whether the tree is sane: a marked file, or a marked test, in every folder of tests/."""
    tests = ROOT / "tests"
    marked = [name for files in (marks.LONGEST, *marks.FILES.values()) for name in files]
    assert not [name for name in marked if not (tests / name).exists()]
    for room in {path.parent for path in tests.glob("*/test_*.py")}:
        files = [name for name in marks.FILES["fast"] if (tests / name).parent == room]
        assert files or any("@pytest.mark.fast" in path.read_text() for path in room.glob("test_*.py")), room.name
