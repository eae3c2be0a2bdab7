"""A trained workdir as a Hugging Face directory, written leaf by leaf: no model is ever in memory, and no torch needed.

A LLaDA becomes a `LLaDAModelLM` with its own modelling code beside the weights, an ARM a native `LlamaForCausalLM`
(`Qwen3ForCausalLM` where it has qk-norm).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llada.config import Config
from llada.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.files import ahead, new_directory
from llada.inference.canvas import forbidden_ids
from llada.interop import layout, llada_schema, llama_schema, model_card, safetensors_files, sentencepiece_files
from llada.interop.schema import TRANSFORMERS_VERSION, Special
from llada.training import workdir as workdir_lib
from llada.training.checkpoint import Checkpoints
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
    for a workdir or step that is not there, an unknown dtype, or an `out` that exists.
    """
    if dtype not in safetensors_files.DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(safetensors_files.DTYPES)}")
    if shard_bytes < 1:
        raise UserError(f"--shard_bytes={shard_bytes} must be positive")
    config = workdir_lib.read_config(workdir)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.resolve(step)
    tokenizer = workdir_lib.saved_tokenizer(workdir, checkpoints, step)
    schema = llama_schema if config.model.causal else llada_schema
    wanted = layout.tensors(config.model, schema.NAMES)
    leaves = checkpoints.open_parameters(step)
    shards = safetensors_files.plan(wanted, dtype, shard_bytes)
    index = safetensors_files.index(shards, dtype)
    total, done = index["metadata"]["total_size"], 0
    if overwrite:
        _check_replaceable(out)
    with new_directory(out, "--out", replace=overwrite) as directory:
        for shard in shards:

            def counted(shard=shard):
                nonlocal done
                for piece in ahead(_pieces(shard.tensors, leaves, dtype)):
                    yield piece
                    done += piece.nbytes
                    if progress:
                        progress(done, total)

            safetensors_files.write_shard(directory, shard, dtype, counted())
        _write_json(directory / safetensors_files.INDEX, index)
        architecture = _write_small_files(directory, workdir, config, tokenizer, step, dtype)
    checkpoints.close()
    return Exported(step, architecture, len(shards), total)


def _pieces(tensors: list[layout.Tensor], leaves: dict[str, Leaf], dtype: str) -> Iterator[np.ndarray]:
    """The data of the tensors in order, contiguous arrays of about a slab each."""
    numpy_dtype, _ = safetensors_files.DTYPES[dtype]
    for tensor in tensors:
        leaf = leaves[tensor.leaf]
        if tensor.transposed:
            matrix = layout.as_matrix(tensor.leaf, leaf.read(tensor.layer))
            rows = max(1, _SLAB_BYTES // (len(matrix) * numpy_dtype.itemsize))
            for start in range(0, matrix.shape[1], rows):
                part = matrix[:, start : start + rows]
                out = np.empty(part.shape[::-1], numpy_dtype)
                layout.transpose(part, out)
                yield out
            del matrix, part  # before the next tensor is read
        elif tensor.layer is not None:
            yield leaf.read(tensor.layer).astype(numpy_dtype, copy=False)
        else:
            for start in range(0, len(leaf), leaf.chunk_rows):
                yield leaf.read(slice(start, min(start + leaf.chunk_rows, len(leaf)))).astype(numpy_dtype, copy=False)


def _write_small_files(directory: Path, workdir: Path, config: Config, tokenizer: Tokenizer, step: int, dtype: str):
    """Everything but the weights; returns the architecture's name."""
    special = Special(tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.eot_id)
    schema = llama_schema if config.model.causal else llada_schema
    values = schema.to_json(config.model, special) | {"torch_dtype": dtype}
    _write_json(directory / "config.json", values)
    ends = [tokenizer.eos_id] if tokenizer.eot_id is None else [tokenizer.eos_id, tokenizer.eot_id]
    forbidden = np.flatnonzero(forbidden_ids(tokenizer, config.model.vocab_size)).tolist()
    generation = {
        "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        # What our samplers never write: the mask, padding, rows past the tokenizer's last.
        "suppress_tokens": sorted({*forbidden, tokenizer.mask_id}),
        "transformers_version": TRANSFORMERS_VERSION,
    }
    if config.model.causal:
        generation["bos_token_id"] = tokenizer.eos_id
    _write_json(directory / "generation_config.json", generation)
    for name, content in _tokenizer_files(tokenizer, config).items():
        (directory / name).write_bytes(content)
    if not config.model.causal:
        for name in _CODE:
            shutil.copyfile(Path(__file__).with_name(name), directory / name)
    card = model_card.text(config, workdir, step, dtype, values["architectures"][0], tokenizer)
    (directory / "README.md").write_text(card, encoding="utf-8")
    return values["architectures"][0]


def _tokenizer_files(tokenizer: Tokenizer, config: Config) -> dict[str, bytes]:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return {name: text.encode() for name, text in tokenizer.files.items()}
    return sentencepiece_files.tokenizer_files(
        tokenizer.proto,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        # Rows of our ARM begin after an end-of-text token, so its prompts must.
        bos_id=tokenizer.eos_id if config.model.causal else None,
        model_max_length=config.model.max_length,
    )


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


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
