"""What is wrong with a directory is said in one line, before anything is written; nothing in it is ever executed."""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import in_process
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llada
from llada.config import from_config_dict
from llada.errors import UserError
from llada.interop import beginning, importing
from llada.interop.export import export

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00004.safetensors"
WTE = "model.transformer.wte.weight"


@pytest.fixture(scope="module")
def exported(build, tmp_path_factory):
    """Exports in four shards: a LLaDA's and an ARM's."""
    place = tmp_path_factory.mktemp("exported")
    for name, causal in (("hf", False), ("arm", True)):
        export(build(causal), place / name, shard_bytes=60_000)
        assert (place / name / SHARD).exists()
    return place


@pytest.fixture
def hf(exported, tmp_path):
    """A LLaDA's export, to be spoilt."""
    return Path(shutil.copytree(exported / "hf", tmp_path / "hf"))


@pytest.fixture
def arm(exported, tmp_path):
    """An ARM's export, to be changed."""
    return Path(shutil.copytree(exported / "arm", tmp_path / "hf"))


def edit(path, change):
    """Rewrite a JSON file: `change` alters what it is given, or returns another object."""
    values = json.loads(path.read_text())
    changed = change(values)
    path.write_text(json.dumps(changed if isinstance(changed, dict) else values))


def retensor(hf, change):
    """Rewrite the first shard with other tensors."""
    tensors = load_file(hf / SHARD)
    change(tensors)
    save_file(tensors, hf / SHARD, {"format": "pt"})


def config(**values):
    return lambda hf: edit(hf / "config.json", lambda old: old.update(values))


def index(change):
    return lambda hf: edit(hf / INDEX, lambda values: change(values["weight_map"]))


def truncated(hf):
    data = (hf / SHARD).read_bytes()
    (hf / SHARD).write_bytes(data[:-1000])


def pickled(hf):
    for path in hf.glob("*.safetensors*"):
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))


def fifo(name):
    return lambda hf: [(hf / name).unlink(), os.mkfifo(hf / name)]


def header(content: bytes):
    return lambda hf: (hf / SHARD).write_bytes(struct.pack("<Q", len(content)) + content)


class Canary:
    """Unpickling it would be seen."""

    def __reduce__(self):
        return os.system, ("touch /tmp/llada-canary",)


