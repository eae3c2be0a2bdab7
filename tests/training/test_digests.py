"""Digests in checkpoints: damage is noticed and never trained on, and an older step goes on to the right bits."""

import collections
import itertools
import json
import shutil

import in_process
import jax
import numpy as np
import pytest
from faults.r4_damaged_checkpoints import bits, verdicts

import llada
from llada import mesh as mesh_lib
from llada.config import MeshConfig, from_config_dict
from llada.errors import UserError
from llada.interop import importing
from llada.interop.export import export
from llada.training import digests as digests_lib
from llada.training import loop, resuming, run_item
from llada.training.checkpoint import Checkpoints
from llada.training.verification import verify


@pytest.fixture
def copy(trained, tmp_path):
    """A workdir of 12 steps with checkpoints 4, 8 and 12."""
    return shutil.copytree(trained["llada"].workdir, tmp_path / "run")


def state_of(workdir, config, step=12):
    with Checkpoints(workdir) as checkpoints:
        return resuming.restore_state(checkpoints, config, mesh_lib.make(MeshConfig()), step)[0]


def flip(folder):
    """Bits all over the folder's largest file: of the arrays, which have no checksum of their own.

    One bit would do in most places, but not in all: such a file also holds index nodes that later ones replaced.
    """
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    for sixteenth in range(16):
        content[len(content) * (2 * sixteenth + 1) // 32] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16"])
@pytest.mark.parametrize("name", ["head", "layers.query"])
def test_pieces_of_any_shape_add_up_to_the_digest_of_the_whole(name, dtype):
    rng, shape = np.random.default_rng(0), (3, 10, 4, 300)
    x = rng.normal(size=shape).astype(jax.numpy.dtype(dtype))
    tree = {"layers": {"query": x}} if "." in name else {"head": x}
    whole = digests_lib.of_items({"params": jax.tree.map(jax.numpy.asarray, tree)})["params"][name]
    assert len(whole) == (3 if "." in name else 1)
    for cuts in ([], [1], [2, 7], [0, 3], [3, 100]):
        sums = digests_lib.empty(name, shape)
        axes = rng.choice(4, size=min(2, len(cuts)), replace=False)
        pieces = [()]
        for axis in range(4):
            at = sorted({0, shape[axis], *(min(c, shape[axis]) for c in cuts if axis in axes)})
            pieces = [(*p, slice(a, b)) for p in pieces for a, b in itertools.pairwise(at)]
        for piece in pieces:
            digests_lib.add_piece(sums, name, x[piece], shape, tuple(part.start for part in piece))
        assert sums == whole


def test_every_bit_and_exchanged_elements_change_a_digest():
    x = np.random.default_rng(0).normal(size=(64,)).astype(np.float32)

    def digest(values):
        sums = [0]
        digests_lib.add_piece(sums, "head", values, values.shape, (0,))
        return sums[0]

    others = {digest(x), digest(x.view(np.int32)), digest(x[::-1].copy()), digest(np.roll(x, 1))}
    for at in range(64):
        for bit in range(32):
            other = x.view(np.uint32).copy()
            other[at] ^= np.uint32(1 << bit)
            others.add(digest(other.view(np.float32)))
    assert len(others) == 4 + 64 * 32


def test_damage_anywhere_is_noticed_or_harmless(trained, tiny, tmp_path):
    run, mesh = trained["llada"].workdir, mesh_lib.make(MeshConfig())
    found = list(verdicts(run, tmp_path, tiny("llada"), mesh, cases=range(36), seed=28))
    counts = collections.Counter(one.ended for one in found)
    assert not [one for one in found if one.wrong]
    # Files have names of their own in every checkpoint, so that the faults are others each time.
    assert counts["noticed"] >= 8, counts  # files of Orbax that nobody reads are half of all
    assert sum(one.ended == "noticed" for one in found[::6]) >= 2, found[::6]  # bad sectors


@pytest.mark.parametrize("item", ["params", "optimizer_state", "run"])
def test_a_damaged_step_is_set_aside_and_the_one_before_it_ends_with_the_same_bits(item, tiny, trained, copy, capsys):
    """`keep_every` keeps its multiples on the way."""
    flip(copy / "checkpoints" / "12" / item)
    summary = loop.train(tiny("llada", {"checkpoint.keep": 1, "checkpoint.keep_every": 8}), copy)
    said = capsys.readouterr().err
    assert "checkpoint of step 12" in said and "now 12.damaged" in said and "continuing from step 8" in said
    if item != "run":
        assert "is not what was saved" in said
    assert summary["eval_nats_per_token"] == trained["llada"].summary["eval_nats_per_token"]
    assert bits(state_of(copy, tiny("llada"))) == bits(state_of(trained["llada"].workdir, tiny("llada")))
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["12", "12.damaged", "8"]


def test_where_no_step_is_good_nothing_is_moved(tiny, copy):
    for step in (4, 8, 12):
        flip(copy / "checkpoints" / str(step) / "params")
    with pytest.raises(UserError, match="checkpoint of step 12 .*is not what was saved"):
        loop.train(tiny("llada"), copy)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["12", "4", "8"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_readers_name_the_leaf_and_leave_the_step_where_it_is(dtype, copy):
    right = llada.load(copy, dtype=dtype)
    assert right.params["head"].dtype == dtype
    flip(copy / "checkpoints" / "12" / "params")
    with pytest.raises(UserError, match=r"step 12 .* is not what was saved.*--step=8 reads one") as raised:
        llada.load(copy, dtype=dtype)
    assert "\n" not in str(raised.value)
    assert llada.load(copy, step=8, dtype=dtype).step == 8
    assert (copy / "checkpoints" / "12").exists()


def test_export_and_import_publish_nothing_of_a_damaged_step(copy, tmp_path):
    flip(copy / "checkpoints" / "12" / "params")
    with pytest.raises(UserError, match="step 12 .* is not what was saved"):
        export(copy, tmp_path / "export")
    source = importing.open_source(copy)
    with pytest.raises(UserError, match="step 12 .* is not what was saved"):
        importing.write(source, from_config_dict(source.config), tmp_path / "imported")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_was_imported_has_digests(copy, tmp_path):
    source = importing.open_source(copy)
    importing.write(source, from_config_dict(source.config), tmp_path / "imported")
    assert bits(llada.load(tmp_path / "imported").params) == bits(llada.load(copy).params)
    flip(tmp_path / "imported" / "checkpoints" / "0" / "params")
    with pytest.raises(UserError, match="step 0 .* is not what was saved"):
        llada.load(tmp_path / "imported")


def test_one_moment_that_is_missing_is_not_taken_for_zero(tiny, copy):
    path = copy / "checkpoints" / "12" / "run" / "metadata"
    tree = json.loads(path.read_text())
    tree["digests"]["optimizer_state"]["1.0.mu.layers.another"] = [1, 2]
    path.write_text(json.dumps(run_item.sealed(tree)))
    with pytest.raises(UserError, match=r"step 12 .*mu.layers.another is missing"):
        state_of(copy, tiny("llada"))


def test_a_checkpoint_of_format_1_is_read_with_a_remark(tiny, trained, copy, capsys):
    path = copy / "checkpoints" / "12" / "run" / "metadata"
    tree = json.loads(path.read_text()) | {"format_version": 1}
    path.write_text(json.dumps({key: value for key, value in tree.items() if key not in ("digests", "sha256")}))
    assert bits(llada.load(copy).params) == bits(state_of(trained["llada"].workdir, tiny("llada")).params)
    assert "step 12 was saved without digests" in capsys.readouterr().err


def test_verify_names_what_is_damaged(copy):
    whole = in_process.llada("verify", f"--workdir={copy}", "--json")
    found = json.loads(whole.stdout)
    assert whole.returncode == 0 and found["whole"] and not found["damaged"] and not found["remarks"]
    names = {"config.json", "rows", "tokenizer of checkpoints/4", "checkpoints/12/optimizer_state/1.2.count"}
    assert names <= set(found["good"])
    flip(copy / "checkpoints" / "8" / "params")
    flip(copy / "checkpoints" / "12" / "run")
    flip(copy / "data")
    (copy / "checkpoints" / "4").rename(copy / "checkpoints" / "4.damaged")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = in_process.llada("verify", f"--workdir={copy}")
    assert done.returncode == 4 and "4.damaged was set aside by training" in done.stderr
    wrong = [line.partition(": DAMAGED: ")[0] for line in done.stdout.splitlines() if "DAMAGED" in line]
    assert sorted({name.rpartition("/")[0] or name for name in wrong}) == [
        "checkpoints/12",
        "checkpoints/8/params",
        "rows",
    ]
    assert "train.npy: row " in next(line for line in done.stdout.splitlines() if line.startswith("rows: DAMAGED: "))
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_step_that_a_kill_left_half_removed_is_no_damage_and_other_bits_are(copy):
    config = json.loads((copy / "config.json").read_text())
    config["checkpoint"]["keep"] = 2  # 8 and 12: what is left of 4 is on its way out
    (copy / "config.json").write_text(json.dumps(config))
    step = copy / "checkpoints" / "4"
    for path in sorted(path for path in step.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        assert not verify(copy).damaged, path
        path.write_bytes(content)
    flip(step / "params")
    assert [name for name in verify(copy).damaged if name.startswith("checkpoints/4/params/")]
    shutil.rmtree(step / "params")
    shutil.rmtree(copy / "checkpoints" / "8" / "params")
    done = in_process.llada("verify", f"--workdir={copy}")
    assert done.returncode == 4 and "checkpoints/8/params: DAMAGED" in done.stdout
    assert "checkpoints/4 is removed in part: newer ones replace it" in done.stderr
