"""The exported PyTorch model against the JAX one: logits, samplers, laws, and loading in both majors of transformers.

`src/llada/interop/{configuration,modeling}_llada.py` travel with every checkpoint in Hugging Face's format and run
without this package, so they are tested as strangers meet them too: from a directory, in a process of their own.
"""

import ast
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from llada.config import ModelConfig
from llada.inference import sampler
from llada.inference.settings import SamplerConfig
from llada.interop.configuration_llada import LLaDAConfig
from llada.interop.modeling_llada import LLaDAModelLM
from llada.model import transformer
from llada.objectives.contract import SpecialTokens

torch.set_num_threads(1)  # more would only spin beside JAX's

CODE = Path(sys.modules[LLaDAModelLM.__module__].__file__).parent
V, MASK = 50, 3
ENDS = [28, 33]  # among the likeliest of the greedy predictions below, so that what is asked of them shows
SPECIAL = SpecialTokens(MASK, *ENDS)
SUPPRESSED = [0, 2]
FORBIDDEN = np.isin(np.arange(V), [*SUPPRESSED, MASK])
# init_std: large enough for attention that is not flat and for greedy choices without near ties.
COMMON = dict(layers=3, width=32, heads=4, ffn=48, vocab_size=V, max_length=48, init_std=0.3, dtype="float32")
MODELS = {
    "plain": ModelConfig(**COMMON),
    "grouped": ModelConfig(**COMMON, kv_heads=2),
    "tied": ModelConfig(**COMMON, tie_embeddings=True),
    "grouped, tied, qk-norm": ModelConfig(**COMMON, kv_heads=1, tie_embeddings=True, qk_norm=True),
}
NAMES = {
    "attention_norm": "attn_norm",
    "ffn_norm": "ff_norm",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "attn_out",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}


def fields(config: ModelConfig) -> dict:
    """The config.json of `config`: our own names turned into the released ones."""
    return dict(
        d_model=config.width,
        n_layers=config.layers,
        n_heads=config.heads,
        n_kv_heads=config.kv_heads,
        mlp_hidden_size=config.ffn,
        max_sequence_length=config.max_length,
        vocab_size=config.vocab_size,
        embedding_size=config.vocab_size,
        weight_tying=config.tie_embeddings,
        qk_norm=config.qk_norm,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        mask_token_id=MASK,
        eos_token_id=ENDS[0],
        pad_token_id=0,
    )


def state_dict(config: ModelConfig, params: dict) -> dict:
    """Parameters of `llada.model.transformer` under the released names, kernels as torch's (outputs, inputs)."""
    outer = {"wte": params["embedding"], "ln_f": params["final_norm"]}
    if not config.tie_embeddings:
        outer["ff_out"] = params["head"]
    arrays = {f"model.transformer.{name}.weight": leaf for name, leaf in outer.items()}
    for name, stacked in params["layers"].items():
        for layer, leaf in enumerate(stacked):
            if not name.endswith("_norm"):
                leaf = leaf.reshape(config.ffn if name == "down" else config.width, -1).T
            arrays[f"model.transformer.blocks.{layer}.{NAMES[name]}.weight"] = leaf
    return {name: torch.from_numpy(np.array(leaf, np.float32, order="C")) for name, leaf in arrays.items()}


@functools.cache
def parameters(config: ModelConfig) -> dict:
    """Random ones; norm scales too, which would not show if they were left at 1."""
    rng = np.random.default_rng(7)

    def leaf(path, like):
        name, normal = path[-1].key, rng.normal(size=like.shape).astype(np.float32)
        if name.endswith("norm"):
            return 1 + 0.2 * normal
        return config.init_std * normal / ((2 * config.layers) ** 0.5 if name in ("output", "down") else 1)

    return jax.tree_util.tree_map_with_path(leaf, transformer.abstract_parameters(config))


def build(name: str, **changes):
    """(config, JAX parameters, the same as LLaDAModelLM); `changes` are of our ModelConfig."""
    config = dataclasses.replace(MODELS[name], **changes)
    params = parameters(config)
    model = LLaDAModelLM(LLaDAConfig(**fields(config))).eval()
    model.load_state_dict(state_dict(config, params))  # strict: exactly the released names
    model.generation_config.suppress_tokens, model.generation_config.eos_token_id = SUPPRESSED, ENDS
    return config, params, model


@pytest.fixture(scope="module", params=["plain", "grouped, tied, qk-norm"])
def two(request):
    return build(request.param)


@pytest.fixture(scope="module")
def model():
    return build("grouped")[2]


