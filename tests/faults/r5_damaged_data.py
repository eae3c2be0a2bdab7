"""Damage to a prepared corpus, of documents or of dialogues, and what the run that goes on from it reads."""

import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from faults.goal import Outcome

from llada import json_files
from llada.config import Config, default_config, from_config_dict
from llada.data import checksums
from llada.data.tokenizer_training import train_tokenizer
from llada.errors import UserError
from llada.training import loop, run_item
from llada.training.corpus import corpus_for, saved_tokenizer
from llada.training.verification import verify

NUMBER = "R5"
TITLE = "Damaged data"
DEMAND = "refused in one line before the batch that would use it, file, row and byte named, and seen by llada verify"
FULL, SAMPLE = 1000, 16

TRAINED = 75  # one case in so many trains on; odd, so that documents and dialogues take turns
STEPS, SAVED = 12, 4  # of the undisturbed runs, and the step from which a case goes on
BYTES_FOR_ROWS = 8  # of ten cases with one wrong bit: those that hit rows, not the small files


class Run(NamedTuple):
    """An undisturbed run: its workdir as it was after step SAVED, its config, and what it reads."""

    workdir: Path
    config: Config
    batches: list[list[np.ndarray]]
    held_out: list[np.ndarray]
    summary: dict


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Documents and dialogues by turns, and kinds of damage; some cases train on."""
    runs = [undisturbed(folder / name, source) for name, source in (("rows", documents), ("dialogues", dialogues))]
    other = train_tokenizer(["quite other words for a vocabulary " * 40], 300, folder / "other.model").content
    for case in range(count):
        rng = random.Random(f"{seed} {case}")
        run, kind = runs[case % 2], KINDS[case // 2 % len(KINDS)]
        place = folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(run.workdir, place, symlinks=True, ignore=shutil.ignore_patterns("checkpoints"))
        trained = case % TRAINED == TRAINED - 1
        if trained:
            shutil.copytree(run.workdir / "checkpoints", place / "checkpoints")
        else:
            (place / "checkpoints").symlink_to(run.workdir / "checkpoints")
        done = kind(rng, Damage(place, run, other))
        what = f"case {case}, {run.workdir.parent.name}: {kind.__name__} {done.what}"
        yield trains(what, place, run) if trained else reads(what, place, run, done)


class Done(NamedTuple):
    """What was done; words that the line has to have if it says what is wrong with a row."""

    what: str
    row_words: tuple[str, ...] = ()


def reads(what: str, place: Path, run: Run, done: Done) -> Outcome:
    """Everything that training and evaluation would read, as they read it, compared with what it was."""
    had_metadata = (place / "data" / "metadata.json").exists()
    reading, ended, wrong = "opening", "harmless", ""
    try:
        for reading, found, expected in everything(place, run):
            if not all(map(np.array_equal, found, expected)) or len(found) != len(expected):
                return Outcome(what, "silent", f"{reading} is another, and nothing was said")
        ended = ended if had_metadata else "prepared again"
    except UserError as error:
        ended = "refused when opened" if reading == "opening" else "refused when read"
        line = str(error)
        if "\n" in line or str(place) not in line:
            wrong = f"not one line that names a file: {line}"
        elif reading != "opening" and not all(word in line for word in done.row_words):
            wrong = f"does not say {done.row_words}: {line}"
        elif not verify(place).damaged:
            wrong = "llada verify says that all is whole"
    except Exception as error:
        ended, wrong = "traceback", repr(error)
    return Outcome(what, ended, wrong)


def everything(place: Path, run: Run) -> Iterator[tuple[str, list[np.ndarray], list[np.ndarray]]]:
    """Name, arrays as they are, arrays as they were: of each batch of an epoch, then of the held-out side."""
    item = run_item.read(place / "checkpoints", SAVED)
    tokenizer = saved_tokenizer(place, item)
    corpus = corpus_for(place, run.config, tokenizer, item.cursor["corpus_digest"])
    batches = corpus.batches(run.config, tokenizer)
    held_out = corpus.held_out(run.config, tokenizer)
    for step, expected in enumerate(run.batches):
        yield f"batch {step}", [], []  # so that an error of this batch is one of reading
        yield f"batch {step}", arrays(batches.at(step)), expected
    yield "the held-out side", [], []
    yield "the held-out side", arrays(held_out[np.arange(len(held_out))]), run.held_out


def arrays(rows) -> list[np.ndarray]:
    """Of a batch."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(rows)]