SPOILT = {
    "no config": (lambda hf: (hf / "config.json").unlink(), ["config.json", "--source", "cannot be read"]),
    "a config that is not JSON": (lambda hf: (hf / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "a config that is a list": (lambda hf: (hf / "config.json").write_text("[]"), ["config.json", "object"]),
    "JSON without end": (lambda hf: (hf / "config.json").write_text("[" * 100_000), ["config.json", "not JSON"]),
    "another architecture": (config(model_type="gpt2"), ["model_type='gpt2'", "llada, illada, llama"]),
    "no model_type": (config(model_type=None), ["model_type=None", "llada, illada, llama"]),
    "a field of another type": (config(d_model="32"), ["d_model='32'", "must be int"]),
    "true for a number": (config(n_layers=True), ["n_layers=True", "must be int"]),
    "a missing field": (
        lambda hf: edit(hf / "config.json", lambda v: {k: x for k, x in v.items() if k != "n_heads"}),
        ["lacks n_heads"],
    ),
    "alibi": (config(alibi=True), ["alibi=True", "not supported"]),
    "a value as long as a book": (config(alibi="a" * 100_000), ["alibi='aaa", "not supported"]),
    "an error that quotes a book": (
        lambda hf: edit(hf / "tokenizer.json", lambda v: v.update(truncation="a" * 100_000)),
        ["not a Hugging Face tokenizer", "..."],
    ),
    "biases": (config(include_bias=True), ["include_bias=True", "not supported"]),
    "heads that do not divide": (config(n_heads=5), ["heads=5", "divide"]),
    "a negative width": (config(d_model=-32), ["width=-32", "positive"]),
    "too many layers": (config(n_layers=10**6), ["1000000 layers", "tensors"]),
    "absurdly many layers": (config(n_layers=10**12), ["n_layers=1000000000000", "out of range"]),
    "a length that is no number of tokens": (config(max_sequence_length=1e30), ["max_sequence_length=1e+30", "int"]),
    "an endless length": (config(max_sequence_length=10**30), ["max_sequence_length=1000", "out of range"]),
    "a width beyond all memory": (config(d_model=10**12), ["d_model=1000", "out of range"]),
    "a width beyond this memory": (config(d_model=2**30), ["wte.weight", "[320, 1073741824]"]),
    "a vocabulary beyond this memory": (config(embedding_size=2**30), ["wte.weight", "[1073741824, 32]"]),
    "an infinite base": (config(rope_theta=float("inf")), ["rope_theta=inf", "out of range"]),
    "an end that is an object": (config(eos_token_id={}), ["eos_token_id={}", "token id"]),
    "an end that is true": (config(eos_token_id=True), ["eos_token_id=True", "token id"]),
    "an end beyond all ids": (config(eos_token_id=10**30), ["eos_token_id=1000", "token id"]),
    "another width": (config(d_model=64), ["wte.weight", "[320, 32]", "[320, 64]"]),
    "one layer too many": (config(n_layers=4), ["lacks", "blocks.3"]),
    "one layer too few": (config(n_layers=2), ["besides", "blocks.2"]),
    "ties that are not": (config(weight_tying=True), ["ties head and embedding", "ff_out.weight differs"]),
    "a mask outside": (config(mask_token_id=320), ["mask_token_id=320", "0 to 319"]),
    "no weights": (
        lambda hf: [path.unlink() for path in hf.glob("*.safetensors*")],
        ["neither model.safetensors nor model.safetensors.index.json", "00001-of-00002"],
    ),
    "no index and a shard missing": (
        lambda hf: [
            (hf / name).unlink() for name in ("model.safetensors.index.json", SHARD.replace("00001", "00003", 1))
        ],
        ["model-00003-of-00004.safetensors is not there"],
    ),
    "no index and shards of two exports": (
        lambda hf: [
            (hf / INDEX).unlink(),
            shutil.copy(hf / SHARD, hf / "model-00001-of-00002.safetensors"),
        ],
        ["00002 and of 00004", "index"],
    ),
    "no index and a tensor twice": (
        lambda hf: [
            (hf / INDEX).unlink(),
            shutil.copy(hf / SHARD, hf / "model-00002-of-00004.safetensors"),
        ],
        ["is in model-00002-of-00004", "another file"],
    ),
    "an index that never ends": (fifo(INDEX), ["index.json", "no regular file"]),
    "a config that never ends": (fifo("config.json"), ["config.json", "no regular file"]),
    "a tokenizer that never ends": (fifo("tokenizer.json"), ["tokenizer.json", "no regular file"]),
    "a shard that never ends": (fifo(SHARD), [SHARD, "not there"]),
    "a name too long for a file": (
        index(lambda m: m.update({WTE: "a" * 300 + ".safetensors"})),
        ["aaa...'", "not there"],
    ),
    "a name with a NUL": (index(lambda m: m.update({WTE: "a\0.safetensors"})), ["'a\\x00", "same"]),
    "weights that are no numbers": (
        lambda hf: retensor(hf, lambda t: t[WTE].__setitem__((7, 7), np.nan)),
        [WTE, "NaN or infinity", "--allow_nonfinite"],
    ),
    "weights beyond all numbers": (
        lambda hf: retensor(hf, lambda t: t[WTE].__setitem__((7, 7), -np.inf)),
        [WTE, "NaN or infinity", "--allow_nonfinite"],
    ),
    "a weight whose square is no number": (
        lambda hf: retensor(hf, lambda t: t[WTE].__setitem__((7, 7), -1e38)),
        [WTE, "beyond 1e+18", "--allow_nonfinite"],
    ),
    "an index without a map": (
        lambda hf: (hf / INDEX).write_text('{"weight_map": []}'),
        ["index.json", "no weight_map"],
    ),
    "an index that is no JSON": (
        lambda hf: (hf / INDEX).write_bytes(b"\xff"),
        ["index.json", "not UTF-8"],
    ),
    "a file name that is a number": (index(lambda m: m.update({WTE: 3})), ["no weight_map"]),
    "a path out of the directory": (index(lambda m: m.update({WTE: "../secret.safetensors"})), ["'../secret", "same"]),
    "an absolute path": (index(lambda m: m.update({WTE: "/etc/secret.safetensors"})), ["'/etc/secret", "same"]),
    "a shard of another format": (index(lambda m: m.update({WTE: "model.bin"})), ["'model.bin'", "safetensors"]),
    "a shard that is not there": (lambda hf: (hf / SHARD).unlink(), [SHARD, "not there"]),
    "a name the file lacks": (index(lambda m: m.update({"ghost": SHARD})), ["lacks, the tensor 'ghost'"]),
    "a name the index lacks": (index(lambda m: m.pop(WTE)), ["does not name", WTE]),
    "a truncated shard": (truncated, [SHARD, "not a whole safetensors file"]),
    "a header beyond the file": (
        lambda hf: (hf / SHARD).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        [SHARD, "not a whole"],
    ),
    "a header that is no JSON": (header(b"[[[["), [SHARD, "not a whole"]),
    "offsets beyond the file": (
        header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
        [SHARD, "not a whole"],
    ),
    "a tensor of another shape": (
        lambda hf: retensor(hf, lambda t: t.update({WTE: t[WTE][:-1].copy()})),
        ["wte.weight is [319, 32]", "[320, 32]"],
    ),
    "a tensor of integers": (
        lambda hf: retensor(hf, lambda t: t.update({WTE: t[WTE].astype(np.int32)})),
        ["wte.weight is I32", "F32, BF16, F16"],
    ),
    "only a pickle": (pickled, ["pytorch_model.bin is a pickle", "safetensors"]),
    "no tokenizer": (lambda hf: (hf / "tokenizer.json").unlink(), ["neither tokenizer.json nor tokenizer.model"]),
    "a tokenizer without tokens": (
        lambda hf: edit(
            hf / "tokenizer.json",
            lambda v: (
                v
                | {"added_tokens": [], "pre_tokenizer": None, "post_processor": None}
                | {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}
            ),
        ),
        ["the tokenizer has no tokens"],
    ),
    "a tokenizer that is none": (
        lambda hf: (hf / "tokenizer.json").write_text('{"model": 3}'),
        ["not a Hugging Face tokenizer"],
    ),
}


@pytest.mark.parametrize("name", list(SPOILT))
def test_a_spoilt_directory_gets_one_line_and_leaves_nothing(hf, tmp_path, name):
    spoil, words = SPOILT[name]
    spoil(hf)
    with pytest.raises(UserError) as caught:
        source = importing.open_source(hf)
        importing.write(source, from_config_dict(source.config), tmp_path / "back")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message, message
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.partial").exists()
    assert not os.path.exists("/tmp/llada-canary")


def test_a_run_begins_from_numbers_that_are_none_only_where_that_is_asked_for(hf, corpus, tmp_path):
    retensor(hf, lambda t: t[WTE].__setitem__((7, 7), np.nan))
    source = importing.open_source(hf).config
    tree = source | {"data": source["data"] | {"source": f"text:{corpus}/*.txt"}}
    with pytest.raises(UserError, match=f"--init: {WTE} holds NaN or infinity.*--allow_nonfinite takes it") as caught:
        beginning.begin(from_config_dict(tree), hf, tmp_path / "run")
    assert "--source" not in str(caught.value) and not (tmp_path / "run").exists()
    beginning.begin(from_config_dict(tree), hf, tmp_path / "run", allow_nonfinite=True)
    assert np.isnan(llada.load(tmp_path / "run").params["embedding"][7, 7])
    done = in_process.llada("train", "--allow_nonfinite", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and "--allow_nonfinite is about the weights of --init=DIR" in done.stderr


def test_a_tokenizer_larger_than_the_model_is_refused(build, tmp_path):
    export(build(), tmp_path / "big")
    export(build(vocab_size=312), tmp_path / "small")
    values = json.loads((tmp_path / "big/tokenizer.json").read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 312, "content": "<one more>"})
    (tmp_path / "small/tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="ids up to 312, the model a vocabulary of 312"):
        importing.open_source(tmp_path / "small")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(model_type="qwen2"), ["model_type='qwen2'"]),
        (dict(attention_bias=True), ["attention_bias=True"]),
        (dict(hidden_act="gelu"), ["hidden_act='gelu'"]),
        (dict(head_dim=16), ["head_dim=16", "hidden_size=32"]),
        (dict(sliding_window="a"), ["sliding_window='a'", "must be int"]),
        (dict(sliding_window=-4), ["max_length=-4", "positive"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5"]),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), ["rope_type='llama3'"]),
        (dict(rope_parameters=["x"]), ["rope_parameters"]),
    ],
)
def test_llamas_that_are_other_networks_are_refused(arm, change, words):
    edit(arm / "config.json", lambda values: values.update(change))
    with pytest.raises(UserError) as caught:
        importing.open_source(arm)
    for word in words:
        assert word in str(caught.value)


def test_code_in_the_directory_is_not_run(hf, tmp_path):
    """Every import runs in an interpreter in which running the directory's code would be seen."""
    for path in hf.glob("*.py"):
        path.write_text("raise SystemExit('the code of the directory was run')")
    script = (
        "import sys, builtins\n"
        "from llada.commands import program\n"
        f"status = program.main(['import', '--source={hf}', '--workdir={tmp_path / 'back'}'])\n"
        "assert not {'torch', 'transformers', 'pickle_canary'} & set(sys.modules), 'imported'\n"
        "sys.exit(status)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] > 0


def test_the_commands_refuse_in_one_line_with_status_2(build, tmp_path):
    workdir, out = build(), tmp_path / "hf"
    assert in_process.llada("export", f"--workdir={workdir}", f"--out={out}").returncode == 0
    for arguments, words in (
        (["export", f"--workdir={workdir}"], ["--out is missing"]),
        (["export", f"--workdir={tmp_path}", f"--out={tmp_path / 'x'}"], ["no config.json", "llada train"]),
        (["export", f"--workdir={workdir}", f"--out={out}"], ["--out=", "exists already"]),
        (["export", f"--workdir={workdir}", f"--out={tmp_path / 'x'}", "--step=7"], ["--step=7", "saved: 0"]),
        (["export", f"--workdir={workdir}", f"--out={tmp_path / 'x'}", "--dtype=int8"], ["float32, bfloat16"]),
        (["export", f"--workdir={workdir}", "--out=/proc/x"], ["--out=/proc/x", "cannot be written"]),
        (["import", f"--workdir={tmp_path / 'w'}"], ["--source is missing"]),
        (["import", "--source=/no/where", f"--workdir={tmp_path / 'w'}"], ["/no/where", "not a directory"]),
        (["import", f"--source={out}", f"--workdir={workdir}"], ["--workdir=", "exists already"]),
        (
            ["import", f"--source={out}", f"--workdir={tmp_path / 'w'}", "--config.model.width=64"],
            ["--config.model...", "[320, 64]"],
        ),
        (["import", f"--source={out}", f"--workdir={tmp_path / 'w'}", "--mask_token=<x>"], ["<x>", "not a token"]),
    ):
        done = in_process.llada(*arguments)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert lines[-1].startswith(f"llada {arguments[0]}:"), lines
        for word in words:
            assert word in lines[-1], lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_random_damage_is_refused_or_harmless(build, tmp_path):
    """Bytes changed, cut or added anywhere in any file: a UserError or a whole import, never another exception."""
    export(build(), tmp_path / "hf", shard_bytes=60_000)
    names = [SHARD, "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json"]
    whole = {name: (tmp_path / "hf" / name).read_bytes() for name in names}
    rng = random.Random(0)
    refused = 0
    for case in range(int(os.environ.get("LLADA_FUZZ", 150))):
        name = names[case % len(names)]
        data = bytearray(whole[name])
        # Headers are short; most damage should fall there.
        at = rng.randrange(min(len(data), rng.choice([64, 1_000, 100_000])))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        else:
            data[at : at + 8] = rng.choice([b"99999999", b"-1234567", b"[[[[[[[[", b"nullnull", b'"../../x'])
        (tmp_path / "hf" / name).write_bytes(data)
        try:
            source = importing.open_source(tmp_path / "hf")
            config = from_config_dict(source.config)
            sum(values.size for _, _, values in source.pieces(config))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), str(error)
        (tmp_path / "hf" / name).write_bytes(whole[name])
    assert refused > 30
