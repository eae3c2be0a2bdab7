"""Exports as PyTorch users meet them: fresh processes without JAX, offline, under both majors of transformers.

One process per major (`pytorch_user.py`) opens every export through the Auto classes and writes what it saw; the tests
compare that with our own model and samplers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import llada
from llada.inference import generation
from llada.interop.export import export
from llada.model import transformer

USER = Path(__file__).with_name("pytorch_user.py")
OTHER_MAJOR = Path(sys.prefix) / "transformers4"  # put there by launch/test.sh
MAJORS = ("this major", "the other major")
KINDS = {  # name -> (causal, changes to the model); the tolerance is for logits of about one
    "MHA": (False, {}),
    "GQA": (False, dict(kv_heads=2)),
    "tied": (False, dict(tie_embeddings=True)),
    "GQA, tied, qk-norm": (False, dict(kv_heads=2, tie_embeddings=True, qk_norm=True)),
    "ARM": (True, {}),
    "ARM, GQA, tied": (True, dict(kv_heads=2, tie_embeddings=True)),
    "ARM, qk-norm": (True, dict(qk_norm=True)),
}
PROMPTS = 100
TEXT = "the cat é sees the\n    dog"


@pytest.fixture(scope="module")
def exports(build, tmp_path_factory):
    """The place of all exports, `{name: workdir}`, and padded prompts."""
    place = tmp_path_factory.mktemp("exports")
    workdirs = {}
    for number, (name, (causal, changes)) in enumerate(KINDS.items()):
        workdirs[name] = build(causal, init_std=0.1, **changes)
        export(workdirs[name], place / str(number), shard_bytes=60_000)
    rng = np.random.default_rng(0)
    lengths_B = rng.integers(1, 33, PROMPTS)
    prompts_BL = rng.integers(4, 300, (PROMPTS, 32))
    np.savez(place / "prompts.npz", prompts=prompts_BL, lengths=lengths_B)
    return place, workdirs, prompts_BL, lengths_B


@pytest.fixture(scope="module")
def users(exports):
    """A process for each major of transformers, both at work at once."""
    place = exports[0]
    started = {}
    for major in MAJORS:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(place / f"home_{major}"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        if major == "the other major":
            assert OTHER_MAJOR.is_dir(), "launch/test.sh installs requirements-transformers4.txt there"
            environment["PYTHONPATH"] = str(OTHER_MAJOR)
        command = [sys.executable, str(USER), str(place), str(place / f"{major}.npz"), json.dumps(list(KINDS))]
        with (place / f"{major}.out").open("w") as out, (place / f"{major}.err").open("w") as err:
            started[major] = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=place)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=MAJORS)
def seen(request, exports, users):
    """What one major of transformers makes of the exports."""
    place, major = exports[0], request.param
    status = users[major].wait(300)
    assert status == 0, (place / f"{major}.err").read_text()[-3000:]
    return json.loads((place / f"{major}.out").read_text().splitlines()[-1]), dict(np.load(place / f"{major}.npz"))


def test_both_majors_are_tried(exports, seen, request):
    wanted = 5 if "this" in request.node.name else 4
    assert int(seen[0]["version"].split(".")[0]) == wanted


@pytest.mark.parametrize("name", list(KINDS))
def test_logits_are_ours(exports, seen, name):
    """100 random prompts in one padded batch, to 1e-5 in float32; the class is the one announced."""
    _, workdirs, prompts_BL, lengths_B = exports
    run = llada.load(workdirs[name])
    ours = np.asarray(run.logits(prompts_BL, lengths_B))
    theirs = seen[1][f"logits {name}"]
    valid_BL = np.arange(32) < lengths_B[:, None]
    assert np.abs(ours).max() > 0.5
    assert np.abs(ours - theirs)[valid_BL].max() < 1e-5
    causal, changes = KINDS[name]
    native = "Qwen3ForCausalLM" if changes.get("qk_norm") else "LlamaForCausalLM"
    assert seen[0]["classes"][name] == (native if causal else "LLaDAModelLM")


@pytest.mark.parametrize("name", list(KINDS))
def test_greedy_texts_are_ours(exports, seen, name):
    """`generate` there and `llada sample` here, from the same text."""
    run = llada.load(exports[1][name])
    request = generation.Request(prompt=TEXT, gen_length=12)
    ours = generation.generate(run.config, run.params, run.tokenizer, [request])[0]
    theirs = seen[0]["texts"][name]
    if run.config.model.causal:
        assert theirs[0] == run.tokenizer.eos_id  # the tokenizer puts what our rows begin with
        theirs = theirs[1:]
        # Ours fills up behind an end token, theirs stops.
        assert ours.ids[: len(theirs)] == theirs and set(ours.ids[len(theirs) :]) <= {run.tokenizer.eos_id}
        assert len(theirs) > len(run.tokenizer.encode(TEXT))
    else:
        assert ours.ids == theirs
    assert seen[0]["decoded"][name].startswith(TEXT)


def test_tokenizers_are_ours(exports, seen):
    for name, workdir in exports[1].items():
        tokenizer = llada.load(workdir).tokenizer
        found = seen[0]["tokenizers"][name]
        assert found["ids"] == tokenizer.encode(TEXT)
        assert (found["mask"], found["eos"], found["pad"]) == (tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id)


def test_the_five_lines_of_the_docs_run_as_they_stand(exports):
    """With the path exchanged, in a process without JAX."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "pytorch.md").read_text()
    block = page.split("```python\nfrom transformers import")[1].split("```")[0]
    lines = ("from transformers import" + block).replace("runs/quickstart/export", str(exports[0] / "0"))
    lines = lines.replace("=32", "=8")
    assert len([line for line in lines.splitlines() if line.strip()]) == 5
    check = "\nimport sys; assert 'jax' not in sys.modules and 'llada' not in sys.modules"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(exports[0] / "home")}
    done = subprocess.run(
        [sys.executable, "-c", lines + check], capture_output=True, text=True, env=environment, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("def main():")


def test_a_card_of_a_trained_run_tells_its_figures(trained, tmp_path):
    export(trained["llada"].workdir, tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    summary = trained["llada"].summary
    for fact in (
        f"{summary['parameters']:,}",
        f"{summary['tokens']:,}",
        f"{summary['eval_nats_per_token']:.4f} ± {summary['eval_stderr']:.4f}",
        "upper bound",
        "library_name: transformers",
        "trust_remote_code=True",
    ):
        assert fact in card, fact
    export(trained["llada"].workdir, tmp_path / "early", step=4)  # no figure was taken then
    assert "nats" not in (tmp_path / "early/README.md").read_text()
    steps = [json.loads(line)["step"] for line in (trained["llada"].workdir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 12


def test_the_checks_can_fail(exports):
    """The tolerance sees a change of one layer's norm by a hundredth."""
    _, workdirs, prompts_BL, lengths_B = exports
    run = llada.load(workdirs["MHA"])
    params = jax.tree.map(lambda x: x, run.params)
    params["layers"]["ffn_norm"] = params["layers"]["ffn_norm"].at[1].mul(1.01)
    ours = transformer.logits(run.config.model, run.params, prompts_BL, lengths_B)
    assert np.abs(ours - transformer.logits(run.config.model, params, prompts_BL, lengths_B)).max() > 1e-4
