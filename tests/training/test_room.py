"""Saves that find no room: real ones, of files longer than the process may write."""

import resource
import threading

import pytest

from llada.errors import DiskError
from llada.training import loop
from llada.training.checkpoint import Checkpoints


class Room:
    """Progress that lets files grow to a few kilobytes only, from one step until another.

    Nothing should be compiled meanwhile: what JAX caches would be cut off as well.
    """

    def __init__(self, first: int, last: int):
        self.first, self.last, self.said = first, last, []

    def log(self, text: str) -> None:
        self.said.append(text)

    def window(self, step: int, values: dict[str, float]) -> None:
        self.said.append(step)
        if self.first <= step < self.last:
            until_nothing_is_being_saved()  # also before the limit: what an earlier step began to save finds room
        if step == self.first:
            limit(20_000)
        if step == self.last:
            limit(resource.RLIM_INFINITY)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        pass


def until_nothing_is_being_saved() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("save_finalize"):
            threading.Thread.join(thread, 30)  # its own raises what the save met


def limit(most_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(autouse=True)
def room():
    yield
    limit(resource.RLIM_INFINITY)


def test_a_save_that_finds_no_room_is_said_at_once_and_tried_again_at_the_next(tiny, tmp_path):
    config = tiny("llada", {"train.log_every": 1, "checkpoint.every": 3, "evaluate.every": 9})
    room = Room(first=2, last=8)  # steps 3 and 6 are not saved, 9 is
    loop.train(config, tmp_path, progress=room)
    lines = [text for text in room.said if "training goes on" in str(text)]
    assert len(lines) == 2
    assert "File too large while saving a checkpoint" in lines[0] and lines[0].endswith("saves again at step 6")
    after = [step for step in room.said[room.said.index(lines[0]) :] if isinstance(step, int)]
    assert after[0] <= 5, "within a step of its end"
    assert Checkpoints(tmp_path).steps() == [9, 12]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_a_run_without_room_for_its_last_checkpoint_ends_with_the_status_of_a_full_disk(tiny, tmp_path):
    config = tiny("llada", {"train.log_every": 1, "checkpoint.every": 5, "evaluate.every": 5})
    with pytest.raises(DiskError, match="File too large while saving .*the checkpoint of step 5 is good"):
        loop.train(config, tmp_path, progress=Room(first=8, last=100))
    assert not list((tmp_path / "checkpoints").glob("*tmp*")), "it would keep a full disk full"
    limit(resource.RLIM_INFINITY)
    assert loop.train(config, tmp_path)["step"] == 12
