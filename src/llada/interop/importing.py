"""A Hugging Face directory, or another workdir, as a workdir that every command accepts.

Reads the released LLaDA layout, Llama-family ARMs and iLLaDA. Tensors go from file to checkpoint one by one, so that no
machine ever holds the model: the one that imports needs no accelerator and a few hundred megabytes, and whoever opens
the workdir reads it onto its mesh, each host its part. Nothing in the source is executed.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import accounting
from llada import config as config_lib
from llada.config import Config
from llada.data import huggingface_tokenizer
from llada.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer, parse_proto
from llada.data.tokenizer import NAMES, Tokenizer
from llada.errors import UserError
from llada.files import ahead, new_directory, write_atomically
from llada.interop import layout, llada_schema, llama_schema, sentencepiece_files
from llada.interop.safetensors_files import Weights, read_json
from llada.training import workdir as workdir_lib
from llada.training.checkpoint import Checkpoints, create

FAMILIES = {"diffusion": False, "autoregressive": True}  # objective: causal
# Tokens that makers set aside: free to be the mask of a model that had none.
_FREE = (re.compile(r"<\|?(reserved|unused|extra)[\w-]*\|?>|\[unused\d+\]"), re.compile(r"<\|?unk\|?>|\[UNK\]"))
_STEPS = 1_000
_ROWS = 4_096  # of a table, at a time
_WRITES = 4  # pieces on their way to the disk

Progress = Callable[[int, int], None]


class Source(NamedTuple):
    """A checked source: a config to start from (nested dict), its tokenizer, and its parameters.

    `pieces(config)` yields (our leaf, index into it, float32 values) until all parameters of `config` were given.
    """

    config: dict[str, Any]
    tokenizer: Tokenizer
    pieces: Callable[[Config], Iterator[tuple[str, tuple, np.ndarray]]]


def open_source(path: Path, objective: str | None = None, mask_token: str | None = None) -> Source:
    """Read everything about `path` but the weights' data, and check it.

    `objective` makes the model another family's than it was: an ARM's weights are where a mask predictor may start.
    `mask_token` names the mask where the source has none. UserError for whatever does not fit.
    """
    if not path.is_dir():
        raise UserError(f"--source={path} is not a directory; give a Hugging Face directory or a workdir")
    try:
        values = read_json(path / "config.json")
        if "model_type" not in values and "model" in values:
            return _open_workdir(path, objective)
        schema, fields, special = _read_config(values)
        family = objective or ("autoregressive" if fields["causal"] else "diffusion")
        weights = Weights(path)
        if fields["layers"] > len(weights.names):
            raise UserError(
                f"config.json asks for {fields['layers']} layers, the files hold {len(weights.names)} tensors"
            )
        tree = _default_tree(fields | {"causal": FAMILIES[family]}, family)
        config = config_lib.from_config_dict(tree)
        _check_tensors(weights, config, schema.NAMES)
    except UserError as error:
        raise UserError(f"--source={path}: {error}") from error
    float32 = weights.dtype(schema.NAMES["final_norm"]) == "F32"
    tree["model"]["dtype"] = "float32" if float32 else "bfloat16"
    tokenizer = _tokenizer(path, special, config.model.vocab_size, mask_token)

    def pieces(config: Config) -> Iterator[tuple[str, tuple, np.ndarray]]:
        _check_tensors(weights, config, schema.NAMES)  # the command line may have changed a shape
        return _read_weights(weights, config, schema.NAMES)

    return Source(tree, tokenizer, pieces)


def write(source: Source, config: Config, workdir: Path, progress: Progress | None = None) -> None:
    """Make `workdir` of a source: the parameters as step 0 of a run not yet begun. It appears whole or not at all."""
    pieces = source.pieces(config)
    total, done = accounting.parameters(config.model).total, 0
    with new_directory(workdir, "--workdir") as directory:
        write_atomically(directory / source.tokenizer.file_name, source.tokenizer.content)
        leaves = create(directory, config, source.tokenizer.content)
        writing: deque = deque()
        for leaf, index, values in ahead(pieces):
            writing.append(leaves[leaf].write(values, *index))
            if len(writing) > _WRITES:
                writing.popleft().result()
            done += values.size
            if progress:
                progress(done, total)
        for write in writing:
            write.result()
        if done != total:
            raise AssertionError(f"wrote {done} parameters of {total}")
        write_atomically(directory / "config.json", (json.dumps(config_lib.to_dict(config), indent=2) + "\n").encode())


def _open_workdir(path: Path, objective: str | None) -> Source:
    """The latest checkpoint of another run."""
    old = workdir_lib.read_config(path)
    checkpoints = Checkpoints(path)
    step = checkpoints.resolve(None)
    tokenizer = workdir_lib.saved_tokenizer(path, checkpoints, step)
    family = objective or old.objective.name
    tree = config_lib.to_dict(old)
    tree["model"]["causal"], tree["objective"]["name"] = FAMILIES[family], family

    leaves = checkpoints.open_parameters(step)

    def pieces(config: Config) -> Iterator[tuple[str, tuple, np.ndarray]]:
        if layout.leaf_shapes(config.model) != {name: leaf.shape for name, leaf in leaves.items()}:
            raise UserError(f"--config.model... makes other shapes than --source={path} holds; keep its model")
        for name, leaf in leaves.items():
            for start in range(0, len(leaf), leaf.chunk_rows):
                rows = slice(start, min(start + leaf.chunk_rows, len(leaf)))
                yield name, (rows,), leaf.read(rows)

    return Source(tree, tokenizer, pieces)


def _read_config(values: dict[str, Any]):
    """(schema, fields of ModelConfig, special ids) of a Hugging Face config.json."""
    kind = values.get("model_type")
    if kind == llada_schema.MODEL_TYPE:
        fields, special = llada_schema.from_json(values)
        return llada_schema, fields | {"causal": False}, special
    if kind in (*llama_schema.CAUSAL, *llama_schema.BIDIRECTIONAL):
        return llama_schema, *llama_schema.from_json(values)
    known = (llada_schema.MODEL_TYPE, *llama_schema.BIDIRECTIONAL, *llama_schema.CAUSAL)
    raise UserError(f"config.json has model_type={kind!r}; supported are {', '.join(known)}")


def _default_tree(fields: dict[str, Any], family: str) -> dict[str, Any]:
    """A whole config around a model: the defaults, and rows as long as its context."""
    tree = config_lib.default_config().to_dict()
    tree["model"] |= fields
    tree["objective"]["name"] = family
    if family == "autoregressive":
        tree["objective"]["random_length_fraction"] = 0.0
    tree["data"]["sequence_length"] = fields["max_length"]
    tree["train"]["steps"] = _STEPS
    return tree


def _check_tensors(weights: Weights, config: Config, names: dict[str, str]) -> None:
    """UserError unless the files hold the model's tensors, with its shapes, and no others."""
    wanted = {tensor.name: tensor.shape for tensor in layout.tensors(config.model, names)}
    # Buffers that old versions saved, and the copy of a tied head that some programs write.
    ignored = {name for name in weights.names if name.endswith("rotary_emb.inv_freq")}
    if config.model.tie_embeddings:
        ignored |= {names["head"]}
    missing, extra = sorted(wanted.keys() - weights.names), sorted(weights.names - wanted.keys() - ignored)
    for kind, found in (("lacks", missing), ("holds, besides what the model has,", extra)):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(f"the checkpoint {kind} {found[0]}{more}")
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise UserError(f"{name} is {list(weights.shape(name))}; config.json makes it {list(shape)}")


