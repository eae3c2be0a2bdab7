"""A workdir as an older llada left it: python tests/old_checkpoints/make.py NAME FAMILY TREE, TREE a checkout of it.

    git worktree add --detach /tmp/old COMMIT
    python tests/old_checkpoints/make.py no-version llada /tmp/old     # writes no-version-llada.tar.xz and its .json

| NAME | COMMIT | what is new in its checkpoints |
|---|---|---|
| no-version | b8e19b6 | the last without a format version |
| version-1 | 9657ecc | the last of format 1: a version, `begun`, `corpus_digest` |
| version-2 | 1f7b7f8 | the first of format 2: digests and a sha256 |

The archive is of a run that was killed after step 4 of 8; NAME-FAMILY.json has what that llada knew of it: a sha256 of
every array of step 4, read by Orbax, and what the run came to in the end.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP, STEPS = 4, 8
KEYS = {
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.ffn": 24,
    "model.vocab_size": 300,
    "model.max_length": 32,
    "data.source": "text:corpus/*.txt",
    "data.sequence_length": 32,
    "data.holdout_fraction": 0.2,
    "optimizer.schedule": "0:1",
    "train.batch_size": 4,
    "train.steps": STEPS,
    "train.log_every": 2,
    "evaluate.every": STEPS,
    "evaluate.batches": 2,
    "evaluate.draws": 2,
    "checkpoint.every": STEP,
}


def write_corpus(folder: Path) -> None:
    """Documents of made-up sentences."""
    folder.mkdir()
    rng = random.Random(0)
    nouns, verbs = "cat dog bird fish tree stone river cloud".split(), "sees hears likes follows finds".split()
    for i in range(20):
        sentences = (f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} .\n" for _ in range(12))
        (folder / f"{i:02}.txt").write_text(f"chapter {i}\n" + "".join(sentences))


def array_digests(step: Path) -> dict[str, str]:
    """sha256 over dtype, shape and bytes of every array of a step, by item and name; nothing of llada reads them."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found = {}
    for item in ("params", "optimizer_state"):
        tree = ocp.PyTreeCheckpointer().restore(step / item, restore_args=None, item=None)
        for path, leaf in jax.tree.leaves_with_path(tree):
            x = np.asarray(leaf)
            content = f"{x.dtype} {x.shape} ".encode() + x.tobytes()
            name = ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path)
            found[f"{item}/{name}"] = hashlib.sha256(content).hexdigest()
    return found


def main() -> int:
    """Train with the old tree, and pack what it left."""
    name, family, tree = sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_corpus(place / "corpus")
        command = [sys.executable, "-m", "llada", "train", f"--config={tree}/experiments/quickstart.py:{family}"]
        command += ["--workdir=run", *(f"--config.{key}={value}" for key, value in KEYS.items())]
        subprocess.run(command, cwd=place, check=True, env=os.environ | {"PYTHONPATH": str(tree / "src")})
        run = place / "run"
        summary = json.loads((run / "summary.json").read_text())
        facts = {"commit": commit.strip(), "step": STEP, "arrays": array_digests(run / "checkpoints" / str(STEP))}
        facts["after"] = {key: summary[key] for key in ("step", "rows_digest", "eval_nats_per_token", "corpus_digest")}
        shutil.rmtree(run / "checkpoints" / str(STEPS))
        for path in (run / "summary.json", run / "lock", *run.glob("events.*"), *run.rglob(".lock")):
            path.unlink(missing_ok=True)
        archive = HERE / f"{name}-{family}.tar.xz"
        with tarfile.open(archive, "w:xz", preset=9) as packed:
            packed.add(run, arcname="run", filter=_anonymous)
    (HERE / f"{name}-{family}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(archive.stat().st_size, archive)
    return 0


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    sys.exit(main())
