"""What an export is of, and what it may touch: one checkpoint, whole, under one name, and nothing of the user's."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from llada import files
from llada.config import from_config_dict
from llada.errors import UserError
from llada.interop import importing
from llada.interop.export import export
from llada.training import leaves as leaves_lib
from llada.training import loop


def spoilt(workdir, tmp_path, **changes):
    """A copy of a workdir whose config.json was edited."""
    copy = tmp_path / "workdir"
    shutil.copytree(workdir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"] |= changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("changes", [dict(qk_norm=False), dict(rope_theta=1e4), dict(layers=2), dict(norm_eps=0.5)])
def test_a_config_that_is_not_the_checkpoints_is_refused_both_ways(build, tmp_path, changes):
    workdir = spoilt(build(qk_norm=True), tmp_path, **changes)
    name = next(iter(changes))
    with pytest.raises(UserError, match=rf"model\.{name}"):
        export(workdir, tmp_path / "out")
    with pytest.raises(UserError, match=rf"model\.{name}"):
        importing.open_source(workdir)
    assert [path.name for path in tmp_path.iterdir()] == ["workdir"]


@pytest.mark.parametrize("name", ["lr#1", "a?b", "50%", "%41", "a b", "é", "'q\"", "a=b&c", "[c"])
def test_any_name_of_a_directory_will_do(build, tmp_path, name):
    place = tmp_path / name
    shutil.copytree(build(), place / "w")
    export(place / "w", place / "hf")
    source = importing.open_source(place / "hf")
    importing.write(source, from_config_dict(source.config), place / "back")
    export(place / "back", place / "again")
    one, two = (load_file(place / kind / "model-00001-of-00001.safetensors") for kind in ("hf", "again"))
    assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", ["a[b]", "a\\b"])
def test_where_no_checkpoint_could_be_read_again_none_is_begun(build, tiny, tmp_path, name):
    with pytest.raises(UserError, match=r"no checkpoint can be saved under a path with \[...\] or"):
        importing.write(importing.open_source(build()), tiny("llada"), tmp_path / name / "w")
    with pytest.raises(UserError, match=r"no checkpoint can be saved under a path with \[...\] or"):
        loop.train(tiny("llada"), tmp_path / name / "w")
    assert not list(tmp_path.rglob("config.json"))


def test_what_lies_beside_an_export_stays(build, tmp_path):
    export(build(), tmp_path / "ex")
    for name in ("ex.old", "ex.partial", "ex.tmp", ".ex.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    export(build(), tmp_path / "ex", overwrite=True)
    assert len(list(tmp_path.rglob("mine"))) == 4


def test_of_two_exports_at_once_one_is_refused_by_name(build, tmp_path):
    with (
        files.new_directory(tmp_path / "ex", "--out"),
        pytest.raises(UserError, match=r"--out=.*/ex is in use by process \d+ on"),
    ):
        export(build(), tmp_path / "ex")


def test_an_export_overwrites_exports_only(build, tmp_path):
    out = tmp_path / "ex"
    export(build(), out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which no export wrote"):
        export(build(), out, overwrite=True)
    (out / "notes.txt").unlink()
    (out / "README.md").write_text("Another's model")
    with pytest.raises(UserError, match="a model that llada export did not write"):
        export(build(), out, overwrite=True)
    for inside in (build(), build() / "ex", build() / "checkpoints"):
        with pytest.raises(UserError, match="or in it; choose a directory elsewhere"):
            export(build(), inside, overwrite=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export(build(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty/config.json").exists()


def test_a_step_that_goes_meanwhile_gets_one_line(build, tmp_path, monkeypatch):
    workdir = tmp_path / "w"
    shutil.copytree(build(), workdir)
    open_parameters = leaves_lib.open_parameters

    def open_and_lose(checkpoints, step):
        leaves = open_parameters(checkpoints, step)
        shutil.rmtree(workdir / "checkpoints/0")
        return leaves

    monkeypatch.setattr(leaves_lib, "open_parameters", open_and_lose)
    with pytest.raises(UserError, match="step 0 .*was removed while it was read"):
        export(workdir, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_card_says_what_its_figures_are_of(trained, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(trained["llada"].workdir, workdir)

    def card(step=None):
        export(workdir, tmp_path / "out", step, overwrite=True)
        return (tmp_path / "out/README.md").read_text()

    found = card()
    assert "held-out nats per token, in training" in found and "llada evaluate |" not in found
    assert "2 draws each, estimator l_of_L" in found and "license: unknown" in found
    assert "Once upon" not in found and 'tokenizer("' in found
    evaluation = {"step": 12, "nats_per_token": 1.2345, "stderr": None, "bits_per_byte": 2.0, "rows": 1, "draws": 1}
    evaluation |= {"estimator": "bernoulli", "eval_rows_digest": "another"}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    found = card()
    assert f"{trained['llada'].summary['eval_nats_per_token']:.4f} ±" in found
    assert "1.2345 (upper bound on the NLL; 1 held-out rows, 1 draws each, estimator bernoulli)" in found
    assert "not to be compared" in found
    assert "1.2345" not in card(8) and "nats" not in card(4)
