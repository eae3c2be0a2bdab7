"""Fine-tuning from a trained run: --init, resuming to the bit, two processes, both families, wrong calls."""

import dataclasses
import json
import math
import random
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from in_process import llada
from test_multihost import Launched, forks  # noqa: F401  # a fixture

import llada as package
from llada.config import from_config_dict, load
from llada.errors import UserError
from llada.interop import beginning
from llada.training import loop, metrics, resuming
from llada.training.checkpoint import Checkpoints
from llada.training.corpus import tokenizer_for

STEPS = 8
CLOCK = ("speed/tokens_per_second", "time/seconds")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, path = random.Random(0), tmp_path_factory.mktemp("dialogues") / "d.jsonl"
    nouns = "cat dog bird fish tree stone river cloud".split()
    with path.open("w") as file:
        for i in range(60):
            messages = []
            for _ in range(1 + i % 2):
                words = " ".join(rng.choices(nouns, k=1))
                messages += [{"role": "user", "content": words}, {"role": "assistant", "content": f"the {words} ."}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def experiment(tiny, data, tmp_path_factory):
    """The path of an experiment file, which has another model than the run that it begins from."""
    changes = {"data.source": f"dialogues:{data}", "objective.random_length_fraction": 0.0, "model.layers": 5}
    changes |= {"train.steps": STEPS, "train.batch_size": 4, "train.log_every": 2, "checkpoint.every": 2}
    changes |= {"dialogues.bucket": 8, "evaluate.every": 4, "evaluate.batches": 1, "checkpoint.keep": 9}
    changes["optimizer.schedule"] = "0:0 2it:1 100%:0.1"
    tree = json.dumps(dataclasses.asdict(tiny("llada", changes)))
    path = tmp_path_factory.mktemp("experiment") / "sft.py"
    path.write_text(f"import json\n\ndef get_config():\n    return json.loads({tree!r})\n")
    return path


@pytest.fixture(scope="module")
def tuned(trained, experiment, tmp_path_factory):
    """Both families' runs, each begun from the trained one, by the program."""
    runs = {}
    for family in ("llada", "arm"):
        workdir = tmp_path_factory.mktemp("tuned") / family
        done = llada("train", f"--config={experiment}", f"--init={trained[family].workdir}", f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr
        runs[family] = SimpleNamespace(workdir=workdir, summary=json.loads(done.stdout))
    return runs


def lines(workdir):
    found = metrics.read(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in found]


def parameters(workdir, step):
    with Checkpoints(workdir) as checkpoints:
        config = load(workdir / "config.json")
        mesh = loop.mesh_lib.make(config.mesh)
        return jax.tree.map(np.asarray, resuming.restore_state(checkpoints, config, mesh, step)[0])


def test_it_begins_with_the_parameters_and_the_model_of_the_run_that_init_names(tuned, trained):
    for family, run in tuned.items():
        begun, source = parameters(run.workdir, 0).params, parameters(trained[family].workdir, 12).params
        assert jax.tree.all(jax.tree.map(np.array_equal, begun, source))
        config = load(run.workdir / "config.json")
        assert config.model == load(trained[family].workdir / "config.json").model
        assert config.objective.name == run.summary["objective"]
        losses = [line["train/loss_nats_per_token"] for line in lines(run.workdir) if "train/grad_norm" in line]
        assert losses[-1] < losses[0] - 0.1


def test_both_families_read_the_same_examples_and_are_evaluated_on_the_same_answers(tuned):
    mine, other = tuned["llada"].summary, tuned["arm"].summary
    for name in ("rows_digest", "corpus_digest", "eval_rows_digest", "eval_rows", "tokenizer_sha256", "epochs"):
        assert mine[name] == other[name]


def test_the_loss_is_logged_by_time_and_so_is_the_share_of_padding(tuned):
    line = next(line for line in lines(tuned["llada"].workdir) if "train/padding_share" in line)
    assert 0 < line["train/padding_share"] < 1
    by_time = [value for name, value in line.items() if name.startswith("train/answer_nats_at_t")]
    assert 2 <= len(by_time) <= 10 and all(0 < value < 10 for value in by_time)
    assert not any("padding_share" in line for line in map(str, lines(tuned["arm"].workdir)))


@pytest.mark.parametrize("family", ["llada", "arm"])
def test_a_run_continued_from_the_middle_ends_with_the_same_bits(tuned, trained, experiment, tmp_path, family):
    """The same command again, on a workdir that lost its last checkpoints."""
    workdir = tmp_path / "continued"
    shutil.copytree(tuned[family].workdir, workdir)
    for step in (6, 8):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    (workdir / "summary.json").unlink()
    done = llada("train", f"--config={experiment}", f"--init={trained[family].workdir}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert lines(workdir) == lines(tuned[family].workdir)
    mine, other = parameters(workdir, STEPS), parameters(tuned[family].workdir, STEPS)
    assert jax.tree.all(jax.tree.map(np.array_equal, mine, other))
    assert json.loads(done.stdout)["rows_digest"] == tuned[family].summary["rows_digest"]


@pytest.mark.multihost
def test_two_processes_of_two_devices_with_microbatches_train_the_same(
    forks,  # noqa: F811
    tuned,
    trained,
    experiment,
    data,
    tmp_path,
):
    arguments = (f"--config={experiment}", f"--init={trained['llada'].workdir}", f"--workdir={tmp_path / 'run'}")
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=1", "--config.train.microbatches=2")
    Launched(forks, tmp_path / "log", 2, 1, *arguments, *mesh).finish()
    mine, other = lines(tmp_path / "run"), lines(tuned["llada"].workdir)
    assert len(mine) == len(other)
    for here, there in zip(mine, other, strict=True):
        assert here == pytest.approx(there, rel=2e-4)
    assert loop.read_summary(tmp_path / "run")["rows_digest"] == tuned["llada"].summary["rows_digest"]


def test_a_tuned_run_opens_writes_and_is_evaluated_as_any_other(tuned, tmp_path):
    for family, run in tuned.items():
        workdir = tmp_path / family
        shutil.copytree(run.workdir, workdir)
        opened = package.load(workdir)
        assert opened.tokenizer.template and opened.tokenizer.eot_id is not None
        done = llada("evaluate", f"--workdir={workdir}", "--draws=2")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["tokens"] < found["rows"] * 32 and found["eval_rows_digest"] == run.summary["eval_rows_digest"]


def test_epochs_are_counted_once_the_rows_are_known(tuned, trained, experiment, tmp_path):
    """A quarter of an epoch, then more of it, in a workdir whose rows are there already."""
    workdir = tmp_path / "run"
    arguments = (f"--config={experiment}", f"--init={trained['llada'].workdir}", f"--workdir={workdir}")
    per_step = tuned["llada"].summary["epochs"] / STEPS
    for epochs in (0.25, 0.4):
        done = llada("train", *arguments, f"--config.train.epochs={epochs}", "--config.optimizer.schedule=0:1")
        assert done.returncode == 0, done.stderr
        steps = math.ceil(epochs / per_step - 1e-6)
        assert json.loads(done.stdout)["step"] == steps == load(workdir / "config.json").train.steps
    both = llada("train", *arguments, "--config.train.epochs=1", "--config.train.steps=3")
    assert both.returncode == 2 and "--config.train.epochs, not steps=3 and epochs=1.0" in both.stderr


@pytest.mark.torch
@pytest.mark.parametrize("family", ["llada", "arm"])
def test_pytorch_answers_a_dialogue_as_chat_does(tuned, family, tmp_path):
    """At temperature 0, from the export alone: template, ids of the prompt, ids of the answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llada.inference.chat import Chat, Options

    done = llada("export", f"--workdir={tuned[family].workdir}", f"--out={tmp_path / 'export'}", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    options = {} if family == "arm" else {"block_length": 4, "steps": 6}
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "the cat ."}]
    messages.append({"role": "user", "content": "bird"})
    reply = Chat(package.load(tuned[family].workdir)).reply([messages], [Options(gen_length=12, **options)])[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = {"max_new_tokens": 12, "do_sample": False} if family == "arm" else {"gen_length": 12}
    written = model.generate(**inputs, **length, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    ends = [i for i, token in enumerate(written) if token in (tokenizer.eos_token_id, reply_end(tokenizer))]
    assert (written[: ends[0]] if ends else written) == reply.ids and reply.ids


def reply_end(tokenizer):
    return tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_a_template_of_ones_own_gets_the_control_tokens_that_it_names(tiny, data, tmp_path):
    """A ChatML file, without --init: the tokenizer is trained with its tokens."""
    path = tmp_path / "chatml.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    changes = {"data.source": f"dialogues:{data}", "objective.random_length_fraction": 0.0}
    made = tokenizer_for(tmp_path, tiny("llada", changes | {"dialogues.template": str(path)}))
    assert made.eot_id == made.token_id("<|im_end|>") is not None and made.template == path.read_text()
    reopened = tokenizer_for(tmp_path, tiny("llada", changes))  # the workdir's own counts from then on
    assert reopened.content == made.content


def test_wrong_calls_get_one_line_and_leave_nothing(tuned, trained, experiment, data, tmp_path):
    config, init, new = f"--config={experiment}", f"--init={trained['llada'].workdir}", f"--workdir={tmp_path}/a"
    cases = {
        "--config is missing": (init, new),
        "is not a directory": (config, "--init=/nowhere", new),
        "began from": (config, f"--init={tmp_path}", f"--workdir={tuned['llada'].workdir}"),
        "did not begin by --init": (config, init, f"--workdir={trained['arm'].workdir}"),
        "no file matches": (config, init, new, "--config.data.source=dialogues:x"),
        "makes other shapes": (config, init, new, "--config.model.layers=3"),
        "rows that no text uses": (config, init, new, "--config.dialogues.padding=rainbow"),
        "dialogues.bucket=7": (config, init, new, "--config.dialogues.bucket=7"),
        "not cut at random": (config, init, new, "--config.objective.random_length_fraction=0.5"),
    }
    for words, arguments in cases.items():
        done = llada("train", *arguments)
        assert done.returncode == 2 and words in done.stderr, (words, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "a").exists()
    saved = from_config_dict(json.loads((tuned["llada"].workdir / "config.json").read_text()))
    with pytest.raises(UserError, match="another experiment"):
        changed = dataclasses.replace(saved, dialogues=dataclasses.replace(saved.dialogues, turns="each"))
        loop.train(changed, tuned["llada"].workdir)
    assert beginning.adopt(dataclasses.asdict(saved), trained["llada"].workdir, tmp_path / "b")["model"]["layers"] == 2
