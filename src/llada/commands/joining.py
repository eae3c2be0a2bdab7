"""Flags of the commands that several processes can run together; under Slurm and on TPU pods none are needed."""

from llada import processes
from llada.commands import environment
from llada.commands.command_flags import CommandFlags

FLAGS = CommandFlags()
COORDINATOR = FLAGS.define_string("coordinator", None, "HOST:PORT where process 0 listens for the others")
PROCESSES = FLAGS.define_integer("processes", None, "how many processes there are; 1 alone: ask no cluster for others")
PROCESS_ID = FLAGS.define_integer("process_id", None, "which of them this is, from 0")


def join() -> None:
    """Join the other processes, if there are any, before anything touches a device. UserError if that fails."""
    processes.start(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)
    environment.one_program_at_a_time()
