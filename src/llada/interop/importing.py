"""A Hugging Face directory, or another workdir, as a workdir that every command accepts.

Reads the released LLaDA layout, Llama-family ARMs and iLLaDA. Tensors go from file to checkpoint one by one, so that no
machine ever holds the model: the one that imports needs no accelerator and a few hundred megabytes, and whoever opens
the workdir reads it onto its mesh, each host its part. Nothing in the source is executed.
"""

import contextlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llada import accounting, json_files
from llada import config as config_lib
from llada.config import Config
from llada.data import huggingface_tokenizer
from llada.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada.data.sentencepiece_tokenizer import SentencePieceTokenizer, parse_proto
from llada.data.tokenizer import NAMES, Tokenizer
from llada.errors import UserError
from llada.files import new_directory, prefetch, write_atomically
from llada.interop import layout, llada_schema, llama_schema, sentencepiece_files
from llada.interop.safetensors_files import Weights
from llada.interop.schema import SOURCE_CONFIG
from llada.training import run as run_lib
from llada.training import run_item
from llada.training.checkpoint import Checkpoints, require_plain
from llada.training.corpus import saved_tokenizer
from llada.training.leaves import create, open_parameters

FAMILIES = {"diffusion": False, "autoregressive": True}  # objective: causal
# Tokens that makers set aside: free to be the mask of a model that had none.
_FREE = (re.compile(r"<\|?(reserved|unused|extra)[\w-]*\|?>|\[unused\d+\]"), re.compile(r"<\|?unk\|?>|\[UNK\]"))
_STEPS = 1_000
_ROWS = 4_096  # of a table, at a time
_MOST = 1e18  # of a weight: far from where its square leaves float32
_WRITES = 4  # pieces on their way to the disk

Progress = Callable[[int, int], None]


class Source(NamedTuple):
    """A checked source: a config to start from (nested dict), its tokenizer, and its parameters.

    `pieces(config)` yields (our leaf, index into it, float32 values) until all parameters of `config` were given.
    `files` are small files to keep beside them, by name; `notes` are what a user should know.
    """

    config: dict[str, Any]
    tokenizer: Tokenizer
    pieces: Callable[[Config], Iterator[tuple[str, tuple, np.ndarray]]]
    files: dict[str, bytes]
    notes: tuple[str, ...] = ()


def open_source(
    path: Path, objective: str | None = None, mask_token: str | None = None, allow_nonfinite: bool = False
) -> Source:
    """Read everything about `path` but the weights' data, and check it.

    `objective` makes the model another family's than it was: an ARM's weights are where a mask predictor may start.
    `mask_token` names the mask where the source has none. UserError for whatever does not fit, and, while the pieces
    are read, for NaN and infinity in them unless that is allowed.
    """
    _require_directory(path)
    try:
        values = json_files.read(path / "config.json", name="config.json")
        if "model_type" not in values and "model" in values:
            return _open_workdir(path, objective, mask_token, allow_nonfinite)
        schema, fields, special = _read_config(values)
        family = objective or ("autoregressive" if fields["causal"] else "diffusion")
        weights = Weights(path)
        _check_sizes(weights, fields, schema.NAMES)
        tree = _default_tree(fields | {"causal": FAMILIES[family]}, family)
        config = config_lib.from_config_dict(tree)
        _check_tensors(weights, config, schema.NAMES)
    except UserError as error:
        raise UserError(f"--source={path}: {error}") from error
    float32 = weights.dtype(schema.NAMES["final_norm"]) == "F32"
    tree["model"]["dtype"] = "float32" if float32 else "bfloat16"
    tokenizer = _tokenizer(path, special, config, mask_token)
    notes = []
    if config.model.causal and tokenizer.bos_id is not None:
        notes.append(f"texts begin with {tokenizer.piece(tokenizer.bos_id)} (id {tokenizer.bos_id}), as in its config")
    if fields["max_length"] == values.get("sliding_window"):
        notes.append(
            f"the context is its sliding window, {fields['max_length']:,} tokens: so far attention is the same"
        )

    def pieces(config: Config) -> Iterator[tuple[str, tuple, np.ndarray]]:
        try:
            _check_tensors(weights, config, schema.NAMES)
        except UserError as error:  # from_directory has found them to fit its config.json
            raise UserError(f"--config.model... does not fit --source={path}: {error}; keep its model") from error
        return _read_weights(weights, config, schema.NAMES, allow_nonfinite)

    return Source(tree, tokenizer, pieces, {SOURCE_CONFIG: json_files.dumps(values, indent=2).encode()}, tuple(notes))


