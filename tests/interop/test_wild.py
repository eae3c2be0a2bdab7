"""Models as others publish them: Llamas, Mistrals, Qwens of transformers, with SentencePiece models as Llama has."""

import functools
import io
import json

import in_process
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2

import llada
from llada.config import from_config_dict
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.errors import UserError
from llada.interop import importing, source_tokenizer
from llada.interop.export import export
from llada.model import transformer
from llada.objectives import autoregressive
from llada.training import corpus as corpus_lib

TEXT = "the  cat sees\n    the dog \u2581x"
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=300)
# model class, its config, what is then done to config.json, the context
PUBLISHED = {
    "Llama 1, as transformers 4.28 wrote it": (
        transformers.LlamaConfig(**SIZES, max_position_embeddings=64),
        dict(rope_parameters=..., head_dim=..., num_key_value_heads=..., tie_word_embeddings=..., attention_bias=...)
        | dict(mlp_bias=..., initializer_range=..., rms_norm_eps=..., pad_token_id=-1, torch_dtype="float16"),
        64,
    ),
    "Llama, nulls": (
        transformers.LlamaConfig(**SIZES, max_position_embeddings=64, num_key_value_heads=2),
        dict(rope_parameters=..., rope_theta=10000.0, rope_scaling=None, head_dim=None, pad_token_id=None),
        64,
    ),
    "Mistral, with a window": (
        transformers.MistralConfig(**SIZES, max_position_embeddings=64, num_key_value_heads=2, sliding_window=24),
        {},
        24,
    ),
    "Qwen 3": (
        transformers.Qwen3Config(
            **SIZES, max_position_embeddings=64, head_dim=8, num_key_value_heads=2, bos_token_id=1, eos_token_id=2
        ),
        {},
        64,
    ),
}


def spaced(lengths, mask: bool = False) -> bytes:
    """A model as Llama's: <unk> <s> </s>, a dummy prefix, bytes, and runs of spaces that all have the score -1e9."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sees the dog"] * 50), model_writer=model, vocab_size=278, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        minloglevel=2, control_symbols=["<mask>"] if mask else [],
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    assert not any("\u2581\u2581" in piece.piece for piece in proto.pieces)
    for length in lengths:
        proto.pieces.add(piece="\u2581" * length, score=-1e9, type=1)
    return proto.SerializeToString()


@pytest.mark.parametrize("lengths", [range(2, 17), [*range(2, 15), 16], [2, 3]], ids=["Llama", "Mistral", "few"])
def test_runs_of_spaces_of_one_score_are_cut_as_sentencepiece_cuts_them(lengths, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(spaced(lengths))
    files = source_tokenizer._from_sentencepiece(tmp_path, {}, {"bos": 1, "eos": 2})
    (tmp_path / "tokenizer.json").write_text(files["tokenizer.json"])
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = [" " * n for n in range(70)] + [f"the{' ' * n}cat\n{' ' * (n // 2)}dog" for n in range(70)] + [TEXT, ""]
    assert ours(texts, add_special_tokens=False)["input_ids"] == theirs.encode(texts)
    assert ours("the")["input_ids"] == [1, *theirs.encode("the")]


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_published_model_comes_in_scores_alike_and_goes_out_the_same(name, tmp_path):
    made, changes, context = PUBLISHED[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight.ndim == 1) + 0.2 * torch.randn_like(weight))
    source, workdir, out = tmp_path / "hf", tmp_path / "workdir", tmp_path / "out"
    model.save_pretrained(source)
    (source / "tokenizer.model").write_bytes(spaced(range(2, 17)))
    config = json.loads((source / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (source / "config.json").write_text(json.dumps(config))
    done = in_process.llada("import", f"--source={source}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bos_id"] == 1 and "begin with <s>" in done.stderr
    run = llada.load(workdir)
    assert (run.config.model.max_length, run.config.model.norm_eps) == (context, made.rms_norm_eps)
    # What SentencePiece makes of it, after <s>.
    processor = sentencepiece.SentencePieceProcessor(model_proto=spaced(range(2, 17)))
    ids = processor.encode(TEXT)
    assert run.tokenizer.encode(TEXT) == ids
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([[1, *ids]])).logits[0], dim=-1)
    wanted = sum(float(log_p[i, token]) for i, token in enumerate(ids))
    done = in_process.llada("likelihood", f"--workdir={workdir}", "--prompt=", f"--answer={TEXT}")
    assert np.isclose(json.loads(done.stdout)["log_likelihood"], wanted, rtol=1e-5), (done.stdout, wanted)
    # Training and held-out evaluation begin a row so as well.
    model_config, x0_BL = run.config.model, jnp.array([ids])
    predict = functools.partial(transformer.hidden, model_config, run.params)
    head_VD = transformer.head(model_config, run.params)
    _, nats_BL = autoregressive.row_nats(predict, head_VD, x0_BL, None, run.tokenizer.special, None)
    assert np.isclose(-float(nats_BL.sum()), wanted, rtol=1e-5)
    export(workdir, out)
    dtypes = {"dtype": "float32"} | ({"torch_dtype": "float32"} if "torch_dtype" in config else {})
    written = json.loads((out / "config.json").read_text())
    assert written == config | {key: dtypes[key] for key in dtypes if key in config}
    assert json.loads((out / "generation_config.json").read_text())["bos_token_id"] == 1
    if name == "Qwen 3":  # with a config.json of our own writing, too
        (workdir / "source_config.json").unlink()
        export(workdir, tmp_path / "ours")
        assert json.loads((tmp_path / "ours/config.json").read_text())["bos_token_id"] == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer(TEXT)["input_ids"] == [1, *ids] and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    for key, weight in model.state_dict().items():
        assert (again.state_dict()[key] == weight).all(), key


def test_what_export_would_refuse_of_a_tokenizer_is_refused_before_training(tiny, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(spaced(range(2, 17), mask=True))
    (tmp_path / "good.model").write_bytes(proto.SerializeToString())
    config = tiny("llada", {"data.tokenizer": str(tmp_path / "good.model")})
    assert isinstance(corpus_lib.tokenizer_for(tmp_path / "good", config), SentencePieceTokenizer)
    proto.trainer_spec.treat_whitespace_as_suffix = True
    (tmp_path / "bad.model").write_bytes(proto.SerializeToString())
    config = tiny("llada", {"data.tokenizer": str(tmp_path / "bad.model")})
    with pytest.raises(UserError, match="data.tokenizer=.*bad.model: .*whitespace_as_suffix.*llada export could not"):
        corpus_lib.tokenizer_for(tmp_path / "bad", config)
    assert not (tmp_path / "bad").exists()


def test_weights_that_are_no_numbers_may_be_allowed(build, tmp_path):
    from safetensors.numpy import load_file, save_file

    export(build(True), tmp_path / "hf")
    shard = tmp_path / "hf/model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, shard, {"format": "pt"})
    (tmp_path / "hf/model.safetensors.index.json").unlink()  # which one shard does without
    for allowed in (False, True):
        source = importing.open_source(tmp_path / "hf", allow_nonfinite=allowed)
        try:
            importing.write(source, from_config_dict(source.config), tmp_path / "back")
        except UserError as error:
            assert not allowed and "layers.1.mlp.up_proj.weight holds NaN" in str(error)
    assert np.isnan(np.asarray(llada.load(tmp_path / "back").params["layers"]["up"])).sum() == 1
