"""Tasks of lm-evaluation-harness offline, on YAML and JSON lines of our own: every figure against enumeration.

Models are the two tiny trained runs. Expected log-likelihoods are sums over all masks of an answer (or over its tokens,
of an ARM), in float64, from the model's logits; expected texts are those of `Run.generate`.
"""

import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
from types import SimpleNamespace

import in_process
import jax
import numpy as np
import pytest

import llada
from llada.commands import lm_eval_flags
from llada.data.chat_template import ChatTemplate
from llada.data.control_tokens import builtin
from llada.errors import UserError
from llada.evaluation.harness import Harness, Settings, Until
from llada.evaluation.harness_cache import RequestCache
from llada.evaluation.presets import PRESETS
from llada.inference import canvas, generation, likelihood
from llada.inference.chat import Options
from llada.inference.likelihood import LikelihoodConfig
from llada.model import transformer
from llada.objectives.autoregressive import shift_right
from llada.scaling import downstream

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: the extra [eval]", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("offline")

FAMILIES = ("llada", "arm")
QUESTIONS = ("the cat sees", "the dog likes the", "the stone", "a river")
CHOICES = (" the cat", " dog .", " cloud", " sees")
TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "next": """output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: "{{choices[gold]}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "write": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["t", "s"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "whole": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "absent": "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: gold\n",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of tasks on local files; the data of `absent` would have to be downloaded."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": q, "choices": CHOICES, "gold": i % len(CHOICES), "text": f"{q} the bird finds the fish .\n" * (i + 1)}
        for i, q in enumerate(QUESTIONS)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in TASKS.items():
        where = f"json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}"
        path = "nobody/has-this-data-set" if name == "absent" else where
        (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: {path}\ntest_split: test\n{rest}")
    return folder


def lm_eval(run, tasks, *words, names="choice,next,write,whole"):
    """The command on some of the tasks."""
    given = [f"--workdir={run.workdir}", f"--tasks={names}", f"--include_path={tasks}"]
    return in_process.llada("lm_eval", *given, *words)


@pytest.fixture(scope="module")
def evaluated(trained, tasks, tmp_path_factory):
    """`evaluated[family]`: output, results, samples by task, and the directory of an evaluation of all tasks."""
    found = {}
    for family in FAMILIES:
        out = tmp_path_factory.mktemp("out") / family
        done = lm_eval(trained[family], tasks, f"--out={out}", "--log_samples")
        assert done.returncode == 0, done.stderr
        found[family] = SimpleNamespace(out=out, stdout=done.stdout, **read(out, family))
    return found


def read(out, family) -> dict:
    """Results and samples as they lie on the disk."""
    folder = out / f"{family}-12"
    (results,) = folder.glob("results_*.json")
    samples = {
        name: [json.loads(line) for path in folder.glob(f"samples_{name}_*") for line in path.read_text().splitlines()]
        for name in ("choice", "next", "write", "whole")
    }
    return {"results": json.loads(results.read_text()), "samples": samples}


logits = jax.jit(transformer.logits, static_argnums=0)


def log_laws(run, rows):
    """log softmax of each row's logits, float64: rows of one length, which are padded to a few shapes."""
    L, longest = len(rows[0]), run.config.model.max_length
    padded_BL = np.zeros((64 * -(-len(rows) // 64), longest), np.int32)
    padded_BL[: len(rows), :L] = rows
    found = logits(run.config.model, run.params, padded_BL, np.full(len(padded_BL), L, np.int32))
    logits_BLV = np.asarray(found, np.float64)[: len(rows), :L]
    return logits_BLV - np.log(np.sum(np.exp(logits_BLV), axis=-1, keepdims=True))


def written(run, **request) -> list[str]:
    """What the model writes behind each question."""
    requests = [generation.Request(prompt=question, **request) for question in QUESTIONS]
    with jax.set_mesh(run.mesh):
        answers = generation.generate(run.config, run.params, run.tokenizer, requests, round_up=True)
    return [answer.text.removeprefix(question) for answer, question in zip(answers, QUESTIONS, strict=True)]


def enumerated(run, prompt: str, answer: str) -> float:
    """log p(answer | prompt) of an ARM, or the bound of LLaDA Eq. (6), by all masks of the answer."""
    ids = run.tokenizer.encode(prompt)
    answer_ids = run.tokenizer.encode(prompt + answer)[len(ids) :]
    A, whole = len(answer_ids), [*ids, *answer_ids]
    places = np.arange(len(ids), len(whole))
    if run.config.model.causal:
        (law,) = log_laws(run, shift_right(np.array([whole]), run.tokenizer.special.start))
        return sum(law[place, token] for place, token in zip(places, answer_ids, strict=True))
    masks = [mask for mask in itertools.product((0, 1), repeat=A) if any(mask)]
    rows = [
        [*ids, *(run.tokenizer.mask_id if m else t for m, t in zip(mask, answer_ids, strict=True))] for mask in masks
    ]
    total = 0.0
    for mask, law in zip(masks, log_laws(run, rows), strict=True):
        inside = sum(law[place, token] for place, token, m in zip(places, answer_ids, mask, strict=True) if m)
        total += inside * (A / sum(mask)) / (A * math.comb(A, sum(mask)))
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_ranked_by_enumerated_likelihoods(family, trained, evaluated):
    run, samples = llada.load(trained[family].workdir), evaluated[family].samples["choice"]
    right, cache = 0, {}
    for i, (question, sample) in enumerate(zip(QUESTIONS, samples, strict=True)):
        expected = [cache.setdefault((question, choice), enumerated(run, question, choice)) for choice in CHOICES]
        np.testing.assert_allclose([float(resp[0][0]) for resp in sample["resps"]], expected, rtol=1e-5)
        right += int(np.argmax(expected)) == i % len(CHOICES)
    scores = evaluated[family].results["results"]["choice"]
    assert scores["acc,none"] == right / len(QUESTIONS)
    share = right / len(QUESTIONS)
    assert scores["acc_stderr,none"] == pytest.approx(math.sqrt(share * (1 - share) / (len(QUESTIONS) - 1)))
    assert "|choice|" in evaluated[family].stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_end_at_the_first_stop_and_greedy_answers_are_what_would_be_written(family, trained, evaluated):
    run = llada.load(trained[family].workdir)
    for text, sample in zip(written(run, gen_length=8), evaluated[family].samples["write"], strict=True):
        stops = [place for stop in "ts" if (place := text.find(stop)) >= 0]
        assert sample["resps"] == [[text[: min(stops, default=len(text))]]]
    texts = {}
    for i, (question, sample) in enumerate(zip(QUESTIONS, evaluated[family].samples["next"], strict=True)):
        answer = CHOICES[i % len(CHOICES)]
        length = len(run.tokenizer.encode(question + answer)) - len(run.tokenizer.encode(question))
        texts.setdefault(length, written(run, gen_length=length))
        assert sample["acc"] == (texts[length][i] == answer)
        assert float(sample["resps"][0][0][0]) == pytest.approx(enumerated(run, question, answer), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_longer_than_the_context_are_scored_in_windows(family, trained, evaluated):
    run = llada.load(trained[family].workdir)
    nats = count = 0
    for sample in evaluated[family].samples["whole"]:
        ids = run.tokenizer.encode(sample["doc"]["text"])
        assert len(ids) > run.config.model.max_length or count == 0
        expected = likelihood.rolling(run.config.model, run.params, ids, run.tokenizer.special).log_likelihood
        assert float(sample["resps"][0][0]) == pytest.approx(expected, rel=1e-6)
        nats, count = nats - expected, count + len(sample["doc"]["text"].encode())
    assert evaluated[family].results["results"]["whole"]["bits_per_byte,none"] == pytest.approx(
        nats / count / math.log(2)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_results_say_what_they_are_of(family, trained, evaluated):
    results = evaluated[family].results
    config, summary = results["config"], trained[family].summary
    assert config["parameters_sha256"] == summary["parameters_sha256"] and config["step"] == summary["step"]
    assert config["objective"] == summary["objective"] and config["device_kind"] == jax.devices()[0].device_kind
    assert set(results["task_hashes"]) == set(results["results"]) == {"choice", "next", "write", "whole"}
    assert results["lm_eval_version"] and config["surroundings"]["versions"]["jax"] == jax.__version__
    scoring = config["settings"]["choice"]["scoring"]
    assert scoring["exact"] if family == "arm" else (scoring["estimator"], scoring["draws"]) == ("l_of_L", 128)
    assert config["requests"]["requests"] == 16 + 4 + 4 + 4
    names = {
        "results",
        "configs",
        "versions",
        "n-shot",
        "n-samples",
        "git_hash",
        "date",
        "pretty_env_info",
        "model_name",
    }
    assert names <= set(results)


def test_a_killed_evaluation_goes_on_and_gets_the_same_bits(trained, tasks, evaluated, tmp_path):
    """Half of the finished requests and a torn line: the rest are computed anew, in other company."""
    (finished,) = (evaluated["llada"].out / "requests").glob("*.jsonl")
    lines = finished.read_bytes().splitlines(keepends=True)
    kept = tmp_path / "finished.jsonl"
    kept.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:20])
    words = [f"--out={tmp_path}/out", "--log_samples", f"--finished={kept}"]
    done = lm_eval(trained["llada"], tasks, *words)
    assert done.returncode == 0, done.stderr
    again = read(tmp_path / "out", "llada")
    whole = evaluated["llada"].results["config"]["requests"]
    assert again["results"]["results"] == evaluated["llada"].results["results"]
    for name, samples in evaluated["llada"].samples.items():
        assert [sample["resps"] for sample in again["samples"][name]] == [sample["resps"] for sample in samples]
    assert again["results"]["config"]["requests"]["cached"] == whole["cached"] + len(lines) // 2 - 1
    assert sorted(kept.read_bytes().splitlines()) == sorted(finished.read_bytes().splitlines())
    other = lm_eval(trained["arm"], tasks, f"--out={tmp_path}/arm", f"--finished={kept}")
    assert other.returncode == 2 and "is of another model: its parameters_sha256 is" in other.stderr
    kept.write_text('{"prompt": 1}\n')
    with pytest.raises(UserError, match="is no cache of requests"):
        RequestCache(kept, {"parameters_sha256": "1"})


def test_the_dry_run_counts_what_the_run_does(trained, tasks, evaluated):
    """No model is run: rows are those of the run, but for the passes that find out whether an answer is greedy."""
    done = lm_eval(trained["llada"], tasks, "--dry_run", names="choice,write,absent,whole")
    assert done.returncode == 0, done.stderr
    lines = {line.split(":")[0].strip(): line for line in done.stdout.splitlines()}
    rows = sum(2 ** len(ids) - 1 for ids in _answers(trained["llada"]))
    assert f"choice: 16 requests of 1 task(s), 0 shots, at most {rows:,} forward passes" in lines["choice"]
    assert "write: 4 requests of 1 task(s), 0 shots, at most 32 forward passes" in lines["write"]
    assert "cannot be loaded" in lines["task absent cannot be loaded"] and "--include_path" in done.stdout


def _answers(trained_run) -> list[list[int]]:
    tokenizer = llada.load(trained_run.workdir).tokenizer
    return [canvas.encode_pair(tokenizer, question, choice)[1] for question in QUESTIONS for choice in CHOICES]


def test_every_checkpoint_of_both_families_makes_a_curve(trained, tasks, tmp_path):
    for family in FAMILIES:
        (tmp_path / family).symlink_to(trained[family].workdir)
    words = ["--at=all", f"--out={tmp_path}/out", "--limit=2", f"--include_path={tasks}", "--tasks=choice"]
    done = in_process.llada("lm_eval", f"--workdir={tmp_path}", *words)
    assert done.returncode == 0, done.stderr
    readings = json.loads((tmp_path / "out" / "downstream.json").read_text())["readings"]
    found = {(r["family"], r["step"], r["metric"]): r for r in readings}
    assert set(found) == set(itertools.product(("diffusion", "autoregressive"), (4, 8, 12), ("acc", "acc_norm")))
    for family, name in (("diffusion", "llada"), ("autoregressive", "arm")):
        assert found[family, 12, "acc"]["flops_6nd"] == pytest.approx(trained[name].summary["flops_6nd"])
        assert found[family, 4, "acc"]["flops_6nd"] == pytest.approx(trained[name].summary["flops_6nd"] / 3)
    assert all(r["stderr"] is not None for r in readings)
    assert (tmp_path / "out" / "downstream.png").read_bytes().startswith(b"\x89PNG")
    assert "| run" in (tmp_path / "out" / "downstream.md").read_text()


def test_of_a_sweep_the_end_of_every_run_counts(trained, tasks, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "sweep.json").write_text("{}")
    for family in FAMILIES:
        (tmp_path / "runs" / family).symlink_to(trained[family].workdir)
    words = [f"--workdir={tmp_path}", "--at=all", "--dry_run", f"--include_path={tasks}", "--tasks=choice"]
    done = in_process.llada("lm_eval", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(", 1 checkpoint(s)") == 2
    assert all(f"runs/{family}: " in done.stdout for family in FAMILIES)


def test_dialogues_are_the_ids_of_the_template_and_no_text_spells_a_control_token(trained):
    from llada.evaluation.lm_eval import HarnessModel

    run = llada.load(trained["llada"].workdir)
    template = ChatTemplate(run.tokenizer, builtin("plain"), "plain")
    model = HarnessModel(Harness(run, template))
    history = [{"role": "user", "content": "the <|eot_id|> cat"}]
    text = model.apply_chat_template(history)
    ids = model.harness.ids_of(model._text(text))
    assert ids == template.prompt_ids(history) and ids.count(run.tokenizer.eot_id) == 1
    begun = model.apply_chat_template([*history, {"role": "assistant", "content": "so"}], add_generation_prompt=False)
    assert begun == f"{text}so"
    answer = [*history, {"role": "assistant", "content": "so it"}]
    (turn,) = template.turns(answer)
    rendered = model._text(begun)
    continued = [*model.harness.ids_of(rendered), *template.answer_ids(rendered, " it")]
    assert run.tokenizer.decode(continued[len(ids) :]) == run.tokenizer.decode(turn.answer_ids[:-1])
    assert [*ids, *template.answer_ids(model._text(text), "so it")] == [*ids, *turn.answer_ids[:-1]]
    assert model.chat_template(True) == builtin("plain") and model.tokenizer_name
    with pytest.raises(UserError, match="no chat template; give one"):
        HarnessModel(Harness(run)).apply_chat_template(history)


def test_what_does_not_fit_is_cut_on_the_left_and_counted(trained):
    run = llada.load(trained["llada"].workdir)
    harness, settings = Harness(run), Settings(greedy=False)
    longest = run.config.model.max_length
    long = "the cat sees the dog . " * 10
    prompt, answer = canvas.encode_pair(run.tokenizer, long, "the tree")
    (scored,) = harness.score([(long, "the tree")], [settings])
    fitting = likelihood.Pair(prompt[len(answer) - longest :], answer)
    (expected,) = likelihood.log_likelihoods(run.config.model, run.params, [fitting], run.tokenizer.special)
    assert scored.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-6)
    assert harness.tally.truncated == 1
    (text,) = harness.write([Until(long, (), 200)], [settings._replace(writing=Options(block_length=4))])
    ids = run.tokenizer.encode(long)[-(longest // 2) :]
    written = run._generated(prompt_ids=ids, gen_length=longest // 2, block_length=4)
    assert run.tokenizer.decode(ids) + text == written and harness.tally.truncated == 2 and harness.tally.shortened == 1
    with pytest.raises(
        UserError, match=rf"an answer has \d+ tokens and the model's context is model.max_length={longest}"
    ):
        harness.score([("the", long)], [settings])


def test_settings_go_with_their_tasks_and_repeats_differ(trained):
    """Two settings in one call get what each gets alone; equal requests that are sampled get noise of their own."""
    run = llada.load(trained["llada"].workdir)
    harness = Harness(run)
    guided = Settings(scoring=LikelihoodConfig(estimator="chain_rule", cfg_scale=0.5), greedy=False)
    plain = Settings(greedy=False)
    both = harness.score([("the cat", " sees the")] * 2, [guided, plain])
    alone = [harness.score([("the cat", " sees the")], [own])[0] for own in (guided, plain)]
    assert both == alone and both[0] != both[1]
    sampled = Settings(writing=Options(temperature=1.0, seed=5))
    texts = harness.write([Until("the", (), 12, repeat) for repeat in range(3)], [sampled] * 3)
    assert len(set(texts)) == 3
    assert texts[2] == run.generate("the", gen_length=12, temperature=1.0, seed=7).removeprefix("the")


def test_lm_eval_finds_our_model_by_its_name(trained, evaluated):
    """Its own program: the class registered under `llada`, made from --model_args."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from llada.commands import harness

    if "llada" not in __import__("lm_eval").api.registry.model_registry:
        harness.register()
    arguments = {"workdir": str(trained["arm"].workdir), "step": 12, "greedy": False}
    model = get_model("llada").create_from_arg_obj(arguments, {"batch_size": 1, "device": None})
    requests = [Instance("loglikelihood", {}, (QUESTIONS[0], choice), i) for i, choice in enumerate(CHOICES)]
    found = [value for value, _ in model.loglikelihood(requests)]
    assert found == [float(resp[0][0]) for resp in evaluated["arm"].samples["choice"][0]["resps"]]
    assert (model.rank, model.world_size) == (0, 1)
    assert model.get_model_info()["parameters_sha256"] == trained["arm"].summary["parameters_sha256"]
    with pytest.raises(UserError, match="--model_args has drawz, which is none of workdir"):
        get_model("llada").create_from_arg_obj({"workdir": str(trained["arm"].workdir), "drawz": 3})
    assert harness.without_output(["run", "--output_path", "a", "-o", "b", "--output_path=c", "--limit", "2"]) == [
        "run",
        "--limit",
        "2",
    ]


@pytest.mark.parametrize(
    "family, words, message",
    [
        ("llada", ["--tasks=chioce"], "--tasks: there is no task chioce; did you mean choice?"),
        ("llada", ["--tasks=absent"], "task absent cannot be loaded"),
        ("llada", ["--tasks="], "--tasks is missing; give names of lm-eval's tasks, or --preset: one of paper-table1"),
        ("llada", ["--tasks=choice,choice"], "--tasks names choice twice"),
        ("llada", ["--tasks=choice", "--template=plain"], "--template=plain is for --chat"),
        ("llada", ["--tasks=choice", "--at=last"], "--at=last must be a step, or all"),
        ("llada", ["--tasks=choice", "--at=5"], "--at=5 is not saved in"),
        ("llada", ["--tasks=choice", "--limit=1.5"], "--limit=1.5 must be a number of documents, or a share"),
        ("llada", ["--tasks=choice", "--estimator=exact"], "--estimator=exact is not one of"),
        ("arm", ["--tasks=choice", "--draws=3"], "--draws=3 is for diffusion models; an ARM scores exactly, in order"),
        ("arm", ["--tasks=choice", "--cfg_scale=1"], "--cfg_scale=1.0 is for diffusion models"),
    ],
)
def test_mistakes_are_one_line(family, words, message, trained, tasks, tmp_path, monkeypatch):
    from llada.evaluation import lm_eval_tasks

    # Reading lm-eval's own 14,000 tasks, to look for one that there is not, takes long.
    few = functools.partial(lm_eval_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", few)
    given = [f"--workdir={trained[family].workdir}", f"--include_path={tasks}", f"--out={tmp_path}"]
    done = in_process.llada("lm_eval", *given, *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") <= 2, done.stderr


def test_presets_have_tasks_of_lm_eval_once():
    """Names as lm-eval has them: read from its own files, where a task or a group is declared."""
    import re
    from pathlib import Path

    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    names = {row.task for preset in PRESETS.values() for row in preset.rows}
    declared = re.compile(r"^(?:task|group|tag): *[\"']?([\w-]+)", re.M)
    places = ("mmlu", "bbh", "arc", "hellaswag", "truthfulqa", "winogrande", "piqa", "gsm8k", "benchmarks", "gpqa")
    places += ("humaneval", "mbpp", "cmmlu", "ceval", "mmlu_pro", "ifeval")
    found = {
        name
        for place in places
        for path in (folder / place).rglob("*.y*ml")
        for name in declared.findall(path.read_text())
    }
    assert names <= found, names - found
    for name, preset in PRESETS.items():
        assert len({row.task for row in preset.rows}) == len(preset.rows), name


def test_pictures_show_one_metric_a_task_and_errors_in_percent():
    at = downstream.Checkpoint("runs/a", downstream.Series(downstream.families.FAMILIES["diffusion"]), 4, 100, 1e9)
    results = {"t": {"alias": "t", "f1,none": 0.5, "acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.5}}
    found = downstream.readings(at, {"results": results})
    assert [(r.metric, r.value, r.stderr) for r in downstream.drawn(found)] == [("acc", 0.25, 0.01)]
    assert downstream.table(found)[1] == ["a", "4", "1e9", "25.0 ± 1.0"]


@pytest.mark.parametrize("words, asks", [(["--preset=paper-table2"], "--preset=paper-table2"), (["--chat"], "--chat")])
def test_a_model_without_a_template_is_asked_for_one(words, asks):
    """Imported base models have none."""
    lm_eval_flags.FLAGS.parse("lm_eval", words, str)
    with pytest.raises(UserError, match=f"{asks} asks for a chat template, and the model's tokenizer has none"):
        lm_eval_flags.template(SimpleNamespace(tokenizer=SimpleNamespace(template=None)))
    lm_eval_flags.FLAGS.parse("lm_eval", [], str)


def test_without_the_extra_it_is_one_line(trained, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = in_process.llada("lm_eval", f"--workdir={trained['arm'].workdir}", "--tasks=choice")
    assert done.returncode == 2 and "pip install 'llada-jax[eval]'" in done.stderr


def test_copies_of_runs_have_one_name_each(trained, tasks, tmp_path):
    for place in ("runs", ""):
        (tmp_path / place / "same").mkdir(parents=True)
        shutil.copy(trained["arm"].workdir / "config.json", tmp_path / place / "same")
        os.symlink(trained["arm"].workdir / "checkpoints", tmp_path / place / "same" / "checkpoints")
    done = in_process.llada("lm_eval", f"--workdir={tmp_path}", "--at=all", "--tasks=choice", f"--include_path={tasks}")
    assert done.returncode == 2 and "has two runs of one name" in done.stderr
