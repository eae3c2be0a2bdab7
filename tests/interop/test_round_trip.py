"""Out and in again: the released names and shapes, the same bits back, little memory, nothing half-written."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

import llada
from llada.config import default_config, from_config_dict
from llada.errors import UserError
from llada.interop import importing, layout, schema, source_tokenizer
from llada.interop.export import export
from llada.objectives import families
from llada.objectives.contract import SpecialTokens
from llada.training.checkpoint import Checkpoints

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
# config.json of GSAI-ML/LLaDA-8B-Base, key by key.
RELEASED = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


def llada_8b():
    import runpy

    return from_config_dict(runpy.run_path(str(EXPERIMENTS / "llada_8b.py"))["get_config"]())


def test_llada_8b_has_the_released_names_shapes_size_and_config():
    """Nothing is allocated: shapes come from `jax.eval_shape`."""
    config = llada_8b()
    found = {tensor.name: tensor.shape for tensor in layout.tensors(config.model, schema.LLADA.names)}
    D, F, V = 4096, 12288, 126464
    released = {
        "model.transformer.wte.weight": (V, D),
        "model.transformer.ln_f.weight": (D,),
        "model.transformer.ff_out.weight": (V, D),
    }
    for i in range(32):
        block = f"model.transformer.blocks.{i}"
        released |= {f"{block}.{name}.weight": (D,) for name in ("attn_norm", "ff_norm")}
        released |= {f"{block}.{name}.weight": (D, D) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        released |= {f"{block}.{name}.weight": (F, D) for name in ("ff_proj", "up_proj")}
        released |= {f"{block}.ff_out.weight": (D, F)}
    assert found == released
    shards = importing_plan(config, "bfloat16")
    assert shards["metadata"]["total_size"] == 16_031_162_368  # the released index says so
    assert set(shards["weight_map"]) == set(released)
    written = schema.LLADA.to_json(config.model, SpecialTokens(mask=126336, eos=126081), 126081)
    assert {key: written[key] for key in RELEASED} == RELEASED
    assert written.keys() - RELEASED.keys() == {"transformers_version"}
    fields, special = schema.LLADA.from_json(RELEASED)
    for name, value in fields.items():
        wanted = getattr(config.model, name)
        assert value == (config.model.key_value_heads if name == "kv_heads" else wanted), name
    assert special == {"mask": 126336, "eos": 126081, "pad": 126081}


def importing_plan(config, dtype):
    from llada.interop import safetensors_files

    shards = safetensors_files.plan(layout.tensors(config.model, schema.LLADA.names), dtype, 5_000_000_000)
    assert [s.name for s in shards][:1] == ["model-00001-of-00004.safetensors"]
    return safetensors_files.index(shards, dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["LLaDA", "ARM"])
def test_out_and_in_again_gives_the_same_bits(build, tmp_path, causal, shape):
    workdir = build(causal, **shape)
    done = export(workdir, tmp_path / "hf", shard_bytes=40_000)
    assert done.shards > 1
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    tensors = {}
    for name in sorted(set(index["weight_map"].values())):
        file = load_file(tmp_path / "hf" / name)
        assert {n for n, where in index["weight_map"].items() if where == name} == set(file)
        tensors |= file
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values()) == done.weight_bytes
    source = importing.open_source(tmp_path / "hf")
    importing.write(source, from_config_dict(source.config), tmp_path / "back")
    old, new = llada.load(workdir), llada.load(tmp_path / "back")
    assert jax.tree.structure(old.params) == jax.tree.structure(new.params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), old.params, new.params)))
    settled = {"kv_heads": old.config.model.key_value_heads}  # None and its meaning are one
    assert dataclasses.replace(old.config.model, **settled) == new.config.model
    assert new.config.objective.name == old.config.objective.name
    assert new.tokenizer.special == old.tokenizer.special and new.tokenizer.pad_id == old.tokenizer.pad_id
    text = "def main():\n    the cat é 🎉  <mask>"
    assert new.tokenizer.encode(text.replace("<mask>", "")) == old.tokenizer.encode(text.replace("<mask>", ""))
    # And out once more: an imported model is a model.
    export(tmp_path / "back", tmp_path / "again", shard_bytes=40_000)
    for name in sorted(path.name for path in (tmp_path / "hf").iterdir()):
        if name not in ("README.md",):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_bfloat16_is_the_cast_and_imports_as_bfloat16(build, tmp_path):
    workdir = build(kv_heads=2)
    export(workdir, tmp_path / "exact")
    export(workdir, tmp_path / "half", dtype="bfloat16")
    exact, half = (load_file(tmp_path / name / "model-00001-of-00001.safetensors") for name in ("exact", "half"))
    for name, value in exact.items():
        assert np.array_equal(half[name], value.astype(ml_dtypes.bfloat16)), name
    source = importing.open_source(tmp_path / "half")
    assert source.config["model"]["dtype"] == "bfloat16"
    importing.write(source, from_config_dict(source.config), tmp_path / "back")
    query = llada.load(tmp_path / "back").params["layers"]["query"]
    wanted = llada.load(workdir).params["layers"]["query"].astype("bfloat16").astype("float32")
    assert (query == wanted).all() and query.dtype == np.float32


def test_neither_export_nor_import_holds_a_model(tmp_path):
    """Peak memory above that of a toy model stays below the largest of three shards, both ways.

    A real model's pieces are larger than any threshold (32 MB) to which glibc raises its own, so they leave the process
    when they are freed. These are smaller and may be kept for later: the variable asks for the same.
    """
    script = tmp_path / "measure.py"
    script.write_text("""
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import interop_speed, timing
place = Path(sys.argv[2])
interop_speed.make_workdir(place / "model", dict(layers=2, width=1024, heads=8, ffn=4096, vocab_size=49_152))
interop_speed.make_workdir(place / "toy", interop_speed.TOY)
peaks = {}
for name in ("toy", "model"):
    paths = [str(place / (kind + name)) for kind in ("", "hf_", "back_")]
    run = ["--program", "export", "--shard_gigabytes=0.1", "--paths", *paths[:2]]
    back = ["--program", "import", "--paths", *paths[1:]]
    peaks[name] = [timing.in_a_process(interop_speed.__file__, *arguments)["peak"] for arguments in (run, back)]
