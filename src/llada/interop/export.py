"""A trained workdir as a Hugging Face directory, written leaf by leaf: no model is ever in memory, and no torch needed.

A LLaDA becomes a `LLaDAModelLM` with its own modelling code beside the weights, an ARM a native `LlamaForCausalLM`
(`Qwen3ForCausalLM` where it has qk-norm).
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import json_files
from llada.config import Config
from llada.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.files import new_directory, prefetch, write_atomically
from llada.inference.canvas import forbidden_ids
from llada.interop import layout, llada_schema, llama_schema, model_card, safetensors_files, sentencepiece_files
from llada.interop.schema import SOURCE_CONFIG, TRANSFORMERS_VERSION, Special
from llada.training import leaves as leaves_lib
from llada.training import run as run_lib
from llada.training.checkpoint import Checkpoints
from llada.training.corpus import saved_tokenizer
from llada.training.leaves import Leaf

SHARD_BYTES = 5_000_000_000
_SLAB_BYTES = 8 << 20
_CODE = ("configuration_llada.py", "modeling_llada.py")

Progress = Callable[[int, int], None]


class Exported(NamedTuple):
    """What was written: the checkpoint's step, the architecture, shards and bytes of weights."""

    step: int
    architecture: str
    shards: int
    weight_bytes: int