def write(source: Source, config: Config, workdir: Path, progress: Progress | None = None) -> None:
    """Make `workdir` of a source: the parameters as step 0 of a run not yet begun. It appears whole or not at all."""
    require_plain(workdir)
    pieces = source.pieces(config)
    total, done = accounting.parameters(config.model).total, 0
    with new_directory(workdir, "--workdir") as directory:
        for name, content in {source.tokenizer.file_name: source.tokenizer.content, **source.files}.items():
            write_atomically(directory / name, content)
        leaves = create(directory, config, source.tokenizer.content)
        writing: deque = deque()
        for leaf, index, values in prefetch(pieces):
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
        write_atomically(directory / "config.json", (json_files.dumps(config_lib.to_dict(config), 2) + "\n").encode())


def _require_directory(path: Path) -> None:
    """UserError unless `path` is a directory that can be looked into; names of models on the hub get a hint."""
    if path.is_dir():
        return
    if path.exists():
        raise UserError(f"--source={path} is a file; give the directory that holds config.json and the weights")
    hint = "check the path"
    if len(path.parts) <= 2 and not path.is_absolute():
        hint = f"models are not downloaded: fetch it first (hf download {path} --local-dir DIR) and give that directory"
    raise UserError(f"--source={path} is not a directory of this machine; {hint}")


def _open_workdir(path: Path, objective: str | None, mask_token: str | None, allow_nonfinite: bool) -> Source:
    """The latest checkpoint of another run."""
    old = run_lib.read_config(path)
    checkpoints = Checkpoints(path)
    step = checkpoints.resolve(None)
    run_item.require_same(checkpoints.item(step), old, path / "checkpoints")
    tokenizer = saved_tokenizer(path, checkpoints.item(step))
    if mask_token is not None:
        raise UserError(f"--mask_token={mask_token} is for a Hugging Face directory; a workdir keeps its tokenizer")
    family = objective or old.objective.name
    if family == "diffusion" and tokenizer.mask_id is None:
        tokenizer = tokenizer.with_mask()
        if tokenizer.vocab_size > old.model.vocab_size:
            raise UserError("its tokenizer has no mask token, and its model no row left for one")
    tree = config_lib.to_dict(old)
    tree["model"]["causal"], tree["objective"]["name"] = FAMILIES[family], family

    leaves = open_parameters(checkpoints, step)

    def pieces(config: Config) -> Iterator[tuple[str, tuple, np.ndarray]]:
        if layout.leaf_shapes(config.model) != {name: leaf.shape for name, leaf in leaves.items()}:
            raise UserError(f"--config.model... makes other shapes than --source={path} holds; keep its model")
        for name, leaf in leaves.items():
            for start in range(0, len(leaf), leaf.chunk_rows):
                rows = slice(start, min(start + leaf.chunk_rows, len(leaf)))
                yield name, (rows,), _finite(name, leaf.read(rows), allow_nonfinite)

    kept = path / SOURCE_CONFIG
    return Source(tree, tokenizer, pieces, {SOURCE_CONFIG: json_files.read_bytes(kept)} if kept.exists() else {})


def _read_config(values: dict[str, Any]):
    """(schema, fields of ModelConfig, special ids) of a Hugging Face config.json."""
    kind = values.get("model_type")
    if kind == llada_schema.MODEL_TYPE:
        return llada_schema, *llada_schema.from_json(values)
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


