"""The `llada` program: finds the command, parses its flags, and turns a user's mistake into one line and status 2."""

import importlib
import os
import sys
from pathlib import Path

from absl import flags

from llada.commands import experiment, memory
from llada.errors import UserError

COMMANDS = {
    "train": "pre-train a model; continues by itself where the workdir holds a checkpoint",
    "evaluate": "held-out bound (LLaDA) or NLL (ARM), with its standard error",
    "likelihood": "log p(answer | prompt): a bound with its standard error (LLaDA), or exact (ARM)",
    "sample": "text from a trained model: continue a prompt or fill gaps",
    "export": "a checkpoint as a Hugging Face directory, for PyTorch",
    "import": "a Hugging Face directory (LLaDA-8B, Llama ...) as a workdir",
    "plan": "what a program would need and do on a TPU slice, compiled for it on any machine",
    "sweep": "a grid of runs under FLOP budgets: fits, plots, report",
    "compare": "curves and a report of a LLaDA and its ARM twin",
}


def start() -> int:
    """The program as a process of its own."""
    memory.use_huge_pages()
    return main()


def main(argv: list[str] | None = None) -> int:
    """Run `llada COMMAND --flags`; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"llada: there is no command {name!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _keep_compiled_programs()
    command = importlib.import_module(f"llada.commands.{name}")
    if any(word in ("-h", "--help", "-help") for word in rest):
        print(f"{command.__doc__}\n\nflags:{flags.FLAGS.module_help(command)}")
        return 0
    try:
        rest, overrides = experiment.take_overrides(rest)
        extra = flags.FLAGS([f"llada {name}", *rest])[1:]
        if extra:
            raise UserError(f"{extra[0]!r} is not a flag; flags look like --name=value; see llada {name} --help")
        configures = name in ("train", "import", "sweep", "plan")
        if overrides and not configures:
            raise UserError(f"--config.{next(iter(overrides))} belongs to llada train; a workdir keeps its own config")
        return command.run(overrides) if configures else command.run()
    except (UserError, flags.Error) as error:
        print(f"llada {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"llada {name}: interrupted", file=sys.stderr)
        return 130


def _keep_compiled_programs() -> None:
    """What one call compiles, later ones read; JAX's own variable names another directory, or none (empty)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "llada" / "compiled"))


def _usage() -> str:
    lines = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    return f"llada COMMAND --flags   (llada COMMAND --help lists them)\n\n{lines}"