@pytest.fixture(scope="module")
def prompt_BL():
    return np.random.default_rng(5).integers(4, V, (3, 9)).astype(np.int32)


def padded(rows, side, value=0):
    """(tokens_BL, attention_mask_BL) of rows of different lengths."""
    L = max(map(len, rows))
    place = {"left": lambda n: (L - n, 0), "right": lambda n: (0, L - n)}[side]
    tokens = [np.pad(row, place(len(row)), constant_values=value) for row in rows]
    seen = [np.pad(np.ones(len(row), np.int64), place(len(row))) for row in rows]
    return torch.tensor(np.stack(tokens)).long(), torch.tensor(np.stack(seen))


# Forward


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_jaxs_for_100_prompts_of_different_lengths(name):
    """To 1e-5, absolute, where logits have a standard deviation of 0.9 and reach 5.

    The largest difference seen is 4e-6, about what separates either from float64; it grows with the scale of the
    weights (6e-5 at the init_std of the other tests, with logits up to 8). JAX sees rows without padding, and padded on
    the right with `lengths_B`; here they are padded on either side, with the mask token, which must not matter.
    """
    config, params, model = build(name, init_std=0.15)
    logits = jax.jit(transformer.logits, static_argnums=0)
    rng = np.random.default_rng(1)
    lengths_B = rng.permuted([*rng.integers(1, 33, 80), *[17] * 20])
    rows = [rng.integers(0, V, length).astype(np.int32) for length in lengths_B]
    want = dict(enumerate(np.asarray(logits(config, params, padded(rows, "right")[0].numpy(), lengths_B))))
    alone = np.flatnonzero(lengths_B == 17)
    want |= dict(zip(alone, np.asarray(logits(config, params, np.stack([rows[i] for i in alone]))), strict=True))
    for side in ("right", "left"):
        tokens_BL, seen_BL = padded(rows, side, MASK)
        with torch.no_grad():
            got_BLV = model(tokens_BL, attention_mask=seen_BL).logits.numpy()
        assert np.isfinite(got_BLV).all()
        for i, length in enumerate(lengths_B):
            np.testing.assert_allclose(got_BLV[i][seen_BL[i].bool()], want[i][:length], rtol=0, atol=1e-5)
    assert 0.7 < np.std(np.concatenate([want[i][:length] for i, length in enumerate(lengths_B)])) < 1.1


def test_masks_that_allow_all_and_none_mean_the_same(model, prompt_BL):
    tokens_BL = torch.tensor(prompt_BL).long()
    with torch.no_grad():
        plain = model(tokens_BL).logits
        assert torch.equal(plain, model(tokens_BL, attention_mask=torch.ones_like(tokens_BL)).logits)
        assert torch.equal(plain, model(tokens_BL, attention_mask=torch.ones_like(tokens_BL).bool()).logits)
        assert torch.equal(plain, model(inputs_embeds=model.get_input_embeddings()(tokens_BL)).logits)
        # A row of nothing but padding, as batches of uneven size have: no NaN, and none in its neighbours.
        nothing = torch.ones_like(tokens_BL)
        nothing[1] = 0
        logits = model(tokens_BL, attention_mask=nothing).logits
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits[[0, 2]], plain[[0, 2]], rtol=0, atol=1e-5)


def test_a_cached_prefix_of_the_same_canvas_is_exact(two):
    """Its keys come from states that have seen the same tokens: nothing is approximate."""
    model, cut = two[2], 7
    tokens_BL = torch.tensor(np.random.default_rng(2).integers(0, V, (3, 20)))
    seen_BL = torch.ones_like(tokens_BL)
    seen_BL[0, :4] = 0
    for mask in (None, seen_BL):
        with torch.no_grad():
            whole = model(tokens_BL, attention_mask=mask, use_cache=True)
            past = tuple((key[:, :, :cut], value[:, :, :cut]) for key, value in whole.past_key_values)
            rest = model(tokens_BL[:, cut:], attention_mask=mask, past_key_values=past, use_cache=True)
            position_ids = torch.arange(cut, 20)
            told = model(tokens_BL[:, cut:], mask, position_ids, past_key_values=past)
        torch.testing.assert_close(rest.logits, whole.logits[:, cut:], rtol=0, atol=1e-5)
        assert torch.equal(told.logits, rest.logits) and told.past_key_values is None
        assert len(rest.past_key_values) == 3
        for kept, fresh in zip(whole.past_key_values, rest.past_key_values, strict=True):
            assert kept[0].shape == kept[1].shape == (3, model.config.n_kv_heads, 20, 8)
            torch.testing.assert_close(kept, fresh, rtol=0, atol=1e-5)