print(json.dumps(peaks))
""")
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    command = [sys.executable, str(script), str(benchmarks), str(tmp_path)]
    variables = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={1 << 20}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
    peaks = json.loads(done.stdout.splitlines()[-1])
    shards = [path.stat().st_size for path in (tmp_path / "hf_model").glob("*.safetensors")]
    assert len(shards) == 3 and max(shards) > 100_000_000
    for way in (0, 1):
        assert peaks["model"][way] - peaks["toy"][way] < max(shards), (peaks, shards)


def test_a_killed_export_leaves_nothing_that_looks_like_one_and_the_next_call_succeeds(build, tmp_path):
    workdir = build()
    script = f"""
import time
from pathlib import Path
from llada.interop import export
def slowly(done, total):
    print("at work", flush=True)
    time.sleep(60)
export.export(Path({str(workdir)!r}), Path({str(tmp_path / "hf")!r}), progress=slowly)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob("*/config.json"))
    export(workdir, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    # A second export needs to be told that the first may go, and never removes what it did not write.
    with pytest.raises(UserError, match="exists already"):
        export(workdir, tmp_path / "hf")
    before = (tmp_path / "hf/config.json").stat().st_mtime_ns
    time.sleep(0.01)
    export(workdir, tmp_path / "hf", dtype="bfloat16", overwrite=True)
    assert (tmp_path / "hf/config.json").stat().st_mtime_ns > before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    (tmp_path / "hf/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis.txt, which no export wrote"):
        export(workdir, tmp_path / "hf", overwrite=True)
    assert (tmp_path / "hf/thesis.txt").read_text() == "mine"


def test_an_arm_becomes_a_mask_predictor_and_trains_with_other_data(build, corpus, tmp_path):
    """Weights are kept, attention opens, and all but the model may still be chosen."""
    from llada.training import loop

    export(build(True, kv_heads=2), tmp_path / "hf")
    ours = tmp_path / "ours"
    shutil.copytree(build(True, kv_heads=2), ours)
    config = json.loads((ours / "config.json").read_text())
    config["objective"]["input_masking"] = 0.25  # which no mask predictor takes
    (ours / "config.json").write_text(json.dumps(config))
    for source in (tmp_path / "hf", ours):  # a Llama directory; a workdir of ours
        opened = importing.open_source(source, objective="diffusion")
        workdir = tmp_path / f"from_{source.name}"
        importing.write(opened, from_config_dict(opened.config), workdir)
        run = llada.load(workdir)
        assert (run.config.model.causal, run.config.objective.name) == (False, "diffusion")
        old = llada.load(build(True, kv_heads=2))
        assert (run.params["layers"]["gate"] == old.params["layers"]["gate"]).all()
        tokens = np.arange(4, 14)[None]
        assert not np.allclose(run.logits(tokens)[0, 0], old.logits(tokens)[0, 0])  # the first position sees the last
    changed = {"data": {"source": f"text:{corpus}/*.txt", "sequence_length": 32, "holdout_fraction": 0.2}}
    changed |= {
        "train": {"batch_size": 4, "steps": 3, "log_every": 1},
        "evaluate": {"every": 0, "batches": 1, "draws": 1},
    }
    tree = {**opened.config, **{group: opened.config[group] | values for group, values in changed.items()}}
    summary = loop.train(from_config_dict(tree), workdir)
    assert summary["step"] == 3 and summary["objective"] == "diffusion"
    steps = Checkpoints(workdir).steps()
    assert steps[-1] == 3
    tree["data"] = tree["data"] | {"sequence_length": 16}
    with pytest.raises(UserError, match="data.sequence_length: 32 -> 16"):  # now it is a run like any other
        loop.train(from_config_dict(tree), workdir)
    tree["data"] = tree["data"] | {"sequence_length": 32}
    tree["model"] = tree["model"] | {"layers": 2}
    with pytest.raises(UserError, match="model.layers"):
        loop.train(from_config_dict(tree), tmp_path / "from_hf")


def test_illada_s_layout_comes_in(build, tokenizer, tmp_path):
    """Llama's names under another model_type, bidirectional, grouped, tied; the mask is in the tokenizer only."""
    export(build(True, kv_heads=2, tie_embeddings=True), tmp_path / "hf")
    values = json.loads((tmp_path / "hf/config.json").read_text())
    values |= {"model_type": "illada", "architectures": ["ILLaDAForCausalLM"], "layer_norm_eps": None}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}  # transformers 5
    (tmp_path / "hf/config.json").write_text(json.dumps(values))
    source = importing.open_source(tmp_path / "hf")
    config = from_config_dict(source.config)
    assert (config.model.causal, config.objective.name) == (False, "diffusion")
    assert (config.model.tie_embeddings, config.model.kv_heads, config.model.rope_theta) == (True, 2, 500_000.0)
    assert source.tokenizer.mask_id == tokenizer.mask_id


