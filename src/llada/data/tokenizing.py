"""`llada tokenize` on this machine: a plan, its units by several processes, and the manifest last.

Whoever writes a shard, how often it was begun and who else works on the corpus changes no byte: a shard is a function
of the plan, its number and the tokenizer (shards.py). What is finished is never done again. Several calls may share a
directory, on this host or on others, each with its share of the units; the one that finds all of them finished writes
the manifest.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import llada
from llada import json_files
from llada.data import checksums, record_corpus, rows, shards, tokenizer_files, unit_workers, units
from llada.data.prepare import entropy_nats
from llada.data.record_corpus import MANIFEST
from llada.data.record_files import RecordFile
from llada.data.shards import Options, Result
from llada.data.tokenizer import Tokenizer
from llada.data.unit_workers import FORMAT_VERSION, Plan
from llada.data.waiting import Report
from llada.errors import UserError, disk_error
from llada.files import queue_for_lock, remove_temporaries, write_atomically

Log = Callable[[str], None]


def tokenize(
    directory: Path,
    options: Options,
    tokenizer: Tokenizer,
    count: int | None = None,
    job: tuple[int, int] = (1, 1),
    workers: int = 1,
    log: Log = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Write the units of this job, I of N; the manifest's values if all units are finished then, else None.

    `count` is the number of shards (None: by the size of the input). `log` is called with what is left out and, now and
    then, how far it is; `check` as often, and may raise to end the call. UserError for bad inputs, a directory with
    another plan, and a side without a row; DataError where a shard is written again and is not as before; DiskError
    where there is no room; PeerLost where a worker dies.
    """
    report, is_new = Report(log, check), not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        plan = _plan(directory, options, tokenizer, count, log, report)
        if is_complete(directory):
            log(f"{directory} is complete: nothing to do")
            return record_corpus.read_manifest(directory).values
        mine = range(job[0] - 1, len(plan.units), job[1])
        with queue_for_lock(directory / f".{job[0]}-of-{job[1]}.lock", f"tokenises into {directory}", check):
            todo = [unit for unit in mine if shards.finished(directory, unit) is None]
            if todo:
                unit_workers.write(directory, plan, tokenizer, todo, min(workers, len(todo)), report)
        with queue_for_lock(directory / ".manifest.lock", f"writes the manifest of {directory}", check):
            return _finish(directory, plan, tokenizer, log, report)
    except OSError as error:
        raise _unwritable(directory, error) from error
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                directory.rmdir()  # where nothing came of it


def _unwritable(directory: Path, error: OSError) -> Exception:
    if full := disk_error(error, f"writing to {directory}"):
        return full
    if not str(error.filename or "").startswith(str(directory)):
        return error
    return UserError(f"--out={directory} cannot be written: {error.strerror or error}; choose another")


def is_complete(directory: Path) -> bool:
    """Whether there is a manifest, and all of its files at their sizes."""
    try:
        record_corpus.open_corpus(directory)
    except UserError:
        return False
    return True


def _plan(directory: Path, options: Options, tokenizer: Tokenizer, count: int | None, log: Log, report: Report) -> Plan:
    """The plan of a directory, made by the first call. UserError where it is of other values than these."""
    path = directory / "plan.json"
    with queue_for_lock(directory / ".plan.lock", f"plans {directory}", report.check):
        if not path.exists():
            if strange := sorted(file.name for file in directory.iterdir() if not file.name.startswith(".")):
                raise UserError(f"--out={directory} holds other files, such as {strange[0]}; give an empty directory")
            made = units.plan(options.source, count, "--source", log)
            values = {"format_version": FORMAT_VERSION, "options": options._asdict(), "shards": count}
            values |= {"tokenizer_sha256": tokenizer.sha256, "units": units.to_json(made)}
            write_atomically(directory / tokenizer.file_name, tokenizer.content)
            write_atomically(path, json_files.dumps(json_files.sealed(values)).encode())
    plan = unit_workers.read_plan(directory)
    asked = options._asdict() | {"shards": count, "tokenizer": tokenizer.sha256}
    has = plan.options._asdict() | {"shards": plan.asked, "tokenizer": plan.tokenizer_sha256}
    if changed := [f"{key} {has[key]!r}, asked {asked[key]!r}" for key in asked if has[key] != asked[key]]:
        raise UserError(f"--out={directory} was begun with other values ({'; '.join(changed)}); give another --out")
    kept = tokenizer_files.in_workdir(directory)
    if kept is None or hashlib.sha256(kept.read_bytes()).hexdigest() != plan.tokenizer_sha256:
        write_atomically(directory / tokenizer.file_name, tokenizer.content)
    return plan


