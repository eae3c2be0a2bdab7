"""llada chat: turns from a pipe are answered one a line, settings and mistakes are one line, a terminal can be left."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import in_process
import pytest

from llada.commands import chat, chat_session
from llada.data import dialogues


@pytest.fixture
def talk(trained, monkeypatch):
    """`talk("llada", "the cat\\n/steps 4\\n", "--json")`: a piped dialogue, its status and what it printed."""

    def run(family, lines, *arguments):
        content = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return in_process.llada("chat", f"--workdir={trained[family].workdir}", "--gen_length=8", *arguments)

    return run


def refused(done) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("family", ["llada", "arm"])
def test_each_line_of_a_pipe_is_answered_and_the_dialogue_can_be_saved_and_read(talk, family, trained, tmp_path):
    path = tmp_path / "new" / "dialogue.json"
    lines = f"the cat\n\n//save\r\n/save {path}\n/reset\nthe cat\n/quit\nnever\n"
    done = talk(family, lines, "--json", "--temperature=1")
    assert done.returncode == 0, done.stderr
    first, second, again = map(json.loads, done.stdout.splitlines())
    assert {"text", "ids", "finish_reason", "prompt_tokens", "forward_passes", "seconds"} <= first.keys()
    assert first["text"] == again["text"] and second["prompt_tokens"] > first["prompt_tokens"]
    assert f"4 messages in {path}" in done.stderr
    (dialogue,) = dialogues.read(str(path))
    assert [message["content"] for message in dialogue.messages] == ["the cat", first["text"], "/save", second["text"]]

    plain = talk(family, "the cat\n", "--temperature=1")
    assert (plain.stdout, plain.stderr) == (first["text"] + "\n", "")
    ids = prompt_ids(trained[family].workdir, "the cat")
    sampled = in_process.llada(
        "sample",
        f"--workdir={trained[family].workdir}",
        "--gen_length=8",
        "--temperature=1",
        "--json",
        f"--prompt_ids={ids}",
    )
    assert json.loads(sampled.stdout)["ids"][first["prompt_tokens"] :][: len(first["ids"])] == first["ids"]


def prompt_ids(workdir, text):
    import llada
    from llada.inference.chat import Chat

    ids = Chat(llada.load(workdir))._prompt_ids([{"role": "user", "content": text}])
    return ",".join(map(str, ids))


MISTAKES = {
    "an unknown command": ("the cat\n/stpes 4\n", [], ["line 2: ", "no /stpes", "/steps"]),
    "a value that is none": ("/steps many\n", [], ["line 1: ", "'many' is not a whole number"]),
    "more steps than tokens": ("/steps 9\n", [], ["line 1: ", "--steps=9"]),
    "a value too many": ("/reset all\n", [], ["line 1: ", "/reset takes no value"]),
    "no file": ("/save\n", [], ["line 1: ", "/save needs a file"]),
    "a file of another kind": ("/save a.txt\n", [], ["line 1: ", "a.txt", ".json or .jsonl"]),
    "nothing to save": ("/save a.json\n", [], ["line 1: ", "no answer to save"]),
    "no UTF-8": (b"\n\xff\n", [], ["line 2: ", "byte 1 is not UTF-8"]),
    "a dialogue beyond the context": ("cat " * 40, [], ["line 1: ", "model.max_length=32", "/reset", "--trim"]),
    "a watched pipe": ("", ["--watch"], ["--watch", "no terminal"]),
    "a template that is not there": ("", ["--template=/no.jinja"], ["--template=/no.jinja", "does not exist"]),
    "a host for nobody": ("", ["--host=0.0.0.0"], ["--host=0.0.0.0", "--serve"]),
    "a port that is none": ("", ["--serve=70000"], ["--serve=70000", "65535"]),
    "more steps by flag": ("", ["--steps=9"], ["--steps=9"]),
    "another group's key": ("", ["--config.train.steps=9"], ["--config.train.steps", "llada train"]),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_gets_one_line_and_status_2(talk, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines, arguments, words = MISTAKES[name]
    line = refused(talk("llada", lines, *arguments))
    assert line.startswith("llada chat: ") and all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_an_arm_has_no_options_of_the_reverse_process(talk):
    assert "line 1: --steps needs a diffusion model" in refused(talk("arm", "/steps 4\n"))
    assert "--eos needs a diffusion model" in refused(talk("arm", "", "--eos=no_logits"))


def test_settings_are_shown_set_and_reset(talk):
    lines = "/steps\n/steps 4\n/steps default\n/block_length 4\n/temperature 0.5\n/system be brief\n/system\n/help\n"
    done = talk("llada", lines)
    assert (done.returncode, done.stdout) == (0, "")
    *said, now = done.stderr.strip().splitlines()
    assert said[:7] == [
        "steps is the default",
        "steps is 4",
        "steps is the default",
        "block_length is 4",
        "temperature is 0.5",
        "the dialogue begins with: be brief",
        "no system message",
    ]
    assert all(any(line.startswith(f"  /{name}") for line in said) for name in chat_session.COMMANDS)
    assert "gen_length 8, block_length 4, temperature 0.5" in now


def test_old_turns_go_where_that_is_asked_for(talk):
    done = talk("llada", "the cat\n" * 6, "--json", "--trim")
    assert done.returncode == 0, done.stderr
    lengths = [json.loads(line)["prompt_tokens"] for line in done.stdout.splitlines()]
    assert len(lengths) == 6 and max(lengths) <= 24
    assert "no room for an answer" in refused(talk("llada", "the cat\n" * 6))


def test_every_option_of_the_engine_has_a_flag():
    from llada.inference.chat import Options

    assert {flag.name: flag.default for flag in chat.OPTIONS} == Options()._asdict()


def test_the_server_s_port_may_be_left_out(monkeypatch):
    for words, port in (([], None), (["--serve"], 8000), (["--serve=0"], 0), (["--noserve"], None)):
        chat.FLAGS.parse("chat", words, str)
        assert chat.SERVE.value == port
    chat.FLAGS.parse("chat", [], str)


class Terminal:
    """`llada chat` on a terminal of its own."""

    def __init__(self, *arguments):
        self.mine, theirs = pty.openpty()
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        command = [sys.executable, "-m", "llada", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, words, seconds=120):
        """Everything that was shown since the last call, up to and with `words`."""
        deadline = time.monotonic() + seconds
        while words not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.mine], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # it has ended
                    self.shown += os.read(self.mine, 65536).decode(errors="replace")
            elif self.process.poll() is not None:
                raise AssertionError(self.shown)
        before, _, self.shown = self.shown.partition(words)
        return before + words

    def type(self, text):
        os.write(self.mine, text.encode())

    def interrupt(self, words):
        """Ctrl-C, again where nothing answers, until the words are shown or (None) the process ends.

        Python loses a Ctrl-C that comes between readline's prompt and its wait for keys, until the next key or signal.
        """
        for _ in range(20):
            os.kill(self.process.pid, signal.SIGINT)
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                return self.process.wait(5) if words is None else self.wait_for(words, seconds=5)
        raise AssertionError(self.shown)


def test_a_terminal_draws_replies_is_interrupted_and_left(trained, tmp_path):
    history = tmp_path / "history"
    terminal = Terminal(
        f"--workdir={trained['llada'].workdir}", "--gen_length=8", "--watch", f"--history={history}", "--temperature=1"
    )
    try:
        terminal.wait_for("Ctrl-D ends")
        terminal.type("the \\\rcat\r")
        drawn = terminal.wait_for("8 passes")
        assert "step 1/8" in drawn and "░" in drawn and "compiling" in drawn
        terminal.type("again\r")
        terminal.wait_for("step 2/8")
        terminal.interrupt("the dialogue is as before")
        terminal.type(f"/nonsense\r/save {tmp_path}/d.jsonl\r")
        assert "there is no /nonsense" in re.sub(r"\s+", " ", terminal.wait_for("/quit"))
        terminal.wait_for("2 messages in")
        terminal.wait_for("> ")
        terminal.interrupt("Ctrl-C again")
        terminal.wait_for("> ")
        assert terminal.interrupt(None) in (0, 130)  # 130 where the signal comes between two prompts
    finally:
        terminal.process.kill()
        os.close(terminal.mine)
    (dialogue,) = dialogues.read(f"{tmp_path}/d.jsonl")
    assert dialogue.messages[0]["content"] == "the \ncat"
    assert history.read_text().splitlines()[:3] == ["the \\", "cat", "again"]