def _read_weights(weights: Weights, config: Config, names: dict[str, str]) -> Iterator[tuple[str, tuple, np.ndarray]]:
    """Every parameter, a layer's matrix or some rows of a table at a time."""
    if config.model.tie_embeddings and names["head"] in weights.names:
        _check_tied(weights, names)
    shapes = layout.leaf_shapes(config.model)
    for tensor in layout.tensors(config.model, names):
        if tensor.layer is None:
            for start in range(0, tensor.shape[0], _ROWS):
                rows = slice(start, min(start + _ROWS, tensor.shape[0]))
                yield tensor.leaf, (rows,), weights.read(tensor.name, rows).astype(np.float32, copy=False)
            continue
        ours = np.empty(shapes[tensor.leaf][1:], np.float32)
        theirs = weights.read(tensor.name)
        if tensor.transposed:
            layout.transpose(theirs, layout.as_matrix(tensor.leaf, ours))
        else:
            ours[...] = theirs
        yield tensor.leaf, (tensor.layer,), ours


def _check_tied(weights: Weights, names: dict[str, str]) -> None:
    """UserError if a tied model's separate head is not its embedding."""
    rows = weights.shape(names["embedding"])[0]
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        if not np.array_equal(weights.read(names["embedding"], part), weights.read(names["head"], part)):
            raise UserError(f"config.json ties head and embedding, but {names['head']} differs")


