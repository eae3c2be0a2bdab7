"""llada verify --workdir=DIR [--json]

Reads all that lies in the workdir of a run and compares it with what was saved: the arrays of every checkpoint with
their digests, what each says about itself, its tokenizer and config with those beside it, the rows with the digest in
their metadata. What is damaged is printed by name, and nothing is changed. Status 0 only where nothing is damaged, else
4. Training need not stop: a step that it removes meanwhile is passed over.
"""

import sys

from llada.commands import progress
from llada.commands.command_flags import CommandFlags, required
from llada.paths import user_path

FLAGS = CommandFlags()
WORKDIR = FLAGS.define_string("workdir", None, "directory of a run")
JSON = FLAGS.define_bool("json", False, "print what was found as JSON")


def run() -> int:
    """Print what is damaged; status 4 where something is."""
    workdir = user_path(required(WORKDIR, "for example --workdir=runs/first"), "--workdir")
    from llada.errors import DataError
    from llada.training import verification

    with progress.bar("bytes read") as show:
        found = verification.verify(workdir, show)
    if JSON.value:
        print(verification.to_json(found))
        return DataError.status if found.damaged else 0
    for name, what in found.damaged.items():
        print(f"{name}: DAMAGED: {what}")
    for remark in found.remarks:
        print(f"remark: {remark}", file=sys.stderr)
    print(f"{workdir}: {len(found.good)} things are what was saved, {len(found.damaged)} are damaged")
    return DataError.status if found.damaged else 0