def _finish(directory: Path, plan: Plan, tokenizer: Tokenizer, log: Log, report: Report) -> dict[str, Any] | None:
    """Write what needs all units, the manifest last; None while some are missing."""
    if is_complete(directory):  # another call has written it meanwhile
        return record_corpus.read_manifest(directory).values
    count = len(plan.units)
    results, counts_V = _results(directory, count, tokenizer.vocab_size, report)
    if len(results) < count:
        log(f"{len(results)} of {count} shards are finished; the call that finishes the last writes {MANIFEST}")
        return None
    (directory / MANIFEST).unlink(missing_ok=True)
    joined = [shards.join(directory, side, results, plan.options, tokenizer) for side in (0, 1)]
    figures: dict[str, Any] = {}
    files: list[list[RecordFile]] = []
    sums = []
    for side, name in enumerate(shards.SIDES):
        of_side = [result.sides[side] for result in results]
        files.append([each.file for each in (*of_side, joined[side]) if each.file])
        sums.append(np.concatenate([each.checksums_N for each in (*of_side, joined[side])]))
        for key in shards.COUNTED:
            figures[f"{name}_{key}"] = sum(getattr(each, key) for each in of_side)
        figures[f"{name}_rows"] = len(sums[side])
        _require_rows(name, figures, plan.options)
        checksums.write(directory / f"{name}{checksums.SUFFIX}", sums[side])
    left_out = sum((Counter(result.counts) for result in results), Counter())
    figures |= {
        "holdout_token_bytes": sum(result.holdout_token_bytes for result in results),
        "unigram_entropy_nats": entropy_nats(counts_V + joined[0].counts_V),
        "checksums": checksums.sha256(*sums),
        "left_out": {key: left_out[key] for key in sorted(left_out)},
    }
    values = json_files.sealed(_values(plan, tokenizer, (files[0], files[1])) | figures)
    write_atomically(directory / MANIFEST, (json_files.dumps(values, indent=2) + "\n").encode())
    for place in (directory, directory / "units"):
        remove_temporaries(place)
    _remark_left_out(left_out, log)
    return values


def _results(directory: Path, count: int, vocab_size: int, report: Report) -> tuple[list[Result], np.ndarray]:
    """The records of the finished units, without their counts of ids, and these added up over the training side."""
    counts_V = np.zeros(vocab_size, np.int64)
    results = []
    for unit in range(count):
        if result := shards.finished(directory, unit):
            counts_V += result.sides[0].counts_V
            train, held_out = (side._replace(counts_V=counts_V[:0]) for side in result.sides)
            results.append(result._replace(sides=(train, held_out)))
        report(f"reading what {unit + 1} of {count} units have come to")
    return results, counts_V


def _values(plan: Plan, tokenizer: Tokenizer, files: tuple[list[RecordFile], list[RecordFile]]) -> dict[str, Any]:
    """What a manifest says besides figures."""
    inputs = {piece.path: piece.size for unit in plan.units for piece in unit}
    return {
        "format": "llada rows in ArrayRecord",
        "format_version": FORMAT_VERSION,
        "llada_version": llada.__version__,
        "record": "the ids of a row, little-endian",
        "dtype": rows.id_dtype(tokenizer.vocab_size).str,
        "packing": shards.PACKING,
        **plan.options._asdict(),
        "holdout_source": None,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "units": len(plan.units),
        "inputs": {"files": len(inputs), "bytes": sum(inputs.values())},
        "digest": record_corpus.digest(files),
        "files": {name: [file._asdict() for file in side] for name, side in zip(shards.SIDES, files, strict=True)},
    }


def _require_rows(side: str, figures: dict[str, Any], options: Options) -> None:
    if not figures[f"{side}_rows"]:
        raise UserError(
            f"the {side} side has {figures[f'{side}_tokens']} tokens of {figures[f'{side}_documents']} documents, less "
            f"than one row of --sequence_length={options.sequence_length}; shorten it, give more documents, or change "
            f"--holdout_fraction={options.holdout_fraction}; another --out"
        )


def _remark_left_out(left_out: Counter[str], log: Log) -> None:
    meanings = {
        "empty": "empty documents are left out",
        "no text": "files of a directory are no UTF-8 text, and left out",
        "replaced": "documents were no UTF-8 text: what is not stands as U+FFFD",
        "skipped": "documents are no UTF-8 text, and left out",
    }
    for key, meaning in meanings.items():
        if left_out[key]:
            log(f"{left_out[key]:,} {meaning}")