def _tokenizer(path: Path, special: dict[str, int], vocab_size: int, mask_token: str | None) -> Tokenizer:
    """The source's tokenizer with a mask; UserError if there is none, or it does not fit the model."""
    files = huggingface_tokenizer.read_files(path)
    if "tokenizer.json" not in files:
        if not (path / SentencePieceTokenizer.file_name).is_file():
            raise UserError(f"--source={path} has neither tokenizer.json nor tokenizer.model; copy the tokenizer there")
        files |= _from_sentencepiece(path / SentencePieceTokenizer.file_name, special)
    ids = huggingface_tokenizer.vocabulary(files, str(path))
    if max(ids.values()) >= vocab_size:
        raise UserError(
            f"--source={path}: the tokenizer has ids up to {max(ids.values())}, the model a vocabulary of "
            f"{vocab_size}; they do not belong together"
        )
    special = dict(special)
    if mask_token is not None:
        if mask_token not in ids:
            raise UserError(f"--mask_token={mask_token} is not a token of {path}; give one that no text needs")
        special["mask"] = ids[mask_token]
    elif "mask" not in special and not huggingface_tokenizer.has_mask(files, str(path)):
        special["mask"] = _free_id(path, ids, vocab_size)
    outside = [f"{role}_token_id={token}" for role, token in special.items() if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"--source={path}: config.json has {outside[0]}; ids of this model are 0 to {vocab_size - 1}")
    content = huggingface_tokenizer.bundle(files, str(path), special)
    return HuggingFaceTokenizer(content, str(path))


def _from_sentencepiece(path: Path, special: dict[str, int]) -> dict[str, str]:
    """Hugging Face files from a SentencePiece model that came without them."""
    proto = parse_proto(path.read_bytes(), str(path))
    id_of = {piece.piece: token for token, piece in enumerate(proto.pieces)}
    roles = {role: next((id_of[name] for name in names if name in id_of), None) for role, names in NAMES.items()}
    roles |= {role: token for role, token in special.items() if token < len(proto.pieces)}
    made = sentencepiece_files.tokenizer_files(
        proto, mask_id=roles["mask"], eos_id=roles["eos"], pad_id=roles["pad"], model_max_length=None
    )
    return {name: content.decode() for name, content in made.items()}


def _free_id(path: Path, ids: dict[str, int], vocab_size: int) -> int:
    """An id that no text uses: a row past the tokenizer's last, else a token its makers reserved."""
    last = max(ids.values())
    if last + 1 < vocab_size:
        return last + 1
    for pattern in _FREE:
        free = sorted(token for name, token in ids.items() if pattern.fullmatch(name))
        if free:
            return free[0]
    raise UserError(f"--source={path} has no mask token and no reserved one; name one with --mask_token=TOKEN")
