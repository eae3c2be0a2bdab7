"""A Hugging Face directory, or another workdir, as a workdir that every command accepts.

Reads the released LLaDA layout, Llama-family ARMs and iLLaDA. Each device is given its part of each parameter straight
from the files, so no host ever holds the model. Nothing in the source is executed.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llada import config as config_lib
from llada import mesh as mesh_lib
from llada.config import Config
from llada.data import huggingface_tokenizer
from llada.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer, parse_proto
from llada.data.tokenizer import NAMES, Tokenizer
from llada.errors import UserError
from llada.files import new_directory, write_atomically
from llada.interop import layout, llada_schema, llama_schema, sentencepiece_files
from llada.interop.safetensors_files import Weights, read_json
from llada.model import transformer
from llada.training import workdir as workdir_lib
from llada.training.checkpoint import Checkpoints

FAMILIES = {"diffusion": False, "autoregressive": True}  # objective: causal
# Tokens that makers set aside: free to be the mask of a model that had none.
_FREE = (re.compile(r"<\|?(reserved|unused|extra)[\w-]*\|?>|\[unused\d+\]"), re.compile(r"<\|?unk\|?>|\[UNK\]"))
_STEPS = 1_000

Progress = Callable[[int, int], None]


class Source(NamedTuple):
    """A checked source: a config to start from (nested dict), its tokenizer, and how to read a leaf of parameters.

    `read(config, mesh, progress)` returns the parameters, placed on the mesh.
    """

    config: dict[str, Any]
    tokenizer: Tokenizer
    read: Callable[[Config, jax.sharding.Mesh, Progress | None], transformer.Parameters]


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

    def read(config: Config, mesh: jax.sharding.Mesh, progress: Progress | None) -> transformer.Parameters:
        _check_tensors(weights, config, schema.NAMES)  # the command line may have changed a shape
        return _read_weights(weights, config, schema.NAMES, mesh, progress)

    return Source(tree, tokenizer, read)


def write(source: Source, config: Config, workdir: Path, progress: Progress | None = None) -> None:
    """Make `workdir` of a source: the parameters as step 0 of a run not yet begun. It appears whole or not at all."""
    mesh = mesh_lib.make(config.mesh)
    mesh_lib.check(config, mesh)
    with new_directory(workdir, "--workdir") as directory:
        params = source.read(config, mesh, progress)
        write_atomically(directory / source.tokenizer.file_name, source.tokenizer.content)
        checkpoints = Checkpoints(directory, keep=1)
        checkpoints.save_parameters(params, config, source.tokenizer.content)
        checkpoints.close()
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

    def read(config: Config, mesh: jax.sharding.Mesh, progress: Progress | None) -> transformer.Parameters:
        return checkpoints.restore_parameters(config, mesh, step)

    return Source(tree, tokenizer, read)


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


def _read_weights(weights, config: Config, names, mesh, progress: Progress | None) -> transformer.Parameters:
    """Every leaf on its devices; a device asks for its own part only."""
    shapes = layout.leaf_shapes(config.model)
    abstract = transformer.abstract_parameters(config.model)
    placements, _ = jax.tree.flatten(mesh_lib.parameter_placements(mesh, abstract))
    total, done = sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()), 0
    leaves = {}
    for (leaf, shape), placement in zip(shapes.items(), placements, strict=True):
        if config.model.tie_embeddings and leaf == "embedding" and names["head"] in weights.names:
            _check_tied(weights, names)

        def part(index, leaf=leaf, shape=shape):
            return _read_part(weights, names[leaf], leaf, index, shape)

        leaves[leaf] = jax.block_until_ready(jax.make_array_from_callback(shape, placement, part))
        done += leaves[leaf].size
        if progress:
            progress(done, int(total))
    return layout.tree(leaves)


def _read_part(weights: Weights, name: str, leaf: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """`index` of our `leaf` as float32."""
    size = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
    if not leaf.startswith("layers."):
        return weights.read(name, index).astype(np.float32, copy=False)
    out = np.empty(size, np.float32)

    def fill(row: int, layer: int) -> None:
        if layout.is_matrix(leaf):
            theirs = weights.read(name.format(layer), layout.their_slices(leaf, index[1:], shape[1:]))
            layout.transpose(theirs, layout.as_matrix(leaf, out[row]))
        else:
            out[row] = weights.read(name.format(layer), index[1:])

    with ThreadPoolExecutor() as pool:  # NumPy copies without the interpreter's lock
        list(pool.map(fill, range(size[0]), range(*index[0].indices(shape[0]))))
    return out


def _check_tied(weights: Weights, names: dict[str, str]) -> None:
    """UserError if a tied model's separate head is not its embedding."""
    rows = weights.shape(names["embedding"])[0]
    for start in range(0, rows, 4_096):
        part = (slice(start, min(start + 4_096, rows)), slice(None))
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
    roles = {
        role: special.get(role, next((id_of[n] for n in names if n in id_of), None)) for role, names in NAMES.items()
    }
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