def test_hidden_states_and_tuples(model, prompt_BL):
    tokens_BL = torch.tensor(prompt_BL).long()
    output = model(tokens_BL, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(tokens_BL))
    assert torch.equal(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    (logits,) = model(tokens_BL, return_dict=False)
    assert torch.equal(logits, output.logits)


def test_bfloat16_is_near_float32(two, prompt_BL):
    tokens_BL, seen_BL = padded([prompt_BL[0], prompt_BL[1, :4]], "left")
    low = LLaDAModelLM(two[2].config).to(torch.bfloat16).eval()
    low.load_state_dict(two[2].state_dict())
    with torch.no_grad():
        got, want = low(tokens_BL, seen_BL).logits, two[2](tokens_BL, seen_BL).logits
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().mean() < 0.03 * want.std()
    tokens_BL = low.generate(tokens_BL, seen_BL, gen_length=8, block_length=4, cfg_scale=0.5, cache="prefix")
    assert tokens_BL.shape == (2, 17) and (tokens_BL[:, 9:] != MASK).all()


# The reverse process against the JAX sampler


def jax_tokens(config, params, rows, gen_length, **settings):
    """What our sampler writes behind each row; rows of different lengths are padded on the right."""
    canvases = [np.append(row, [MASK] * gen_length).astype(np.int32) for row in rows]
    ends_B = np.array([len(canvas) for canvas in canvases])
    canvas_BL = padded(canvases, "right")[0].numpy()
    lengths_B = None if len(set(ends_B)) == 1 else ends_B
    got = sampler.reverse_process(
        config, params, canvas_BL, SamplerConfig(**settings), SPECIAL, FORBIDDEN, lengths_B=lengths_B
    )
    return np.stack([row[end - gen_length : end] for row, end in zip(got.tokens_BL, ends_B, strict=True)])


GREEDY = {
    "pure": dict(steps=20, block_length=20),
    "quotas": dict(steps=8, block_length=20, eos="no_logits"),
    "blocks": dict(steps=12, block_length=5),
    "guided": dict(steps=10, block_length=10, cfg_scale=1.0),
    "ends last, uneven last block": dict(steps=24, block_length=8, eos="no_confidence"),
    "prefix cache": dict(steps=20, block_length=10, cache="prefix"),
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_are_jaxs(prompt_BL, name):
    config, params, model = build("plain" if name in ("pure", "guided", "prefix cache") else "grouped, tied, qk-norm")
    want = jax_tokens(config, params, prompt_BL, 20, **GREEDY[name])
    given = torch.tensor(prompt_BL).long()
    got = model.generate(given, gen_length=20, **GREEDY[name])
    assert torch.equal(got[:, :9], given)
    np.testing.assert_array_equal(got[:, 9:], want)
    for changed in {"eos", "cache"} & GREEDY[name].keys():
        usual = {key: value for key, value in GREEDY[name].items() if key != changed}
        assert not torch.equal(got, model.generate(given, gen_length=20, **usual))


@pytest.mark.parametrize("settings", [{}, dict(cache="prefix", cfg_scale=0.5)], ids=["plain", "prefix cache, guided"])
def test_padded_prompts_get_the_tokens_they_get_alone(prompt_BL, settings):
    config, params, model = build("grouped, tied, qk-norm" if settings else "plain")
    rows = [prompt_BL[0], prompt_BL[1, :3], prompt_BL[2, :6]]
    if not settings:
        rows.append(prompt_BL[0, :0])  # of no prompt: all positions have one law at first, and only rounding ranks them
    want = jax_tokens(config, params, rows, 16, steps=16, block_length=8, **settings)
    for side in ("left", "right"):
        tokens_BL, seen_BL = padded(rows, side)
        got = model.generate(tokens_BL, attention_mask=seen_BL, max_new_tokens=16, block_length=8, **settings)
        np.testing.assert_array_equal(got[:, 9:], want)
    for row, alone in zip(rows, want, strict=True):
        got = model.generate(torch.tensor(row)[None], gen_length=16, block_length=8, **settings)
        np.testing.assert_array_equal(got[0, len(row) :], alone)


@pytest.mark.parametrize("settings", [dict(steps=4, block_length=7, cfg_scale=0.5), dict(steps=8, block_length=4)])
def test_infilling_gives_jaxs_tokens(settings):
    config, params, model = build("grouped")
    canvas_BL = np.random.default_rng(4).integers(4, V, (2, 18))
    canvas_BL[0, [2, 3, 7, 8, 9, 15, 17]] = MASK
    canvas_BL[1, [0, 1, 5, 11, 12, 13]] = MASK
    want = sampler.reverse_process(config, params, canvas_BL, SamplerConfig(**settings), SPECIAL, FORBIDDEN)
    given = torch.tensor(canvas_BL)
    np.testing.assert_array_equal(model.fill(given, **settings), want.tokens_BL)
    assert (given == MASK).sum() == 13  # the caller's tensor is left as it was
    cached = model.fill(given, cache="prefix", **settings)
    assert (cached != MASK).all() and torch.equal(cached[given != MASK], given[given != MASK])


def test_only_masked_positions_of_the_block_meet_the_vocabulary(model, prompt_BL):
    rows = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    model.generate(torch.tensor(prompt_BL), gen_length=12, steps=6, block_length=6, cfg_scale=1.0)
    hook.remove()
    assert rows == [3 * n for n in (6, 4, 2, 6, 4, 2)]


# Laws


def law(model, tokens, temperature=1.0):
    """softmax(logits / temperature) over what may be written, (L, V), float64; and the clean log p beside it."""
    with torch.no_grad():
        logits_LV = model(torch.tensor([tokens])).logits[0].double()
    logits_LV[:, [*model.generation_config.suppress_tokens, MASK]] = -torch.inf
    return (logits_LV / temperature).softmax(-1).numpy(), logits_LV.log_softmax(-1).numpy()


def assert_law(counts, probabilities):
    """Chi-square; outcomes too rare for it are taken together."""
    counts, expected = counts.ravel(), probabilities.ravel() * counts.sum()
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    kept = expected > 0
    assert kept.sum() > 5
    assert scipy.stats.chisquare(counts[kept], expected[kept] / expected.sum() * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_one_token_follows_the_models_law_at_a_temperature(model, prompt_BL, temperature):
    prompt = prompt_BL[0].tolist()
    copies = torch.tensor([prompt] * 6000)
    generator = torch.Generator().manual_seed(3)
    got = model.generate(copies, gen_length=1, temperature=temperature, generator=generator)[:, -1]
    assert_law(np.bincount(got, minlength=V), law(model, [*prompt, MASK], temperature)[0][-1])


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_two_tokens_follow_the_law_of_the_process(model, prompt_BL, remasking):
    """By enumeration: both are drawn, one is kept (the one of higher clean probability, or either), one drawn anew."""
    prompt, temperature, few = prompt_BL[0, :5].tolist(), 1.5, [5, 11, 17, 23]
    suppressed = model.generation_config.suppress_tokens
    try:
        model.generation_config.suppress_tokens = [i for i in range(V) if i not in few]
        copies = torch.tensor([prompt] * 6000)
        generator = torch.Generator().manual_seed(4)
        got = model.generate(copies, gen_length=2, temperature=temperature, remasking=remasking, generator=generator)[
            :, -2:
        ]
        drawn, clean = (x[-2:] for x in law(model, [*prompt, MASK, MASK], temperature))
        want = np.zeros((V, V))
        for a in few:
            for b in few:
                first = clean[0, a] > clean[1, b] if remasking == "low_confidence" else 0.5
                both = drawn[0, a] * drawn[1, b]
                want[a] += both * first * law(model, [*prompt, a, MASK], temperature)[0][-1]
                want[:, b] += both * (1 - first) * law(model, [*prompt, MASK, b], temperature)[0][-2]
    finally:
        model.generation_config.suppress_tokens = suppressed
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(got.numpy().T), 1)
    assert want.sum() == pytest.approx(1)
    assert_law(counts, want)


def test_random_remasking_keeps_quotas_and_its_generator_decides(model, prompt_BL):
    def once(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(torch.tensor(prompt_BL), gen_length=12, steps=4, remasking="random", generator=generator)

    assert torch.equal(once(0), once(0)) and not torch.equal(once(0), once(1))
    assert (once(0) != MASK).all()


def test_neither_the_mask_nor_suppressed_ids_nor_rows_past_the_vocabulary_are_written(prompt_BL):
    """At this temperature each of the 60 rows of the embedding would come a hundred times or so."""
    _, _, small = build("plain")
    model = LLaDAModelLM(LLaDAConfig(**{**fields(MODELS["plain"]), "embedding_size": 60, "init_std": 0.3}))
    assert model(torch.tensor(prompt_BL)).logits.shape == (3, 9, 60)
    model.generation_config.suppress_tokens = SUPPRESSED
    copies = torch.tensor(prompt_BL).repeat(100, 1)
    for eos, ends in (("keep", []), ("no_logits", ENDS[:1])):  # config.json knows of one end
        got = model.generate(copies, gen_length=20, steps=2, temperature=20.0, eos=eos)[:, 9:]
        assert set(got.unique().tolist()) == set(range(V)) - {MASK, *SUPPRESSED, *ends}
    # Nor where the mask token is the likeliest of all.
    with torch.no_grad():
        small.get_output_embeddings().weight *= 0.01
        small.get_output_embeddings().weight[MASK] = small.model.transformer.ln_f.weight
        small.model.transformer.ln_f.weight.abs_()
    small.generation_config.suppress_tokens = None
    assert (small.generate(torch.tensor(prompt_BL), gen_length=8)[:, 9:] != MASK).all()


# Bad inputs


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(gen_length=0), ValueError, "gen_length=0 must be at least 1"),
        (dict(gen_length=8, block_length=9), ValueError, "block_length=9 must be between 1 and the 8"),
        (dict(gen_length=8, block_length=0), ValueError, "block_length=0 must be between"),
        (dict(gen_length=8, block_length=4, steps=3), ValueError, "steps=3 must be a positive multiple of the 2"),
        (dict(gen_length=8, steps=0), ValueError, "steps=0 must be a positive"),
        (dict(gen_length=8, steps=9), ValueError, "at most 8"),
        (dict(temperature=-1.0), ValueError, "temperature=-1.0 must be"),
        (dict(temperature=float("nan")), ValueError, "temperature=nan must be"),
        (dict(cfg_scale=-0.5), ValueError, "cfg_scale=-0.5 must be"),
        (dict(remasking="entropy"), ValueError, "'entropy' is not one of low_confidence, random"),
        (dict(eos="never"), ValueError, "eos='never' is not one of"),
        (dict(cache="dual"), ValueError, "cache='dual' is not one of none, prefix"),
        (dict(eos="no_confidence", remasking="random"), ValueError, "ranks by confidence"),
        (dict(gen_length=40), ValueError, "the canvas has 49 tokens, more than max_sequence_length=48"),
        (dict(num_beams=4, top_k=5), TypeError, "does not take num_beams, top_k.*gen_length"),
        (dict(streamer=object()), TypeError, "does not take streamer"),
        (dict(return_dict_in_generate=True), TypeError, "does not take return_dict_in_generate"),
        (dict(generation_config=GenerationConfig(num_beams=4)), TypeError, "does not take num_beams"),
        (dict(do_sample=False, temperature=0.5), ValueError, "do_sample=False and temperature=0.5 contradict"),
        (dict(max_length=9), ValueError, "gen_length=0 must be at least 1"),
        (dict(max_new_tokens=40), ValueError, "max_sequence_length=48; shorten the prompt or gen_length=40"),
    ],
)
def test_bad_settings_are_refused(model, prompt_BL, settings, error, message):
    with pytest.raises(error, match=message):
        model.generate(torch.tensor(prompt_BL), **settings)