def _check_sizes(weights: Weights, fields: dict[str, Any], names: dict[str, str]) -> None:
    """UserError unless config.json has the sizes of the files: before anything is as large as it says."""
    if fields["layers"] > len(weights.names):
        raise UserError(f"config.json asks for {fields['layers']} layers, the files hold {len(weights.names)} tensors")
    V, D, F = (fields[name] for name in ("vocab_size", "width", "ffn"))
    for name, shape in ((names["embedding"], (V, D)), (names["layers.gate"].format(0), (F, D))):
        if min(shape) > 0 and name in weights.names and weights.shape(name) != shape:
            raise UserError(f"{name} is {list(weights.shape(name))}; config.json makes it {list(shape)}")


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
            raise UserError(f"{name} is {list(weights.shape(name))}; the config makes it {list(shape)}")


def _read_weights(
    weights: Weights, config: Config, names: dict[str, str], allow_nonfinite: bool
) -> Iterator[tuple[str, tuple, np.ndarray]]:
    """Every parameter, a layer's matrix or some rows of a table at a time."""
    if config.model.tie_embeddings and names["head"] in weights.names:
        _check_tied(weights, names)
    shapes = layout.leaf_shapes(config.model)
    for tensor in layout.tensors(config.model, names):
        if tensor.layer is None:
            for start in range(0, tensor.shape[0], _ROWS):
                rows = slice(start, min(start + _ROWS, tensor.shape[0]))
                values = weights.read(tensor.name, rows).astype(np.float32, copy=False)
                yield tensor.leaf, (rows,), _finite(tensor.name, values, allow_nonfinite)
            continue
        ours = np.empty(shapes[tensor.leaf][1:], np.float32)
        theirs = weights.read(tensor.name)
        if tensor.transposed:
            layout.transpose(theirs, layout.as_matrix(tensor.leaf, ours))
        else:
            ours[...] = theirs
        yield tensor.leaf, (tensor.layer,), _finite(tensor.name, ours, allow_nonfinite)


def _finite(name: str, values: np.ndarray, allow_nonfinite: bool) -> np.ndarray:
    """`values`. UserError, naming the tensor, where they hold NaN or infinity, or would make a norm so, and may not."""
    # No comparison holds for NaN.
    if not (allow_nonfinite or (values.max() <= _MOST and values.min() >= -_MOST)):
        raise UserError(
            f"--source: {name} holds NaN or infinity, or a weight beyond {_MOST:g}; "
            "--allow_nonfinite imports it all the same"
        )
    return values


def _check_tied(weights: Weights, names: dict[str, str]) -> None:
    """UserError if a tied model's separate head is not its embedding."""
    rows = weights.shape(names["embedding"])[0]
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        if not np.array_equal(weights.read(names["embedding"], part), weights.read(names["head"], part)):
            raise UserError(f"config.json ties head and embedding, but {names['head']} differs")


