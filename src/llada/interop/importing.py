"""A Hugging Face directory, or another workdir, as a workdir that every command accepts.

Reads the released LLaDA layout, Llama-family ARMs and iLLaDA. Tensors go from file to checkpoint one by one, so that no
machine ever holds the model: the one that imports needs no accelerator and a few hundred megabytes, and whoever opens
the workdir reads it onto its mesh, each host its shards. Nothing in the source is executed.
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llada import accounting, json_files
from llada import config as config_lib
from llada.config import Config
from llada.data.tokenizer import Tokenizer
from llada.errors import StepRemoved, UserError
from llada.files import new_directory, prefetch, write_atomically
from llada.interop import layout, schema, source_tokenizer, source_weights
from llada.interop.source_weights import Pieces
from llada.objectives import families
from llada.objectives.families import Family
from llada.training import run_item
from llada.training.checkpoint import Checkpoints, require_plain
from llada.training.corpus import saved_tokenizer
from llada.training.leaves import create, finish, open_parameters

_STEPS = 1_000
_WRITES = 4  # pieces being written at once

Report = Callable[[int, int], None]  # of parameters written, and of how many


class Source(NamedTuple):
    """A checked source: a config to start from (nested dict), its tokenizer, and its parameters.

    `pieces(config)` yields (our leaf, index into it, float32 values) until all parameters of `config` have come.
    `files` are small files to store beside them, by name; `notes` are what a user should know. `again` opens a workdir
    once more, where training has removed the step that was being read.
    """

    config: dict[str, Any]
    tokenizer: Tokenizer
    pieces: Callable[[Config], Pieces]
    files: dict[str, bytes]
    notes: tuple[str, ...] = ()
    again: Callable[[], "Source"] | None = None


def open_source(
    path: Path, objective: str | None = None, mask_token: str | None = None, allow_nonfinite: bool = False
) -> Source:
    """Read everything about `path` but the weights' data, and check it.

    `objective` makes the model another family's than it was: an ARM's weights are where a mask predictor may start.
    `mask_token` names the mask where the source has none. UserError for whatever does not fit, and, while the pieces
    are read, for NaN and infinity in them unless that is allowed.
    """
    require_directory(path)
    family = None if objective is None else families.FAMILIES[objective]
    try:
        values = json_files.read(path / "config.json", name="config.json")
        if "model_type" not in values and "model" in values:

            def open_newest(_: int | None = None) -> Source:
                return _open_workdir(path, family, mask_token, allow_nonfinite)

            return run_item.newest_again(path / "checkpoints", open_newest, None)._replace(again=open_newest)
        format_, fields, special = schema.read(values)
        if family is None:
            family = families.AUTOREGRESSIVE if fields["causal"] else families.DIFFUSION
        weights = source_weights.open_weights(path, fields, format_.names)
        tree = _default_tree(fields, family)
        model = config_lib.from_config_dict(tree).model
        source_weights.check_tensors(weights, model, format_.names)
    except UserError as error:
        raise type(error)(f"--source={path}: {error}") from error
    float32 = weights.dtype(format_.names["final_norm"]) == "F32"
    tree["model"]["dtype"] = "float32" if float32 else "bfloat16"
    tokenizer = source_tokenizer.open_tokenizer(path, special, model, mask_token)
    notes = []
    if model.causal and tokenizer.bos_id is not None:
        notes.append(f"texts begin with {tokenizer.piece(tokenizer.bos_id)} (id {tokenizer.bos_id}), as in its config")
    if fields["max_length"] == values.get("sliding_window"):
        notes.append(
            f"the context is its sliding window, {fields['max_length']:,} tokens: so far attention is the same"
        )

    def pieces(config: Config) -> Pieces:
        try:
            source_weights.check_tensors(weights, config.model, format_.names)
        except UserError as error:  # they did fit the source's own config.json
            raise UserError(f"--config.model... does not fit --source={path}: {error}; keep its model") from error
        return source_weights.read_pieces(weights, config.model, format_.names, allow_nonfinite)

    files = {schema.SOURCE_CONFIG: json_files.dumps(values, indent=2).encode()}
    return Source(tree, tokenizer, pieces, files, tuple(notes))


def write(source: Source, config: Config, workdir: Path, progress: Report | None = None) -> None:
    """Create `workdir` from a source, its parameters as step 0 of a run not yet begun; all at once or not at all."""
    require_plain(workdir)
    try:
        _write(source, config, workdir, progress)
    except StepRemoved:
        if source.again is None:
            raise
        _write(source._replace(pieces=source.again().pieces), config, workdir, progress)


def _write(source: Source, config: Config, workdir: Path, progress: Report | None) -> None:
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
        finish(directory, leaves)
        write_atomically(directory / "config.json", (json_files.dumps(config_lib.to_dict(config), 2) + "\n").encode())


def require_directory(path: Path) -> None:
    """UserError unless `path` is a directory that can be looked into; names of models on the hub get a hint."""
    if path.is_dir():
        return
    if path.exists():
        raise UserError(f"--source={path} is a file; give the directory that holds config.json and the weights")
    hint = "check the path"
    if len(path.parts) <= 2 and not path.is_absolute():
        hint = f"models are not downloaded: fetch it first (hf download {path} --local-dir DIR) and give that directory"
    raise UserError(f"--source={path} is not a directory of this machine; {hint}")


def _open_workdir(path: Path, family: Family | None, mask_token: str | None, allow_nonfinite: bool) -> Source:
    """The latest checkpoint of another run."""
    old = config_lib.load(path / "config.json")
    checkpoints = Checkpoints(path)
    item = checkpoints.item_of_run(None)
    tokenizer = saved_tokenizer(path, item)
    if mask_token is not None:
        raise UserError(f"--mask_token={mask_token} is for a Hugging Face directory; a workdir keeps its tokenizer")
    family = family or families.of(old)
    if family.masks and tokenizer.mask_id is None:
        tokenizer = tokenizer.with_mask()
        if tokenizer.vocab_size > old.model.vocab_size:
            raise UserError("its tokenizer has no mask token, and its model no row left for one")
    tree = config_lib.to_dict(old) | {"changes": ()}  # those of its training, which the new one does not go on
    if family is not families.of(old):  # what trains one family is refused for the other
        tree["objective"] = dataclasses.asdict(old.objective.plain)
    tree["model"]["causal"], tree["objective"]["name"] = family.causal, family.name
    leaves = open_parameters(checkpoints, item.step)

    def pieces(config: Config) -> Pieces:
        if layout.leaf_shapes(config.model) != {name: leaf.shape for name, leaf in leaves.items()}:
            raise UserError(f"--config.model... makes other shapes than --source={path} holds; keep its model")
        for name, leaf in leaves.items():
            for rows in source_weights.row_slices(len(leaf), leaf.chunk_rows):
                with checkpoints.usable(item.step):
                    values = leaf.read(rows)
                yield name, (rows,), source_weights.finite(name, values, allow_nonfinite)

    imported = path / schema.SOURCE_CONFIG
    files = {schema.SOURCE_CONFIG: json_files.read_bytes(imported)} if imported.exists() else {}
    return Source(tree, tokenizer, pieces, files)


def _default_tree(fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """A complete config around a model: the defaults, and rows as long as its context."""
    tree = config_lib.default_config().to_dict()
    tree["model"] |= fields | {"causal": family.causal}
    tree["objective"]["name"] = family.name
    if family.causal:
        tree["objective"]["random_length_fraction"] = 0.0
    tree["data"]["sequence_length"] = fields["max_length"]
    tree["train"]["steps"] = _STEPS
    return tree
