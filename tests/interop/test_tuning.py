"""Fine-tuning an export in PyTorch: its loss is ours, Eq. (3) and Eq. (5); Trainer and LoRA run on it, in both majors.

`tuning_user.py` is what strangers do with the Auto classes, in processes of their own; the tests here look closer.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
import torch

import llada
from llada.config import from_config_dict
from llada.interop import importing, layout
from llada.interop.export import export
from llada.interop.modeling_llada import LLaDAModelLM
from llada.interop.schema import LLADA
from llada.model import transformer
from llada.objectives import diffusion
from llada.objectives import noise as noise_lib
from llada.objectives.contract import ANSWER, CONTEXT, PADDING, Examples

USER = Path(__file__).with_name("tuning_user.py")
OTHER_MAJOR = Path(sys.prefix) / "transformers4"  # put there by launch/test.sh
B, L, V = 5, 24, 320
LENGTHS_B = np.array([24, 20, 24, 13, 24])  # behind them is padding that nobody sees
PROMPTS_B = np.array([7, 3, 15, 12, 0])


@pytest.fixture(scope="module")
def both(build, tmp_path_factory):
    """A Run, and the same model in PyTorch: grouped queries, tied, with qk-norm."""
    workdir, out = build(kv_heads=2, tie_embeddings=True, qk_norm=True, init_std=0.1), tmp_path_factory.mktemp("export")
    export(workdir, out / "hf")
    torch.set_num_threads(1)
    return llada.load(workdir), LLaDAModelLM.from_pretrained(out / "hf")


@pytest.fixture(scope="module")
def batch():
    """Prompts, answers, and at the end of two answers padding that is predicted like the answer."""
    position_BL = np.arange(L)[None].repeat(B, axis=0)
    role_BL = np.where(position_BL < PROMPTS_B[:, None], CONTEXT, ANSWER)
    role_BL[[0, 2], -4:] = PADDING
    there_BL = position_BL < LENGTHS_B[:, None]
    tokens_BL = np.random.default_rng(0).integers(4, 300, (B, L))
    arrays = np.where(there_BL, tokens_BL, 0), there_BL, np.where(there_BL, role_BL, CONTEXT)
    return Examples(*(array.astype(np.int32) for array in arrays))


NOISE = noise_lib.Noise(3, 1, np.arange(B), B)


def masks(config, labelled_BL):
    """The p and the masks that our objectives draw from NOISE, for PyTorch."""
    p_B = (1 - config.eps) * np.asarray(noise_lib.times(NOISE, config.time_sampling)) + config.eps
    uniform_BL = np.asarray(noise_lib.uniform(NOISE, noise_lib.MASK, (L,)))
    masked_BL = (uniform_BL < p_B[:, None]) & labelled_BL
    return dict(masked_positions=torch.tensor(masked_BL), p_mask=torch.tensor(p_B))


def given(tokens_BL, labelled_BL, allowed_BL=None):
    """Arguments of the PyTorch model."""
    tokens_BL = torch.tensor(np.asarray(tokens_BL)).long()
    labels_BL = tokens_BL.masked_fill(~torch.tensor(labelled_BL), -100)
    allowed = {} if allowed_BL is None else dict(attention_mask=torch.tensor(allowed_BL))
    return dict(input_ids=tokens_BL, labels=labels_BL, **allowed)


@pytest.mark.parametrize("kind", ["Eq. (3)", "Eq. (5)", "Eq. (5), by token"])
def test_the_loss_and_its_gradients_are_ours(both, batch, kind):
    """With the tokens, masks and p of our objectives: the loss to 1e-5, and the gradient of every weight."""
    run, model = both
    config = dataclasses.replace(run.config.objective, random_length_fraction=0.0)
    if kind == "Eq. (3)":
        batch = batch._replace(tokens_BL=np.random.default_rng(1).integers(4, 300, (B, L)).astype(np.int32))
        labelled_BL, allowed_BL = np.ones((B, L), bool), None
        model.config.loss_normalization = "sequence"
    else:
        normalization = "token" if "token" in kind else "sequence"
        config = dataclasses.replace(config, normalization=normalization)
        labelled_BL, allowed_BL = batch.role_BL != CONTEXT, batch.example_BL
        model.config.loss_normalization = normalization

    @jax.jit
    def ours(params):
        def predict(xt_BL, _):
            segments_BL = None if kind == "Eq. (3)" else batch.example_BL
            return transformer.hidden(run.config.model, params, xt_BL, None, segments_BL)

        objective, data = (diffusion.loss, batch.tokens_BL) if kind == "Eq. (3)" else (diffusion.answer_loss, batch)
        head_VD = transformer.head(run.config.model, params)
        terms = objective(predict, head_VD, data, NOISE, run.tokenizer.special, config)
        return terms.nats / terms.token_count

    want, want_gradients = jax.value_and_grad(ours)(run.params)
    model.train().zero_grad()
    output = model(**given(batch.tokens_BL, labelled_BL, allowed_BL), **masks(config, labelled_BL))
    output.loss.backward()
    assert output.logits is None and float(want) > 3
    assert abs(output.loss.item() - float(want)) < 1e-5
    for tensor in layout.tensors(run.config.model, LLADA.names):
        leaf = want_gradients
        for name in tensor.leaf.split("."):
            leaf = leaf[name]
        leaf = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
        got = model.get_parameter(tensor.name).grad.numpy()
        wanted = leaf.reshape(got.shape[::-1]).T if tensor.transposed else leaf
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


def test_what_is_drawn_is_the_forward_process(both):
    """t ~ U[0, 1), p = (1 - eps) t + eps, each labelled position masked with p; context and padding never."""
    _, model = both
    labels_BL = torch.full((4000, 8), 5)
    labels_BL[:, [0, 6]] = -100
    model.config.loss_eps = 0.2
    torch.manual_seed(0)
    masked_BL, p_B = model._masks(labels_BL, None, None)
    assert scipy.stats.kstest(p_B.numpy(), scipy.stats.uniform(0.2, 0.8).cdf).pvalue > 1e-3
    assert not masked_BL[:, [0, 6]].any()
    at_BL = masked_BL[:, [1, 2, 3, 4, 5, 7]].numpy()
    p_B1 = p_B.numpy()[:, None]
    z_L = (at_BL - p_B1).sum(axis=0) / np.sqrt((p_B1 * (1 - p_B1)).sum())
    pairs = (at_BL[:, :-1] - p_B1) * (at_BL[:, 1:] - p_B1)  # of independent ones the mean is 0
    assert np.abs(z_L).max() < 4 and abs(pairs.mean() / pairs.std() * np.sqrt(pairs.size)) < 4
    masked_BL, p_B = model._masks(labels_BL, None, torch.full((4000,), 0.3))
    assert (p_B == 0.3).all() and abs(masked_BL.sum() / (4000 * 6) - 0.3) < 0.02
    model.config.loss_eps = 1e-3


def test_ranks_that_were_seeded_alike_draw_differently(both, monkeypatch):
    labels_BL, drawn = torch.full((400, 8), 5), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        drawn.append(both[1]._masks(labels_BL, None, None)[1].numpy())
    assert scipy.stats.kstest(drawn[3], "uniform").pvalue > 1e-3
    gaps = np.diff(np.sort(drawn, axis=0), axis=0)
    np.testing.assert_allclose(gaps, 0.25 * (1 - 1e-3), atol=1e-5)  # the four t of a sequence number are stratified


def test_the_loss_is_the_mean_over_sequences_that_have_labels(both, batch):
    """Padding and neighbours change nothing; without any label, or any mask, the loss is 0 and has gradients."""
    _, model = both
    model.config.loss_normalization = "sequence"
    labelled_BL = batch.role_BL != CONTEXT
    arguments = given(batch.tokens_BL, labelled_BL, batch.example_BL) | masks(both[0].config.objective, labelled_BL)
    model.eval()
    with torch.no_grad():
        together = float(model(**arguments).loss)
        alone = []
        for i, length in enumerate(LENGTHS_B):
            its_own = {name: x[i : i + 1, :length] if x.dim() == 2 else x[i : i + 1] for name, x in arguments.items()}
            alone.append(float(model(**its_own).loss))
        assert abs(together - np.mean(alone)) < 1e-5 and len(set(alone)) == B
        one = arguments["labels"].clone()
        one[1:] = -100
        masked_BL = arguments["masked_positions"] & (one != -100)
        assert abs(float(model(**arguments | dict(labels=one, masked_positions=masked_BL)).loss) - alone[0]) < 1e-5
    model.train().zero_grad()
    for labels_BL in (torch.full((B, L), -100), arguments["labels"]):
        loss = model(**arguments | dict(labels=labels_BL, masked_positions=torch.zeros(B, L))).loss
        loss.backward()
        assert loss == 0 and all((weight.grad == 0).all() for weight in model.parameters())


def test_logits_in_evaluation_and_embeddings_instead_of_ids(both, batch):
    _, model = both
    labelled_BL = batch.role_BL != CONTEXT
    arguments = given(batch.tokens_BL, labelled_BL) | masks(both[0].config.objective, labelled_BL)
    with torch.no_grad():
        output = model.eval()(**arguments)
        corrupted_BL = arguments["input_ids"].masked_fill(arguments["masked_positions"], model.config.mask_token_id)
        assert torch.equal(output.logits, model(corrupted_BL).logits)
        assert model(**arguments, return_logits=False).logits is None
        embeds_BLD = model.get_input_embeddings()(arguments.pop("input_ids"))
        assert model(inputs_embeds=embeds_BLD, **arguments).loss == output.loss
        assert model.train()(inputs_embeds=embeds_BLD, **arguments).logits is None
        assert model(corrupted_BL).logits is not None
        loss, logits = model(inputs_embeds=embeds_BLD, **arguments, return_logits=True, return_dict=False)
        assert loss == output.loss and torch.equal(logits, output.logits)


def saved(model, arguments):
    """(loss, gradients, bytes saved for the backward pass but for weights, widths of what was saved)."""
    weights, kept = {weight.data_ptr() for weight in model.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**arguments).loss
    loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    shapes = [tensor.shape for tensor in kept.values()]
    return loss.detach(), gradients, sum(tensor.nbytes for tensor in kept.values()), {shape[-1:] for shape in shapes}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_memory_only(both, batch, reentrant):
    _, model = both
    labelled_BL = batch.role_BL != CONTEXT
    arguments = given(batch.tokens_BL, labelled_BL, batch.example_BL) | masks(both[0].config.objective, labelled_BL)
    loss, gradients, size, widths = saved(model.train(), arguments)
    assert (V,) not in widths  # no logits, here or there
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    try:
        assert all(block.gradient_checkpointing for block in model.model.transformer.blocks)
        again, same, less, widths = saved(model, arguments)
        # Drawn masks: whatever is recomputed, the draw is not.
        drawn = {name: value for name, value in arguments.items() if name not in ("masked_positions", "p_mask")}
        torch.manual_seed(1)
        random = saved(model, drawn)
    finally:
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert torch.equal(loss, again) and less < size / 3 and (V,) not in widths
    torch.manual_seed(1)
    for one, other in ((gradients, same), (saved(model, drawn)[1], random[1])):
        assert all(torch.allclose(x, y, rtol=0, atol=1e-7) for x, y in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def users(trained, tmp_path_factory):
    """`tuning_user.py` under each major, both at work at once; `{major: (process, place)}`."""
    place = tmp_path_factory.mktemp("tuning")
    export(trained["llada"].workdir, place / "hf")
    page = (Path(__file__).resolve().parents[2] / "docs" / "pytorch.md").read_text()
    block = page.split("```python\nfrom peft import")[1].split("```")[0]
    changes = {"runs/quickstart/export": str(place / "hf"), "max_steps=100": "max_steps=2, use_cpu=True"}
    for written, here in changes.items():
        assert written in block
        block = block.replace(written, here)
    (place / "of_docs.py").write_text("from peft import" + block)
    started = {}
    for major, path in (("5", ""), ("4", str(OTHER_MAJOR))):
        home = place / major
        home.mkdir()
        environment = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(home / "home"), CUDA_VISIBLE_DEVICES="")
        environment |= dict(PYTHONPATH=path, TENSORBOARD_LOGGING_DIR=str(home / "events"))
        with (home / "out").open("w") as out, (home / "err").open("w") as err:
            command = [sys.executable, str(USER), str(home), str(place / "hf")]
            started[major] = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=home), home
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("major", ["5", "4"])
def test_trainer_and_lora_run_for_three_steps(users, major, tmp_path):
    """Offline, under both majors; what LoRA's merged weights say in JAX after `llada import` is what they say there."""
    process, home = users[major]
    assert process.wait(600) == 0, (home / "err").read_text()[-3000:]
    facts = json.loads((home / "out").read_text().splitlines()[-1])
    assert facts["version"].split(".")[0] == major
    assert facts["full"]["after"] < facts["full"]["before"] and facts["lora"]["after"] < facts["lora"]["before"]
    source = importing.open_source(home / "merged")
    importing.write(source, from_config_dict(source.config), tmp_path / "back")
    wanted = torch.load(home / "merged.pt")
    logits_BLV = llada.load(tmp_path / "back").logits(wanted["tokens"].numpy().astype(np.int32))
    np.testing.assert_allclose(np.asarray(logits_BLV), wanted["logits"].numpy(), rtol=0, atol=1e-4)