def trains(what: str, place: Path, run: Run) -> Outcome:
    """Training called on it: refused, with nothing wrong saved; or to the end that the undisturbed run came to."""
    try:
        summary = loop.train(run.config, place)
        right = all(summary[key] == run.summary[key] for key in ("rows_digest", "eval_nats_per_token"))
        return Outcome(f"{what}, trained on", "trained to the end", "" if right else "to another end")
    except UserError as error:
        ended, wrong = "training refused", "" if "\n" not in str(error) else str(error)
    except Exception as error:
        ended, wrong = "traceback", repr(error)
    for step in run_item.saved_steps(place / "checkpoints"):
        saved, right = (run_item.read(path / "checkpoints", step) for path in (place, run.workdir.parent / "whole"))
        if saved.cursor["rows_digest"] != right.cursor["rows_digest"]:
            wrong = f"step {step} was saved after other rows"
    return Outcome(f"{what}, trained on", ended, wrong)


# Kinds of damage.


class Damage(NamedTuple):
    """Where to do it."""

    place: Path
    run: Run
    other_tokenizer: bytes

    @property
    def data(self) -> Path:
        """The corpus."""
        return self.place / "data"

    def file(self, rng: random.Random, pattern: str = "*.*") -> Path:
        """One of its files."""
        return rng.choice(sorted(self.data.glob(pattern)))


def ids(path: Path) -> np.ndarray:
    """Of one side, (N, L)."""
    return np.lib.format.open_memmap(path, mode="r+")


def one_bit(rng: random.Random, damage: Damage) -> Done:
    """Most often in the rows."""
    side = rng.choice(("train", "holdout"))
    path = damage.data / f"{side}.npy" if rng.randrange(10) < BYTES_FOR_ROWS else damage.file(rng)
    content = bytearray(path.read_bytes())
    header = ids(path).offset if path.suffix == ".npy" else 0
    first = header if rng.randrange(10) and path.stem in ("train", "holdout") else 0
    at = rng.randrange(first, len(content))
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    words = () if at < header or path.stem not in ("train", "holdout") else row_words(damage, path, at - header)
    return Done(f"at {at} of {path.name}", words)


def row_words(damage: Damage, path: Path, at: int) -> tuple[str, ...]:
    """What a line has to say of damage to a byte of the ids."""
    rows_NL = ids(path)
    if damage.run.config.fine_tunes:  # several examples may hold it: the first to be read is named
        return (f"{path}: example ", "at byte ", "llada verify")
    row = at // (rows_NL.shape[1] * rows_NL.itemsize)
    byte = rows_NL.offset + row * rows_NL.shape[1] * rows_NL.itemsize
    return (f"{path}: row {row}, at byte {byte},", "llada verify")


def truncated(rng: random.Random, damage: Damage) -> Done:
    """Anywhere, also to nothing."""
    path = damage.file(rng)
    content = path.read_bytes()
    kept = rng.choice((0, rng.randrange(len(content)), len(content) - 1))
    path.write_bytes(content[:kept])
    return Done(f"{path.name} to {kept} of {len(content)} bytes")


def longer(rng: random.Random, damage: Damage) -> Done:
    """Something behind its end."""
    path = damage.file(rng)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 200)))
    return Done(path.name)


def missing(rng: random.Random, damage: Damage) -> Done:
    """A file, or all of them but the metadata."""
    path = damage.file(rng)
    path.unlink()
    return Done(path.name)


def zeros(rng: random.Random, damage: Damage) -> Done:
    """As a lost block of a disk."""
    path = damage.file(rng)
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content)) // 512 * 512
    content[at : at + 512] = bytes(len(content[at : at + 512]))
    path.write_bytes(content)
    return Done(f"at {at} of {path.name}")


