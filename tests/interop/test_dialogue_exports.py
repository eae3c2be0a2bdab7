"""Chat templates and control tokens leave with an export, mean the same to both transformers, and come back."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llada.config import from_config_dict
from llada.data import tokenizer_files
from llada.data.chat_template import ChatTemplate, drop_start
from llada.data.control_tokens import LLADA_CONTROLS, PLAIN_CONTROLS, RAINBOW, builtin
from llada.interop import export_files, importing, source_tokenizer
from llada.interop.export import export
from llada.training.run import read_config

OTHER_MAJOR = Path(sys.prefix) / "transformers4"
V = 320
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def hugging_face(folder: Path):
    """A byte-level tokenizer as makers publish them, with reserved tokens."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(["the cat sees"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    made.add_special_tokens(["<s>", "</s>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"])
    added = made.get_added_tokens_decoder()
    decoder = {str(token): {"content": entry.content, "special": True} for token, entry in added.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    return tokenizer_files.load(folder)


def dialogues(count: int = 60) -> list[list[dict]]:
    rng = random.Random(0)
    texts = [
        "the cat",
        " sees\n\nthe  dog ",
        "",
        "naïve 日本語 😀\u0301",
        "\t<|x",
        "def main():\n    return\n",
        "\u2581 <0x41>",
    ]

    def one():
        messages = [{"role": "system", "content": "be brief"}] if rng.random() < 0.3 else []
        for _ in range(rng.randrange(1, 4)):
            messages += [{"role": role, "content": "".join(rng.choices(texts, k=3))} for role in ("user", "assistant")]
        return messages[: rng.randrange(1, len(messages) + 1)]

    return [one() for _ in range(count)]


@pytest.fixture(scope="module")
def exported(build, tokenizer, tmp_path_factory):
    """name -> (folder of an export, tokenizer, whether it is an ARM's), and what both majors say of the folders."""
    home, config = tmp_path_factory.mktemp("exports"), read_config(build())
    theirs = hugging_face(home / "theirs").with_mask()
    kinds = {
        "trained": tokenizer,
        "llada, rainbow": tokenizer.with_dialogue(builtin("llada"), [*LLADA_CONTROLS, *RAINBOW[:5]], V),
        "ChatML": tokenizer.with_dialogue(CHATML, ["<|im_start|>", "<|im_end|>"], V),
        "theirs, plain": theirs.with_dialogue(builtin("plain"), [*PLAIN_CONTROLS, *RAINBOW], V),
        "theirs, llada": theirs.with_dialogue(builtin("llada"), LLADA_CONTROLS, V),
    }
    folders = {}
    for number, (name, kind) in enumerate(kinds.items()):
        folders[name] = home / str(number), kind, False
        folders[name][0].mkdir()
        for file, content in export_files.tokenizer_files(kind, config).items():
            (folders[name][0] / file).write_bytes(content)
    for name, causal in (("LLaDA", False), ("ARM", True)):
        export(build(causal), home / name)
        folders[name] = home / name, tokenizer, causal
    (home / "cases.json").write_text(json.dumps([[str(folder) for folder, _, _ in folders.values()], dialogues()]))
    assert OTHER_MAJOR.is_dir(), f"install transformers 4 with pip --target {OTHER_MAJOR}"
    started = []
    for path in ("", str(OTHER_MAJOR)):  # at once
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        command = [sys.executable, str(Path(__file__).with_name("chat_user.py")), str(home / "cases.json")]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = dict(json.loads(process.communicate()[0].splitlines()[-1]) for process in started)
    assert set(said) == {"4", "5"}
    return folders, said


@pytest.mark.parametrize("major", ["4", "5"])
def test_the_ids_of_apply_chat_template_are_ours(exported, major):
    folders, said = exported
    for name, (folder, tokenizer, causal) in folders.items():
        theirs, template = said[major][str(folder)], ChatTemplate(tokenizer)
        assert theirs["template"] == tokenizer.template, name
        prompts, whole = theirs["ids"][::2], theirs["ids"][1::2]
        for messages, prompt_ids, ids in zip(dialogues(), prompts, whole, strict=True):
            assert template.prompt_ids(messages) == drop_start(prompt_ids, tokenizer.special, causal), (name, messages)
            if messages[-1]["role"] == "assistant":
                turn = template.turns(messages)[-1]
                ours = turn.prompt_ids + turn.answer_ids
                assert ours == drop_start(ids, tokenizer.special, causal)[: len(ours)], (name, messages)
        for token, text in zip(theirs["special"], ("<|eot_id|>", "<|pad_3|>"), strict=True):
            assert token == tokenizer.controls.get(text, token), (name, text)
        assert "<|" not in theirs["without control tokens"].replace("<|x", ""), name


def test_they_come_back_from_an_import(exported, build):
    """Every kind, whichever of its files the template is in; what was imported once is the same bytes ever after."""
    folders, _ = exported
    for name, (folder, tokenizer, causal) in folders.items():
        model, ids = read_config(build(causal)).model, {"eos": tokenizer.eos_id, "mask": tokenizer.mask_id}
        first = source_tokenizer.open_tokenizer(folder, ids, model, None)
        assert first.template == tokenizer.template and first.special == tokenizer.special, name
        assert first.controls == tokenizer.controls | ({"<unk>": 2} if "<unk>" in first.controls else {}), name
        inside = json.loads(first.files["tokenizer_config.json"]) | {
            "chat_template": first.files["chat_template.jinja"]
        }
        (folder / "chat_template.jinja").rename(folder / "elsewhere")
        (folder / "tokenizer_config.json").write_text(json.dumps(inside))
        assert source_tokenizer.open_tokenizer(folder, ids, model, None).template == tokenizer.template
        (folder / "elsewhere").rename(folder / "chat_template.jinja")
        (folder / "tokenizer_config.json").write_text(first.files["tokenizer_config.json"])


@pytest.mark.parametrize("name", ["LLaDA", "ARM"])
def test_an_export_of_an_import_is_the_same(exported, name, tmp_path):
    folder, tokenizer, _ = exported[0][name]
    for step in ("one", "two"):
        source = importing.open_source(folder)
        importing.write(source, from_config_dict(source.config), tmp_path / step)
        export(tmp_path / step, tmp_path / f"{step} out")
        again = {file.name: file.read_bytes() for file in (tmp_path / f"{step} out").iterdir()}
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert again[file] == (folder / file).read_bytes(), file
        folder = tmp_path / f"{step} out"
    one, two = ((tmp_path / step / "tokenizer.bundle.json").read_bytes() for step in ("one", "two"))
    assert one == two and again["chat_template.jinja"].decode() == tokenizer.template
    assert json.loads(again["generation_config.json"])["eos_token_id"] == [tokenizer.eos_id, tokenizer.eot_id]