@pytest.mark.parametrize(
    "options, length",
    [
        ({}, 39),
        (dict(do_sample=False, pad_token_id=0, eos_token_id=1, use_cache=True, num_beams=1, top_p=1.0), 39),
        (dict(max_length=14), 5),
        (dict(max_new_tokens=4, max_length=14), 4),
        (dict(generation_config=GenerationConfig(max_new_tokens=6)), 6),
        (dict(generation_config=GenerationConfig(max_new_tokens=90)), 39),
        (dict(generation_config=GenerationConfig(max_new_tokens=6), max_length=14), 5),
        (dict(generation_config=GenerationConfig(max_new_tokens=6), gen_length=7), 7),
    ],
)
def test_what_transformers_callers_pass_is_read(model, prompt_BL, options, length):
    """Lengths, and nothing but the most likely tokens while nobody asks to sample."""
    tokens_BL = torch.tensor(prompt_BL[:1])
    got = model.generate(tokens_BL, **options)
    assert got.shape == (1, 9 + length)
    assert (got == model.generate(tokens_BL, gen_length=length)).all()


def test_sampling_is_asked_for_as_in_transformers(model, prompt_BL):
    tokens_BL, wanted = torch.tensor(prompt_BL), {}
    for temperature in (0.7, 1.0):
        generator = torch.Generator().manual_seed(0)
        wanted[temperature] = model.generate(tokens_BL, gen_length=8, temperature=temperature, generator=generator)
    assert (wanted[0.7] != wanted[1.0]).any()
    for temperature, options in (
        (1.0, dict(do_sample=True)),
        (0.7, dict(do_sample=True, temperature=0.7)),
        (0.7, dict(generation_config=GenerationConfig(do_sample=True, temperature=0.7))),
    ):
        generator = torch.Generator().manual_seed(0)
        got = model.generate(tokens_BL, gen_length=8, generator=generator, **options)
        assert (got == wanted[temperature]).all()


