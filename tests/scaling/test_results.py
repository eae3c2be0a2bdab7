"""Readings: what the fits take of them, each once, which of them compare, and tables that somebody has edited."""

import csv
import dataclasses
import math

import pytest
from synthetic import isoflop_readings, reading, repeated_readings, variant

from llada.errors import UserError
from llada.scaling import results
from llada.scaling.results import STDERR_FLOOR, Result, check_comparable, each_once, points


def one(**changes) -> Result:
    return reading("diffusion", 1e18, 1e8, 3.0, **changes)


@pytest.mark.parametrize(
    ("monte_carlo", "rows", "taken"),
    [
        (0.02, 0.5, 0.02),
        (1e-5, 0.5, STDERR_FLOOR),
        (0.0, 0.5, STDERR_FLOOR),
        (None, 0.5, STDERR_FLOOR),
        (math.nan, 0.5, STDERR_FLOOR),
        (math.inf, 0.5, STDERR_FLOOR),
        (0.02, None, 0.02),
    ],
)
def test_readings_weigh_by_the_error_of_their_draws(monte_carlo, rows, taken):
    """Not by that of the held-out rows, which all runs share."""
    (point,) = points([one(monte_carlo_stderr=monte_carlo, stderr=rows)])["diffusion"]
    assert point == (1e18, 1e8, one().tokens, 3.0, taken)


def test_annealing_is_taken_off_readings_without_it_only():
    early = one(mode="checkpoints", monte_carlo_stderr=0.1)
    arm = reading("autoregressive", 1e18, 1e8, 2.0)
    found = points([one(), early, arm, one(nats_per_token=math.nan), one(nats_per_token=None)], annealing_gain=0.03)
    assert list(found) == ["diffusion", "autoregressive"]
    assert [p.loss for p in found["diffusion"]] == [3.0, pytest.approx(0.97 * 3.0)]
    assert found["diffusion"][1].stderr == pytest.approx(0.97 * 0.1) and found["autoregressive"][0].loss == 2.0


def test_a_reading_given_twice_counts_once():
    rows = isoflop_readings(sizes=3)
    waiting = [dataclasses.replace(r, status="waiting", nats_per_token=None) for r in rows]
    other_host = [dataclasses.replace(r, seconds=1.0, tokens_per_second=None) for r in rows]
    for given in ([*rows, *rows], [*rows, *waiting], [*waiting, *rows], [*rows, *other_host]):
        kept, dropped = each_once(given)
        assert kept == rows and dropped == len(rows)
    other = [dataclasses.replace(r, seed=1) for r in rows]  # another run
    again = [dataclasses.replace(r, nats_per_token=r.nats_per_token + 0.01) for r in rows]  # the grid in two places
    assert each_once([*rows, *other, *again]) == ([*(x for r in zip(rows, again, strict=True) for x in r), *other], 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corpus_digest": "b"}, "differ in corpus_digest"),
        ({"tokenizer_sha256": "b"}, "differ in tokenizer_sha256"),
        ({"eval_rows_digest": "b"}, "differ in eval_rows_digest"),
        ({"matching": "exact"}, "differ in matching"),
        ({"block_cross_document_attention": True}, "differ in objective.block_cross_document_attention"),
        ({"mode": "repeat"}, "is of mode repeat"),
        ({"mode": "variants"}, "is of mode variants"),
        ({"rows_digest": "b"}, "ended on different rows"),
        ({"rows_digest": "b", "variant": "bell"}, "ended on different rows"),
    ],
)
def test_what_does_not_compare_is_refused(change, said):
    known = dict(
        corpus_digest="a",
        tokenizer_sha256="a",
        eval_rows_digest="a",
        rows_digest="a",
        block_cross_document_attention=False,
    )
    check_comparable([one(**known), one(), one(**known, seed=1)])  # what is not known is not held against it
    with pytest.raises(UserError, match=said):
        check_comparable([one(**known), one(), one(**(known | change))])