def _tokenizer(path: Path, special: dict[str, int], config: Config, mask_token: str | None) -> Tokenizer:
    """The source's tokenizer with a mask; UserError if there is none, or it does not fit the model."""
    files, vocab_size = huggingface_tokenizer.read_files(path), config.model.vocab_size
    if "tokenizer.json" not in files:
        if not (path / SentencePieceTokenizer.file_name).is_file():
            raise UserError(f"--source={path} has neither tokenizer.json nor tokenizer.model; copy the tokenizer there")
        files |= _from_sentencepiece(path, files, special)
    ids = huggingface_tokenizer.vocabulary(files, str(path))
    if not ids:
        raise UserError(f"--source={path}: the tokenizer has no tokens; copy the right tokenizer.json")
    if max(ids.values()) >= vocab_size:
        raise UserError(
            f"--source={path}: the tokenizer has ids up to {max(ids.values())}, the model a vocabulary of "
            f"{vocab_size}; they do not belong together"
        )
    special = dict(special)
    declared = huggingface_tokenizer.declared(files, str(path))
    if config.model.causal and declared.get("bos") in ids:
        special.setdefault("bos", ids[declared["bos"]])
    if special.get("bos") == special.get("eos", ids.get(declared.get("eos"))):
        special.pop("bos", None)  # as in models trained here
    if mask_token is not None:
        if mask_token not in ids:
            raise UserError(f"--mask_token={mask_token} is not a token of {path}; give one that no text needs")
        special["mask"] = ids[mask_token]
    elif "mask" not in special and not huggingface_tokenizer.has_mask(files, str(path)):
        # An ARM can do without; one that has a place for it may become a mask predictor later.
        with contextlib.suppress(UserError if config.model.causal else ()):
            special["mask"] = _free_id(path, ids, vocab_size)
    outside = [f"{role}_token_id={token}" for role, token in special.items() if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"--source={path}: config.json has {outside[0]}; ids of this model are 0 to {vocab_size - 1}")
    content = huggingface_tokenizer.bundle(files, str(path), special)
    return HuggingFaceTokenizer(content, str(path))


def _from_sentencepiece(path: Path, files: dict[str, str], special: dict[str, int]) -> dict[str, str]:
    """Hugging Face files from a SentencePiece model that came without tokenizer.json."""
    name = str(path / SentencePieceTokenizer.file_name)
    proto = parse_proto(json_files.read_bytes(Path(name)), name)
    settings = json_files.parse(files.get("tokenizer_config.json", "{}"), f"tokenizer_config.json of {path}")
    added = _added_tokens(path, settings, len(proto.pieces))
    id_of = {piece.piece: token for token, piece in enumerate(proto.pieces)} | {v: k for k, v in added.items()}
    roles = {role: next((id_of[name] for name in names if name in id_of), None) for role, names in NAMES.items()}
    roles |= {role: token for role, token in special.items() if token < len(proto.pieces) or token in added}
    try:
        made = sentencepiece_files.tokenizer_files(
            proto,
            mask_id=roles["mask"],
            eos_id=roles["eos"],
            pad_id=roles["pad"],
            # Llama's own tokenizer begins texts so unless it is told not to.
            bos_id=roles.get("bos") if settings.get("add_bos_token") is not False else None,
            model_max_length=None,
            added=added,
            keep_marks=False,
        )
    except UserError as error:
        raise UserError(f"--source={path}: {error}; add its tokenizer.json, if it has one") from error
    made = {name: content.decode() for name, content in made.items()}
    kept = {name: settings[name] for name in ("chat_template", "model_max_length", "padding_side") if name in settings}
    made["tokenizer_config.json"] = json_files.dumps(json.loads(made["tokenizer_config.json"]) | kept, indent=1) + "\n"
    return made


def _added_tokens(path: Path, settings: dict[str, Any], pieces: int) -> dict[int, str]:
    """Tokens past the last piece, by id, that the files beside a SentencePiece model add."""
    found: dict[int, str] = {}
    decoder = settings.get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        if token.isascii() and token.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            found[int(token)] = entry["content"]
    if (path / "added_tokens.json").exists():
        values = json_files.read(path / "added_tokens.json")
        found |= {token: content for content, token in values.items() if type(token) is int}
    return {token: content for token, content in found.items() if token >= pieces}


def _free_id(path: Path, ids: dict[str, int], vocab_size: int) -> int:
    """An id that no text uses: a row past the tokenizer's last, else a token its makers reserved. UserError without."""
    last = max(ids.values())
    if last + 1 < vocab_size:
        return last + 1
    for pattern in _FREE:
        free = sorted(token for name, token in ids.items() if pattern.fullmatch(name))
        if free:
            return free[0]
    raise UserError(f"--source={path} has no mask token and no reserved one; name one with --mask_token=TOKEN")