def test_an_offloaded_model_works_where_its_input_is(prompt_BL):
    """Accelerate keeps weights on the meta device, and brings those of a module in for its forward."""
    _, _, model = build("grouped, tied, qk-norm")
    tokens_BL = torch.tensor(prompt_BL)
    wanted = model.generate(tokens_BL, gen_length=8, steps=2)

    def bring(module, _):
        for name, weight in module.away.items():
            module._parameters[name] = weight

    def take_away(module, *_):
        module.away = {name: weight for name, weight in module._parameters.items() if weight is not None}
        for name, weight in module.away.items():
            module._parameters[name] = torch.nn.Parameter(weight.to("meta"))

    for module in model.modules():
        if module._parameters:
            take_away(module)
            module.register_forward_pre_hook(bring)
            module.register_forward_hook(take_away)
    assert model.device.type == "meta"
    assert (model.generate(tokens_BL, gen_length=8, steps=2) == wanted).all()


def test_a_prompt_may_be_empty_but_not_fill_the_context(model):
    assert model.generate(None, max_new_tokens=4).shape == (1, 4)  # as the pipeline passes an empty text
    with pytest.raises(ValueError, match="fills all of max_sequence_length=48; gen_length has no room"):
        model.generate(torch.full((1, 48), 5))


def test_bad_inputs_are_refused(model, prompt_BL):
    tokens_BL = torch.tensor(prompt_BL).long()
    with pytest.raises(ValueError, match="masked_positions needs p_mask"):
        model(tokens_BL, labels=tokens_BL, masked_positions=tokens_BL > 9)
    with pytest.raises(ValueError, match="p_mask is"):
        model(tokens_BL, labels=tokens_BL, p_mask=torch.ones(3, 9))
    with pytest.raises(ValueError, match="only positions that have a label"):
        labels_BL = tokens_BL.masked_fill(tokens_BL > 9, -100)
        model(tokens_BL, labels=labels_BL, masked_positions=tokens_BL > 9, p_mask=torch.ones(3))
    with pytest.raises(ValueError, match="masked_positions and p_mask need labels"):
        model(tokens_BL, p_mask=torch.ones(3))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="attention_mask is"):
        model(tokens_BL, attention_mask=torch.ones(3, 8))
    with pytest.raises(ValueError, match="past_key_values must be"):
        model(tokens_BL, past_key_values=object())
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(tokens_BL, torch.ones(3, 8))
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(tokens_BL[0])
    with pytest.raises(ValueError, match=r"use fill\(\)"):
        model.generate(torch.full((1, 4), MASK))
    with pytest.raises(ValueError, match="block_length=0 must be between 1 and the 0"):
        model.fill(tokens_BL)
    with pytest.raises(ValueError, match="rows have 1 to 2 masks"):
        model.fill(torch.tensor([[5, MASK, 6, MASK], [5, 7, 6, MASK]]), block_length=1)
    with pytest.raises(TypeError, match="does not take gen_length"):
        model.fill(tokens_BL, gen_length=3)
    for changes, message in ((dict(mask_token_id=None), "mask_token_id"), (dict(eos_token_id=None), "eos_token_id")):
        with pytest.raises(ValueError, match=message):
            LLaDAModelLM(LLaDAConfig(**{**fields(MODELS["plain"]), **changes})).generate(tokens_BL, eos="no_logits")


