"""The small files of an export: config.json, generation_config.json, tokenizer, a LLaDA's PyTorch code, model card."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from llada import json_files
from llada.config import Config
from llada.data.huggingface_controls import TEMPLATE_FILE
from llada.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.inference.canvas import forbidden_ids
from llada.interop import model_card, sentencepiece_files
from llada.interop.schema import SOURCE_CONFIG, TRANSFORMERS_VERSION, schema_of

_CODE = ("configuration_llada.py", "generation_llada.py", "modeling_llada.py")
# Every name that an export may have, but for those of its weights.
NAMES = {"config.json", "generation_config.json", "README.md", *_CODE}
NAMES |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE_FILE}


def small_files(
    workdir: Path, config: Config, tokenizer: Tokenizer, step: int, dtype: str
) -> tuple[str, dict[str, bytes]]:
    """The architecture's name, and contents by file name: everything but the weights and their index."""
    values = _config_json(workdir, config, tokenizer, dtype)
    architecture = values["architectures"][0]
    files = {
        "config.json": to_bytes(values),
        "generation_config.json": to_bytes(_generation_json(config, tokenizer, values.get("eos_token_id"))),
        "README.md": model_card.text(config, workdir, step, dtype, architecture, tokenizer).encode(),
        **tokenizer_files(tokenizer, config),
    }
    if not config.model.causal:
        files |= {name: Path(__file__).with_name(name).read_bytes() for name in _CODE}
    return architecture, files


def is_export(directory: Path) -> bool:
    """Whether a directory's README.md is the card of an export."""
    card = directory / "README.md"
    return card.exists() and model_card.ORIGIN in json_files.read_text(card)


def to_bytes(values: dict[str, Any]) -> bytes:
    """A JSON file, as transformers writes them."""
    return (json_files.dumps(values, indent=2) + "\n").encode()


def _config_json(workdir: Path, config: Config, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The model's config.json: an imported model's own as far as it still describes the model, else a new one."""
    schema, special = schema_of(config.model), tokenizer.special
    values = schema.to_json(config.model, special, tokenizer.pad_id)
    if not config.model.causal:  # for whoever trains it on
        values |= {"loss_eps": config.objective.eps, "loss_normalization": config.objective.normalization}
    if not (workdir / SOURCE_CONFIG).exists():
        return values | {"torch_dtype": dtype}
    source = json_files.read(workdir / SOURCE_CONFIG)
    try:
        fields, ids = schema.from_json(source)
    except (UserError, KeyError):  # of another family, or not as the import left it
        return values | {"torch_dtype": dtype}
    ours = dataclasses.asdict(config.model) | {"kv_heads": config.model.key_value_heads}
    if any(ours[name] != value for name, value in fields.items()):
        return values | {"torch_dtype": dtype}
    # An id that it does not have is left open, but for the mask, without which nothing can be filled.
    wanted = {"eos": special.eos} | ({"bos": special.bos} if config.model.causal else {"mask": special.mask})
    changed = {f"{role}_token_id" for role, id in wanted.items() if id != ids.get(role, None if role == "mask" else id)}
    if not config.model.causal or "architectures" not in source:
        changed |= {"architectures", "auto_map"} & values.keys()  # the code beside a LLaDA is ours
    source |= {name: values[name] for name in changed}
    dtype_names = [name for name in ("torch_dtype", "dtype") if name in source] or ["torch_dtype"]
    return source | dict.fromkeys(dtype_names, dtype)


def _generation_json(config: Config, tokenizer: Tokenizer, ends: Any) -> dict[str, Any]:
    """How transformers generates by default; `ends` are the end tokens of config.json, where it has them."""
    special = tokenizer.special
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = list(dict.fromkeys([*listed, *special.ends]))
    values = {
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
        # What our samplers never write: the mask, padding, rows past the tokenizer's last.
        "suppress_tokens": np.flatnonzero(forbidden_ids(tokenizer, config.model.vocab_size)).tolist(),
        "transformers_version": TRANSFORMERS_VERSION,
    }
    if config.model.causal:
        return values | {"bos_token_id": special.start}
    # Written, as transformers' pipeline has other defaults for models that have none.
    return values | {"do_sample": False, "max_new_tokens": 64}


def tokenizer_files(tokenizer: Tokenizer, config: Config) -> dict[str, bytes]:
    """The tokenizer of an export as transformers loads it, with its chat template; contents by file name."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {name: text.encode() for name, text in tokenizer.files.items()}
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise TypeError(f"a tokenizer of another kind: {tokenizer.file_name}")
    return sentencepiece_files.tokenizer_files(
        tokenizer.proto,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        # Rows of our ARM begin after an end-of-text token, so its prompts must.
        bos_id=tokenizer.special.start if config.model.causal else None,
        model_max_length=config.model.max_length,
        template=tokenizer.template,
    )
