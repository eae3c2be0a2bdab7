"""launch/quickstart_in_context.sh: held-out rules are not in training, answers follow from contexts; a tiny run."""

import importlib
import importlib.util
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import in_process
import pytest

from llada import accounting
from llada.commands import experiment
from llada.errors import UserError

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: the extra [eval]", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "experiments" / "in_context.py"
FAMILIES = ("llada", "arm")


@pytest.fixture(scope="module")
def script():
    """Scripts of experiments/ by name; one imports the other."""
    sys.path.insert(0, str(ROOT / "experiments"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(scope="module")
def data(script):
    return script("in_context_data")


def test_no_held_out_rule_is_in_training_and_every_answer_follows_from_its_context(data):
    found = data.documents(3, train=1_000, held_out=80)
    assert len(set(found.held_out_rules)) == 80 and not set(found.held_out_rules) & set(found.train_rules)
    # No document that trains can be of a held-out rule, whichever of its letters are drawn.
    trained = [set(text.split()) for text in found.train]
    for own in found.held_out_rules:
        assert not any({f"{a}{b}" for a, b in own} <= lines for lines in trained)
    for own, text in zip(found.train_rules, found.train, strict=True):
        assert {f"{a}{b}" for a, b in own} >= set(text.split()) and len({b for _, b in own}) == len(own)
    for own, question in zip(found.held_out_rules, found.held_out, strict=True):
        shots, place, asked = question["shots"], question["place"], question["asked"]
        assert [shot for shot in shots if shot.startswith(asked)] == [f"{asked}{question['answer']}\n"]
        assert shots[place][0] == asked and question["candidates"][question["gold"]] == question["answer"]
        assert sorted(shots) == [f"{a}{b}\n" for a, b in own]
        assert question["candidates"] == sorted({b for _, b in own}) and len(question["candidates"]) == data.MOST
        assert question["text"] == "".join(shots) + f"{asked}{question['answer']}\n"
    assert set(Counter(question["place"] for question in found.held_out).values()) == {80 // data.MOST}


def test_the_capitals_of_a_letter_are_drawn_alike(data):
    """What weights could know: of 26 capitals the commonest behind a letter has hardly more than a 26th."""
    found = data.documents(0, train=8_000, held_out=8)
    pairs = Counter(pair for own in found.train_rules for pair in own)
    letters = Counter(letter for own in found.train_rules for letter, _ in own)
    expected = {letter: count / 26 for letter, count in letters.items()}
    chi2 = sum((pairs[a, b] - e) ** 2 / e for a, e in expected.items() for b in data.CAPITALS)
    assert 26 * 25 - 5 * (2 * 26 * 25) ** 0.5 < chi2 < 26 * 25 + 5 * (2 * 26 * 25) ** 0.5


def test_the_same_seed_gives_the_same_files_and_another_one_others(data, tmp_path):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.write(tmp_path / name, data.documents(seed, train=50, held_out=8))
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.jsonl")})
    assert contents[0] == contents[1] and all(contents[0][name] != contents[2][name] for name in contents[0])


def test_both_families_have_the_same_model_data_and_training():
    llada, arm = (experiment.read(f"{CONFIG}:{name}", {"data.source": "text:train.jsonl"}) for name in FAMILIES)
    assert accounting.parameters(llada.model) == accounting.parameters(arm.model) and arm.model.causal
    assert (llada.data, llada.train, llada.optimizer) == (arm.data, arm.train, arm.optimizer)


TINY = "layers=1 width=16 heads=2 ffn=16".split()


@pytest.fixture(scope="module")
def studied(data, offline, tmp_path_factory):
    """What the script leaves of models that were hardly trained, asked for four documents."""
    run_dir = tmp_path_factory.mktemp("in_context")
    data.write(run_dir / "data", data.documents(0, train=60, held_out=8))
    names = ",".join(data.task(form, shots) for form in data.FORMS for shots in data.SHOTS)
    for family in FAMILIES:
        workdir = run_dir / f"{family}-0"
        flags = [f"--config.model.{each}" for each in TINY]
        flags += ["--config.train.steps=2", "--config.train.batch_size=2", "--config.evaluate.batches=1"]
        if family == "arm":
            flags.append(f"--config.data.tokenizer={run_dir}/llada-0/tokenizer.model")
        done = in_process.llada(
            "train", f"--config={CONFIG}:{family}", f"--workdir={workdir}",
            f"--config.data.source=text:{run_dir}/data/train.jsonl", f"--config.data.directory={run_dir}/data/rows",
            f"--config.data.holdout_source=text:{run_dir}/data/held_out.jsonl", *flags,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        done = in_process.llada(
            "lm_eval", f"--workdir={workdir}", f"--tasks={names}", f"--include_path={run_dir}/data", "--limit=4",
            "--log_samples", f"--out={run_dir}/lm_eval",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return run_dir


def results(run_dir: Path, family: str) -> dict:
    (path,) = (run_dir / "lm_eval" / f"{family}-0-2").glob("results_*.json")
    return json.loads(path.read_text())


def test_the_tasks_ask_for_a_letter_behind_the_first_examples(data, studied):
    held_out = [json.loads(line) for line in (studied / "data" / "held_out.jsonl").read_text().splitlines()]
    for form in data.FORMS:
        for shots in data.SHOTS:
            (path,) = (studied / "lm_eval" / "llada-0-2").glob(f"samples_{data.task(form, shots)}_*.jsonl")
            samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
            for document, sample in zip(held_out[:4], samples, strict=True):
                context = "".join(document["shots"][:shots]) + document["asked"]
                requests = [arguments["arg_0"] for arguments in sample["arguments"].values()]
                assert requests == [context] * (data.MOST if form == "choice" else 1)
                if form == "choice":
                    assert [each["arg_1"] for each in sample["arguments"].values()] == document["candidates"]


def test_the_page_has_lm_evals_scores_and_their_errors(data, script, studied, tmp_path, monkeypatch):
    report = script("in_context_report")
    shutil.copytree(studied, run_dir := tmp_path / "run")
    # Of hardly trained models all may be wrong: one answer that is right, as lm-eval would have it.
    (path,) = (run_dir / "lm_eval" / "arm-0-2").glob("samples_in_context_write_4_*.jsonl")
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"exact_match": 1.0}), *others]) + "\n")
    monkeypatch.setattr(sys, "argv", ["in_context_report.py", f"--run_dir={run_dir}", f"--out={tmp_path / 'docs'}"])
    report.main()
    lines = [" ".join(line.split()) for line in (tmp_path / "docs" / "in_context.md").read_text().splitlines()]
    for family, name in zip(FAMILIES, ("LLaDA", "ARM"), strict=True):
        found = results(studied, family)["results"]
        shown = [found[data.task("choice", shots)] for shots in data.SHOTS]
        cells = [f"{100 * each['acc,none']:.1f} ± {100 * each['acc_stderr,none']:.1f}" for each in shown]
        assert f"| {name}, seed 0 | {' | '.join(cells)} |" in lines
    assert any(line.startswith("| ARM, seed 0 |") and "25.0 ± 25.0" in line for line in lines)
    assert "| recall, else guessing | 12.5 | 23.4 | 34.4 | 56.2 | 100.0 |" in lines
    assert (tmp_path / "docs" / "in_context" / "shots.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("damage", ["rows", "parameters", "asked", "missing", "none"])
def test_a_page_of_what_does_not_belong_together_is_refused(script, studied, tmp_path, damage):
    shutil.copytree(studied, run_dir := tmp_path / "run")
    folder = run_dir / "lm_eval" / "arm-0-2"
    (path,) = folder.glob("results_*.json")
    found = json.loads(path.read_text())
    if damage == "rows":
        summary = run_dir / "arm-0" / "summary.json"
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"rows_digest": "e"}))
    elif damage == "parameters":
        path.write_text(json.dumps(found | {"config": found["config"] | {"parameters_sha256": "e"}}))
    elif damage == "asked":
        path.write_text(json.dumps(found | {"task_hashes": found["task_hashes"] | {"in_context_choice_2": "e"}}))
    elif damage == "missing":
        next(folder.glob("samples_in_context_write_1_*")).unlink()
    else:
        shutil.rmtree(run_dir / "llada-0")
    message = r"other rows|other parameters|asked differently|run launch/quickstart_in_context.sh|holds no run"
    with pytest.raises(UserError, match=message):
        script("in_context_report").read(run_dir)