def exchanged(rng: random.Random, damage: Damage) -> Done:
    """Two rows, or two runs of ids: each is as it was, in another's place."""
    path = damage.data / f"{rng.choice(('train', 'holdout'))}.npy"
    rows_NL = ids(path)
    a, b = rng.sample(range(len(rows_NL)), 2)
    rows_NL[[a, b]] = rows_NL[[b, a]]
    return Done(f"{a} and {b} of {path.name}")


def files_exchanged(rng: random.Random, damage: Damage) -> Done:
    """One side for the other, or the files of another kind."""
    a, b = rng.sample(sorted(damage.data.glob("*.npy")), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return Done(f"{a.name} and {b.name}")


def swapped_tokenizer(rng: random.Random, damage: Damage) -> Done:
    """The workdir's tokenizer, or the one that the metadata say."""
    if rng.randrange(2):
        (damage.place / "tokenizer.model").write_bytes(damage.other_tokenizer)
        return Done("in the workdir")
    metadata(damage, tokenizer_sha256="0" * 64)
    return Done("in metadata.json")


def metadata(damage: Damage, **changes) -> None:
    """Other values, under a seal that is right; None removes a key."""
    path = damage.data / "metadata.json"
    values = json.loads(path.read_text()) | changes
    values = {key: value for key, value in values.items() if value is not None or key not in changes}
    if "checksums" not in values:
        del values["sha256"]
    path.write_text(json.dumps(json_files.sealed(values) if "sha256" in values else values))


def beyond_vocabulary(rng: random.Random, damage: Damage) -> Done:
    """An id that no text has, under checksums that are right, or in a corpus of an older llada, which has none."""
    side = rng.choice(("train", "holdout"))
    path = damage.data / f"{side}.npy"
    rows_NL = ids(path)
    at = rng.randrange(rows_NL.size)
    rows_NL.reshape(-1)[at] = rng.randrange(damage.run.config.model.vocab_size, 65_536)
    if rng.randrange(2):
        for old in damage.data.glob(f"*{checksums.SUFFIX}"):
            old.unlink()
        metadata(damage, checksums=None)
    else:
        reseal(damage)
    return Done(f"at {at} of {path.name}", (str(path), f"at byte {rows_NL.offset + 2 * at}, holds id", "vocabulary"))


def reseal(damage: Damage) -> None:
    """Checksums and seal as if what is there had been prepared; the digest of the run is another matter."""
    sealed = []
    for side in ("train", "holdout"):
        rows_NL = ids(damage.data / f"{side}.npy")
        if damage.run.config.fine_tunes:
            table = np.load(damage.data / f"{side}.examples.npy")
            found = np.array([zlib.crc32(rows_NL[start:end].tobytes()) for start, _, end in table[:, :3].tolist()])
        else:
            found = checksums.of_rows(rows_NL)
        sealed.append(found.astype("<u4"))
        checksums.write(damage.data / f"{side}{checksums.SUFFIX}", sealed[-1])
    if damage.run.config.fine_tunes:
        sealed += [np.load(damage.data / f"{side}.examples.npy") for side in ("train", "holdout")]
    metadata(damage, checksums=checksums.sha256(*sealed))


def another_dtype(rng: random.Random, damage: Damage) -> Done:
    """The same numbers, or bits, as another kind of number."""
    path = damage.file(rng, "*.npy")
    x = np.load(path)
    dtype = rng.choice(("<u4", ">u2", "<i2", "<f4", "<i8", "<u8", "|S4", "<M8[s]", "<c8"))
    values = x.astype(dtype) if dtype != "<M8[s]" else x.astype("<i8").view(dtype)
    if values.dtype == x.dtype:
        values = x.astype(">i8")
    np.save(path, values)
    return Done(f"{path.name}, {x.dtype} as {values.dtype}")


def another_length(rng: random.Random, damage: Damage) -> Done:
    """Rows of another length or number, or in another order on disk."""
    path = damage.file(rng, "*.npy")
    x = np.load(path)
    how = rng.choice(("fewer", "more", "flat", "transposed", "fortran"))
    other = {
        "fewer": lambda: x[:-1],
        "more": lambda: np.concatenate([x, x[:1]]),
        "flat": lambda: x.reshape(-1, 1, 1),
        "transposed": lambda: np.ascontiguousarray(x.T)[None],
        "fortran": lambda: np.asfortranarray(x[:, :1].repeat(2, 1)) if x.ndim == 2 else x[::-1].reshape(1, -1),
    }[how]()
    np.save(path, other)
    return Done(f"{path.name}, {how}")


def metadata_of_another(rng: random.Random, damage: Damage) -> Done:
    """Under a seal that is right: a corpus with other settings, other sizes, another digest."""
    path = damage.data / "metadata.json"
    name = rng.choice(("source", "sequence_length", "train_rows", "holdout_rows", "digest", "holdout_fraction"))
    old = json.loads(path.read_text())[name]
    new = f"{old}x" if isinstance(old, str) else old / 2 if isinstance(old, float) else old + rng.choice((-1, 1, 10**6))
    metadata(damage, **{name: new})
    return Done(f"{name}={new}")


KINDS: tuple[Callable[[random.Random, Damage], Done], ...] = (
    *(one_bit,) * 8,
    *(truncated, longer, missing, zeros, exchanged, files_exchanged, swapped_tokenizer),
    *(beyond_vocabulary, beyond_vocabulary, another_dtype, another_length, metadata_of_another),
)

# The undisturbed runs.


def documents(folder: Path) -> dict[str, dict]:
    """Keys of a run on documents."""
    rng = random.Random(0)
    for i in range(30):
        words = (rng.choice("the cat dog bird sees hears likes a tree river .".split()) for _ in range(120))
        (folder / f"{i:02}.txt").write_text(f"{i} {' '.join(words)}\n")
    return {"data": {"source": f"text:{folder}/*.txt"}}


def dialogues(folder: Path) -> dict[str, dict]:
    """Keys of a run on dialogues of one to three turns."""
    rng, lines = random.Random(0), []
    for i in range(80):
        messages = []
        for _ in range(1 + i % 3):
            words = " ".join(rng.choices("cat dog bird fish tree stone river cloud".split(), k=rng.randint(1, 4)))
            messages += [{"role": "user", "content": f"copy {words}"}, {"role": "assistant", "content": words}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "d.jsonl").write_text("".join(lines))
    data = {"source": f"dialogues:{folder}/d.jsonl"}
    return {"data": data, "dialogues": {"turns": "each"}, "objective": {"random_length_fraction": 0.0}}


def undisturbed(folder: Path, source: Callable[[Path], dict[str, dict]]) -> Run:
    """A run to its end; its workdir as after step SAVED."""
    (folder / "text").mkdir(parents=True)
    c = default_config()
    c.model.update(dict(layers=1, width=16, heads=1, ffn=16, vocab_size=340, max_length=64, dtype="float32"))
    c.data.update(dict(sequence_length=64, holdout_fraction=0.2))
    c.train.update(dict(batch_size=8, steps=STEPS, log_every=STEPS))
    c.evaluate.update(dict(every=0, batches=2, draws=1))
    c.checkpoint.update(dict(every=SAVED, keep=10))
    for group, keys in source(folder / "text").items():
        c[group].update(keys)
    config = from_config_dict(c)
    whole, workdir = folder / "whole", folder / "run"
    summary = loop.train(config, whole)
    shutil.copytree(whole, workdir)
    for step in range(SAVED + 1, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(step), ignore_errors=True)
    (workdir / "summary.json").unlink()
    item = run_item.read(workdir / "checkpoints", SAVED)
    tokenizer = saved_tokenizer(workdir, item)
    corpus = corpus_for(workdir, config, tokenizer)
    stream, held_out = corpus.batches(config, tokenizer), corpus.held_out(config, tokenizer)
    epoch = [arrays(stream.at(step)) for step in range(stream.steps(1.0))]
    return Run(workdir, config, epoch, arrays(held_out[np.arange(len(held_out))]), summary)