# Configuration

RELEASED = dict(
    activation_type="silu",
    alibi=False,
    alibi_bias_max=8.0,
    attention_dropout=0.0,
    attention_layer_norm=False,
    attention_layer_norm_with_affine=True,
    bias_for_layer_norm=False,
    block_group_size=1,
    block_type="llama",
    d_model=4096,
    embedding_dropout=0.0,
    embedding_size=126464,
    eos_token_id=126081,
    flash_attention=False,
    include_bias=False,
    include_qkv_bias=False,
    init_cutoff_factor=None,
    init_device="meta",
    init_fn="mitchell",
    init_std=0.02,
    input_emb_norm=False,
    layer_norm_type="rms",
    layer_norm_with_affine=True,
    mask_token_id=126336,
    max_sequence_length=4096,
    mlp_hidden_size=12288,
    mlp_ratio=4,
    multi_query_attention=None,
    n_heads=32,
    n_kv_heads=32,
    n_layers=32,
    pad_token_id=126081,
    precision="amp_bf16",
    residual_dropout=0.0,
    rms_norm_eps=1e-5,
    rope=True,
    rope_full_precision=True,
    rope_theta=500000.0,
    scale_logits=False,
    use_cache=False,
    vocab_size=126464,
    weight_tying=False,
)


def test_the_configuration_is_the_released_one():
    found = LLaDAConfig(**RELEASED).to_dict()
    assert found["model_type"] == "llada"
    assert {name: found[name] for name in RELEASED} == RELEASED
    assert LLaDAConfig().to_dict() == found
    assert json.loads(LLaDAConfig().to_json_string()).items() >= {**RELEASED, "qk_norm": False}.items()