def export(
    workdir: Path,
    out: Path,
    step: int | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the checkpoint of `step` (default the latest) of `workdir` to `out`, which appears whole or not at all.

    `overwrite` lets an earlier export at `out` give way. `progress` is told bytes of weights done and in all. UserError
    for a workdir or step that is not there, an unknown dtype, or an `out` that exists, all before weights are read.
    """
    if dtype not in safetensors_files.DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(safetensors_files.DTYPES)}")
    if shard_bytes < 1:
        raise UserError(f"--shard_bytes={shard_bytes} must be positive")
    config = run_lib.read_config(workdir)
    _require_apart(out, workdir)
    if overwrite:
        _check_replaceable(out)
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.resolve(step)
        leaves = leaves_lib.open_parameters(checkpoints, step)
        tokenizer = saved_tokenizer(workdir, checkpoints.item(step))
        schema = llama_schema if config.model.causal else llada_schema
        shards = safetensors_files.plan(layout.tensors(config.model, schema.NAMES), dtype, shard_bytes)
        index = safetensors_files.index(shards, dtype)
        architecture, files = _small_files(workdir, config, tokenizer, step, dtype)
        files[safetensors_files.INDEX] = _json(index)
        total, done = index["metadata"]["total_size"], 0

        def counted(tensors: list[layout.Tensor]) -> Iterator[np.ndarray]:
            nonlocal done
            for piece in prefetch(_pieces(tensors, leaves, dtype, lambda: checkpoints.usable(step))):
                yield piece
                done += piece.nbytes
                if progress:
                    progress(done, total)

        with new_directory(out, "--out", replace=overwrite) as directory:
            for shard in shards:
                safetensors_files.write_shard(directory, shard, dtype, counted(shard.tensors))
            for name, content in files.items():
                write_atomically(directory / name, content)
    return Exported(step, architecture, len(shards), total)


def _pieces(
    tensors: list[layout.Tensor], leaves: dict[str, Leaf], dtype: str, reading: Callable[[], AbstractContextManager]
) -> Iterator[np.ndarray]:
    """The data of the tensors in order, contiguous arrays of about a slab each; read inside `reading`."""
    numpy_dtype, _ = safetensors_files.DTYPES[dtype]

    def read(leaf: Leaf, index: int | slice) -> np.ndarray:
        with reading():
            return leaf.read(index)

    for tensor in tensors:
        leaf = leaves[tensor.leaf]
        if tensor.transposed:
            matrix = layout.as_matrix(tensor.leaf, read(leaf, tensor.layer))
            rows = max(1, _SLAB_BYTES // (len(matrix) * numpy_dtype.itemsize))
            for start in range(0, matrix.shape[1], rows):
                part = matrix[:, start : start + rows]
                out = np.empty(part.shape[::-1], numpy_dtype)
                layout.transpose(part, out)
                yield out
            del matrix, part  # before the next tensor is read
        elif tensor.layer is not None:
            yield read(leaf, tensor.layer).astype(numpy_dtype, copy=False)
        else:
            for start in range(0, len(leaf), leaf.chunk_rows):
                rows = slice(start, min(start + leaf.chunk_rows, len(leaf)))
                yield read(leaf, rows).astype(numpy_dtype, copy=False)


def _small_files(
    workdir: Path, config: Config, tokenizer: Tokenizer, step: int, dtype: str
) -> tuple[str, dict[str, bytes]]:
    """The architecture's name, and everything but weights and index: contents by name."""
    special = Special(tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eot_id, tokenizer.bos_id)
    values = _config_json(workdir, config, special, dtype)
    forbidden = np.flatnonzero(forbidden_ids(tokenizer, config.model.vocab_size)).tolist()
    generation = {
        "eos_token_id": special.eos if values.get("eos_token_id") is None else values["eos_token_id"],
        "pad_token_id": tokenizer.pad_id,
        # What our samplers never write: the mask, padding, rows past the tokenizer's last.
        "suppress_tokens": sorted({*forbidden} | ({tokenizer.mask_id} - {None})),
        "transformers_version": TRANSFORMERS_VERSION,
    }
    if not config.model.causal:
        # Said here, as transformers' pipeline has other wishes where a model has none.
        generation |= {"do_sample": False, "max_new_tokens": 64}
        generation |= {} if special.eot is None else {"eos_token_id": [special.eos, special.eot]}
    if config.model.causal:
        generation["bos_token_id"] = special.start
    files = {"config.json": _json(values), "generation_config.json": _json(generation)}
    files |= _tokenizer_files(tokenizer, config)
    if not config.model.causal:
        files |= {name: Path(__file__).with_name(name).read_bytes() for name in _CODE}
    card = model_card.text(config, workdir, step, dtype, values["architectures"][0], tokenizer)
    return values["architectures"][0], files | {"README.md": card.encode()}


def _config_json(workdir: Path, config: Config, special: Special, dtype: str) -> dict[str, Any]:
    """The model's config.json: an imported model's own as far as it still says what the model is, else a new one."""
    schema = llama_schema if config.model.causal else llada_schema
    values = schema.to_json(config.model, special)
    if not (workdir / SOURCE_CONFIG).exists():
        return values | {"torch_dtype": dtype}
    kept = json_files.read(workdir / SOURCE_CONFIG)
    try:
        fields, ids = schema.from_json(kept)
    except (UserError, KeyError):  # of another family, or not as the import left it
        return values | {"torch_dtype": dtype}
    ours = dataclasses.asdict(config.model) | {"kv_heads": config.model.key_value_heads}
    if any(ours[name] != value for name, value in fields.items()):
        return values | {"torch_dtype": dtype}
    # An id that it does not give is left open, but for the mask, without which nothing can be filled.
    wanted = {role: getattr(special, role) for role in ("eos", "bos" if config.model.causal else "mask")}
    changed = {f"{role}_token_id" for role, id in wanted.items() if id != ids.get(role, None if role == "mask" else id)}
    if not config.model.causal or "architectures" not in kept:
        changed |= {"architectures", "auto_map"} & values.keys()  # the code beside a LLaDA is ours
    kept |= {name: values[name] for name in changed}
    return kept | dict.fromkeys([name for name in ("torch_dtype", "dtype") if name in kept] or ["torch_dtype"], dtype)


def _tokenizer_files(tokenizer: Tokenizer, config: Config) -> dict[str, bytes]:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {name: text.encode() for name, text in tokenizer.files.items()}
    return sentencepiece_files.tokenizer_files(
        tokenizer.proto,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        # Rows of our ARM begin after an end-of-text token, so its prompts must.
        bos_id=tokenizer.special.start if config.model.causal else None,
        model_max_length=config.model.max_length,
    )


def _require_apart(out: Path, workdir: Path) -> None:
    """UserError if `out` is the workdir or in it: nobody looks for an export there, and training writes there."""
    if out.resolve().is_relative_to(workdir.resolve()):
        raise UserError(f"--out={out} is --workdir={workdir} or in it; choose a directory elsewhere")


def _check_replaceable(out: Path) -> None:
    """UserError unless `out` is missing, empty, or what an export left: nothing of the user's is ever removed."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    known = {"config.json", "generation_config.json", "README.md", safetensors_files.INDEX, *_CODE}
    known |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    strange = sorted(n for n in names - known if not (n.startswith("model-") and n.endswith(".safetensors")))
    if strange:
        raise UserError(f"--out={out} holds {strange[0]}, which no export wrote; choose another directory")
    card = out / "README.md"
    if names and not (card.exists() and model_card.ORIGIN in json_files.read_text(card)):
        raise UserError(f"--out={out} holds a model that llada export did not write; choose another directory")


def _json(values: dict[str, Any]) -> bytes:
    return (json_files.dumps(values, indent=2) + "\n").encode()