def test_rows_read_twice_are_no_twins_and_a_variants_name_has_one_meaning():
    plain, bell = one(rows_digest="a"), variant(one(rows_digest="a"), "bell", 0.1, "weight=paper")
    check_comparable([plain, bell, variant(one(rows_digest="b", row_copies=2), "paired", 0.1)])
    with pytest.raises(UserError, match="call two variants 'bell' .weight=paper and weight=flat"):
        check_comparable([plain, bell, variant(one(seed=1), "bell", 0.1)])
    assert list(points([plain, bell])) == ["diffusion", "diffusion:bell"]
    assert each_once([plain, dataclasses.replace(plain, variant="bell"), plain])[1] == 1


def test_two_sizes_of_one_name_on_repeated_data_are_refused():
    rows = repeated_readings({"diffusion": [4.0, 3.0]})
    with pytest.raises(UserError, match="call two sizes 's'"):
        check_comparable([*rows, *repeated_readings({"diffusion": [4.0, 3.0]}, parameters=2e6)])


BAD_CELLS = {
    "objective": ["masked", ""],
    "mode": ["both"],
    "matching": ["flops"],
    "status": ["done"],
    "run": ["", "a\0b", "a\x1b[2J"],
    "size": [""],
    "seed": ["x", "-1", "0.5", "9" * 5000],
    "budget": ["", "nan", "inf", "0", "-1", "1e300"],
    "layers": ["1e3", "0"],
    "non_embedding_parameters": ["0", "-5", "1.5"],
    "tokens": ["0", "nan"],
    "step": ["11", "0"],  # of 10
    "epochs": ["-1", "nan", "inf"],
    "peak_learning_rate": ["0", "inf"],
    "nats_per_token": ["-3", "0", "x"],
    "stderr": ["-1", "inf"],
    "monte_carlo_stderr": ["-1"],
    "draws": ["-1", "x"],
    "block_cross_document_attention": ["yes"],
    "variant": ["a b", "../x", "a:b"],
    "variant_keys": ["a\x1b[2J"],
    "row_copies": ["0", "x", ""],
}


@pytest.mark.parametrize("column", BAD_CELLS)
def test_a_cell_that_no_run_wrote_is_named_with_its_line(column, tmp_path):
    path = tmp_path / "results.csv"
    for bad in BAD_CELLS[column]:
        results.write_csv([one(), one(seed=1)], path)
        header, first, second = list(csv.reader(path.open()))
        second[header.index(column)] = bad
        with path.open("w") as file:
            csv.writer(file).writerows([header, first, second])
        with pytest.raises(UserError, match=rf"results.csv line 3: {column} is"):
            results.read_csv(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "is not UTF-8"),
        (b"", "has no column run"),
        (b"a,b\n1,2\n", "has no column run"),
        ("HEADER", "holds no reading"),
        ("HEADER\nx,y\n", "line 2 has not 40 cells"),
        ("HEADER\nLINE,more\n", "line 2 has not 40 cells"),
        ('HEADER\n"LINE\n', "line . is no line of a table"),
    ],
)
def test_a_table_that_is_none_is_one_line(content, said, tmp_path):
    path = tmp_path / "results.csv"
    results.write_csv([one()], path)
    header, line = path.read_text().splitlines()
    if isinstance(content, str):
        content = content.replace("HEADER", header).replace("LINE", line).encode()
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"--results=.*{said}"):
        results.read_csv(path)


def test_tables_of_earlier_versions_and_of_spreadsheets_are_read(tmp_path):
    path = tmp_path / "results.csv"
    rows = [one(nats_per_token=math.nan, stderr=None), one(seed=1, draws=8, block_cross_document_attention=False)]
    results.write_csv(rows, path)
    text = path.read_text()
    path.write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    found = results.read_csv(path)
    assert found[1] == rows[1] and not found[0].measured and math.isnan(found[0].nats_per_token)
    old = [",".join(line.split(",")[:-7]) + "\n" for line in text.splitlines()]
    path.write_text("".join(old))
    assert results.read_csv(path)[1] == dataclasses.replace(rows[1], draws=None, block_cross_document_attention=None)