def test_a_mask_is_found_for_models_that_have_none(build, tokenizer, tmp_path):
    export(build(True), tmp_path / "hf")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((tmp_path / "hf" / name).read_text())
        (tmp_path / "hf" / name).write_text(json.dumps({k: v for k, v in values.items() if "mask" not in str(v)}))
    path = tmp_path / "hf/tokenizer.json"
    path.write_text(path.read_text().replace("<mask>", "<|reserved_7|>"))
    beyond = importing.open_source(tmp_path / "hf").tokenizer.mask_id
    assert beyond == tokenizer.vocab_size  # a row of the table that no token uses
    named = importing.open_source(tmp_path / "hf", mask_token="<|reserved_7|>").tokenizer
    assert named.mask_id == tokenizer.mask_id and named.piece(named.mask_id) == "<|reserved_7|>"
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["vocab_size"] > tokenizer.vocab_size
    assert source_tokenizer._free_id({"a": 0, "<unk>": 1, "<|reserved_7|>": 2}, 3) == 2
    assert source_tokenizer._free_id({"a": 0, "<unk>": 1}, 2) == 1


def test_a_llama_with_only_a_sentencepiece_model_comes_in(build, tokenizer, tmp_path):
    workdir = build(True)
    export(workdir, tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "hf" / name).unlink()
    (tmp_path / "hf/tokenizer.model").write_bytes(tokenizer.content)
    found = importing.open_source(tmp_path / "hf").tokenizer
    text = "the cat\n  sees é"
    assert found.encode(text) == tokenizer.encode(text) and found.special == tokenizer.special
    # As Llama 2 has it: no mask, no padding, a prefix space; here and there -1 stands for no id.
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sees the dog"] * 50), model_writer=writer, vocab_size=278, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", num_threads=1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "hf/tokenizer.model").write_bytes(writer.getvalue())
    values = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(values | {"eos_token_id": 2, "pad_token_id": -1}))
    found = importing.open_source(tmp_path / "hf").tokenizer
    assert found.decode(found.encode("the cat sees")) == "the cat sees"
    assert (found.mask_id, found.eos_id, found.pad_id) == (278, 2, 2)


def test_defaults_are_safe_for_every_context(build):
    config = default_config().to_dict()
    tree = importing._default_tree({"max_length": 8192, "causal": True}, families.AUTOREGRESSIVE)
    assert tree["data"]["sequence_length"] == 8192
    assert config["data"]["sequence_length"] != 8192  # the defaults themselves stay as they are
    assert schema.LLAMA.names.keys() == schema.LLADA.names.keys()
