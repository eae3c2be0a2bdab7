"""Functions of goals in processes with pretended devices of their own, as JAX counts its devices once.

for value in Workers("r2_resume", "resumed", {"cases": [1, 2]}, folder, devices=2): ...
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.path.pop(1)  # this file's own directory, whose names are no modules

from faults import tiny_run


class Workers:
    """Processes that run `faults.MODULE.FUNCTION(**arguments)`, a generator; to iterate over what process 0 yields.

    They start at once. `environment` is added to this process's.
    """

    def __init__(
        self,
        module: str,
        function: str,
        arguments: dict[str, Any],
        folder: Path,
        devices: int = 1,
        processes: int = 1,
        environment: dict[str, str] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        variables = os.environ | tiny_run.cache(folder) | {"XLA_FLAGS": flags} | (environment or {})
        self._logs = [folder / f"{function}.{os.getpid()}.{port}.{i}.log" for i in range(processes)]
        self._processes = []
        for i, log in enumerate(self._logs):
            request = {"module": module, "function": function, "arguments": arguments}
            request["group"] = [f"127.0.0.1:{port}", processes, i]
            command = [sys.executable, str(Path(__file__).resolve()), json.dumps(request, default=str)]
            with log.open("w") as errors:
                out = subprocess.PIPE if i == 0 else subprocess.DEVNULL
                self._processes.append(subprocess.Popen(command, env=variables, stdout=out, stderr=errors, text=True))

    def __iter__(self) -> Iterator[Any]:
        """RuntimeError, with the end of what they said, unless all of them end well."""
        try:
            yield from map(json.loads, self._processes[0].stdout)
            statuses = [process.wait(60) for process in self._processes]
            if any(statuses):
                said = "\n".join(tiny_run.excerpt(log.read_text(errors="replace")) for log in self._logs)
                raise RuntimeError(f"workers ended with {statuses}:\n{said}")
        finally:
            self.end()

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes[0].stdout.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _work(request: dict[str, Any]) -> None:
    """In a worker: a JSON line for each value."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, in C++ too, is no value
    import importlib

    from llada import processes
    from llada.commands import environment

    coordinator, count, index = request["group"]
    if count > 1:
        processes.start(coordinator, count, index)
    environment.retain_freed_memory()  # as llada train does: else XLA's few threads may wait for each other for ever
    function = getattr(importlib.import_module(f"faults.{request['module']}"), request["function"])
    for value in function(**request["arguments"]):
        print(json.dumps(value), file=lines, flush=True)


def prepared(folder: Path) -> tuple[str, dict[str, str]]:
    """`data.source`, and changes with which runs share one tokenizer and one directory of rows."""
    from llada.data.tokenizer_training import train_tokenizer

    source = tiny_run.write_documents(folder / "text")
    texts = [path.read_text() for path in sorted((folder / "text").glob("*.txt"))]
    train_tokenizer(texts, 320, folder / "tokenizer.model")
    return source, {"data.tokenizer": str(folder / "tokenizer.model"), "data.directory": str(folder / "rows")}


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