def test_the_configuration_answers_to_transformers_names_and_fills_in_nulls():
    config = LLaDAConfig(**{**fields(MODELS["tied"]), "mlp_hidden_size": None, "embedding_size": None})
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert (config.num_key_value_heads, config.intermediate_size, config.embedding_size) == (4, 128, V)
    assert config.max_position_embeddings == 48
    assert config.tie_word_embeddings is True and LLaDAConfig().tie_word_embeddings is False
    named = LLaDAConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=None)
    assert (named.d_model, named.n_heads, named.n_kv_heads) == (64, 8, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(alibi=True, rope=False), "does not compute alibi=True, rope=False; it needs alibi=False, rope=True"),
        (dict(block_type="sequential"), "block_type='sequential'"),
        (dict(layer_norm_type="default"), "layer_norm_type"),
        (dict(activation_type="swiglu"), "activation_type"),
        (dict(include_bias=True), "include_bias"),
        (dict(include_qkv_bias=True), "include_qkv_bias"),
        (dict(bias_for_layer_norm=True), "bias_for_layer_norm"),
        (dict(attention_layer_norm=True), "attention_layer_norm"),
        (dict(scale_logits=True), "scale_logits"),
        (dict(input_emb_norm=True), "input_emb_norm"),
        (dict(block_group_size=2), "block_group_size"),
        (dict(multi_query_attention=True), "multi_query_attention"),
        (dict(n_heads=3), "heads of even size"),
        (dict(n_kv_heads=3), "n_kv_heads=3 does not divide n_heads=32"),
        (dict(embedding_size=100), "embedding_size=100 is smaller"),
        (dict(loss_normalization="tokens"), "loss_normalization='tokens' must be 'sequence' or 'token'"),
        (dict(loss_eps=1.0), "loss_eps=1.0 must be at least 0 and less than 1"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings=True contradicts weight_tying=False"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LLaDAConfig(**changes)


def test_a_resized_vocabulary_is_saved_and_loaded(tmp_path, prompt_BL):
    for name in ("plain", "tied"):
        _, _, model = build(name)
        model.resize_token_embeddings(64)
        model.save_pretrained(tmp_path)
        again = LLaDAModelLM.from_pretrained(tmp_path)
        assert (again.config.vocab_size, again.config.embedding_size) == (64, 64)
        tokens_BL = torch.tensor(prompt_BL)
        assert torch.equal(model(tokens_BL).logits, again(tokens_BL).logits)


# As strangers meet it

CHILD = """
import json, sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
major, out, *directories = sys.argv[1:]
assert transformers.__version__.split(".")[0] == major, transformers.__version__
for directory in directories:
    wanted = torch.load(Path(directory) / "wanted.pt")
    raw = json.loads((Path(directory) / "config.json").read_text())
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    for name, value in raw.items():
        if name not in ("auto_map", "architectures", "transformers_version", "dtype", "torch_dtype"):
            assert getattr(config, name) == value, name
    assert config.tie_word_embeddings is raw["weight_tying"]
    model, info = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
    assert type(model).__name__ == "LLaDAModelLM" and type(model).__module__.startswith("transformers_modules.")
    assert type(AutoModel.from_pretrained(directory, trust_remote_code=True)).__name__ == "LLaDAModelLM"
    assert model.dtype == torch.float32 and not model.training and not list(model.buffers())
    assert model.generation_config.suppress_tokens == [0, 2]
    assert any("ff_out" in name and "blocks" not in name for name, _ in model.named_parameters()) != raw["weight_tying"]

    with torch.no_grad():
        logits = model(**wanted["given"]).logits
    assert torch.equal(logits, wanted["logits"]), (logits - wanted["logits"]).abs().max()
    assert torch.equal(model.generate(**wanted["given"], **wanted["settings"]), wanted["tokens"])

    saved = Path(out) / Path(directory).name
    model.save_pretrained(saved)
    (saved / "wanted.pt").write_bytes((Path(directory) / "wanted.pt").read_bytes())
    files = {file.name for file in saved.iterdir()}
    assert {"configuration_llada.py", "generation_llada.py", "modeling_llada.py", "generation_config.json"} <= files
    again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**wanted["given"]).logits, logits)
    kept = json.loads((saved / "config.json").read_text())
    assert {name: kept[name] for name in raw if name not in ("auto_map", "transformers_version")} == {
        name: value for name, value in raw.items() if name not in ("auto_map", "transformers_version")
    }
    assert "rope_parameters" not in kept

    low = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert low.generate(**wanted["given"], **wanted["settings"]).shape == wanted["tokens"].shape

    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True).model.transformer
    assert abs(fresh["wte"].weight.std() / config.init_std - 1) < 0.1
    assert abs(fresh["blocks"][0].ff_out.weight.std() / config.init_std * 6**0.5 - 1) < 0.2
    assert (fresh["ln_f"].weight == 1).all()
print("all is well")
"""


def directory(path: Path, name: str, prompt_BL) -> Path:
    """A directory as the exporter writes it, and what its model must answer."""
    config, params, model = build(name)
    path.mkdir()
    for file in ("configuration_llada.py", "generation_llada.py", "modeling_llada.py"):
        shutil.copy(CODE / file, path)
    raw = {**RELEASED, **fields(config), "n_kv_heads": config.key_value_heads, "model_type": "llada"}
    raw |= dict(architectures=["LLaDAModelLM"], dtype="float32", transformers_version="4.57.6")
    raw["auto_map"] = {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    }
    (path / "config.json").write_text(json.dumps(raw))
    (path / "generation_config.json").write_text(json.dumps(dict(suppress_tokens=SUPPRESSED, eos_token_id=ENDS)))
    save_file(state_dict(config, params), path / "model.safetensors", metadata={"format": "pt"})
    tokens_BL, seen_BL = padded([prompt_BL[0], prompt_BL[1, :5]], "left")
    given = dict(input_ids=tokens_BL, attention_mask=seen_BL)
    settings = dict(gen_length=12, steps=6, block_length=6)
    with torch.no_grad():
        wanted = dict(logits=model(**given).logits, tokens=model.generate(**given, **settings))
    torch.save(dict(given=given, settings=settings, **wanted), path / "wanted.pt")
    return path


def test_both_majors_load_the_directory_in_a_process_of_their_own(tmp_path, prompt_BL):
    """Without a network and without this package; transformers 4 also loads what transformers 5 has saved."""
    transformers4 = Path(sys.prefix) / "transformers4"
    assert (transformers4 / "transformers").is_dir(), (
        f"transformers 4 is missing: pip install --no-deps --target {transformers4} "
        "transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2"
    )
    given = [directory(tmp_path / "untied", "plain", prompt_BL)]
    given += [directory(tmp_path / "tied", "grouped, tied, qk-norm", prompt_BL)]
    for major, path in (("5", ""), ("4", str(transformers4))):
        out = tmp_path / f"saved{major}"
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS"))
        }
        environment |= dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / f"home{major}"), PYTHONPATH=path)
        environment |= dict(HF_MODULES_CACHE=str(tmp_path / f"modules{major}"), OMP_NUM_THREADS="1")
        done = subprocess.run(
            [sys.executable, "-c", CHILD, major, out, *given],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "all is well" in done.stdout, done.stderr[-3000:]
        given += [out / "tied"]


def test_the_files_need_no_more_than_python_39_torch_and_transformers():
    for name in ("configuration_llada", "generation_llada", "modeling_llada"):
        tree = ast.parse((CODE / f"{name}.py").read_text(), feature_version=(3, 9))
        names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        froms = {"." * node.level + node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found = {name if name.startswith(".") else name.split(".")[0] for name in names | froms}
        ours = {".configuration_llada", ".generation_llada"}
        assert found <= {"torch", "transformers", "copy", "functools", "math", "__future__", *ours}
