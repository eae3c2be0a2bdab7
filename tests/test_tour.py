"""What README and docs/tour.ipynb say to type in Python runs as it stands, on a run of the tests."""

import json
from pathlib import Path

import pytest

plt = pytest.importorskip("matplotlib.pyplot")
ROOT = Path(__file__).resolve().parents[1]


def test_the_tour_runs_from_its_first_cell_to_its_last(trained, monkeypatch, capsys):
    """Code cells in order, in one namespace, without a notebook server; drawn into memory."""
    plt.switch_backend("agg")
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf().canvas.draw()) or plt.close("all"))
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    line = next(line for line in code[0].splitlines() if line.startswith("WORKDIR = "))
    code[0] = code[0].replace(line, f"WORKDIR = {str(trained['llada'].workdir)!r}")
    namespace: dict = {}
    with plt.rc_context():
        for source in code:
            exec(compile(source, "docs/tour.ipynb", "exec"), namespace)
    printed = capsys.readouterr().out
    assert len(drawn) == 3
    assert "░" in printed and "held out" in printed and printed.count(" ± ") >= 5
    # The likelihoods are a bound on probabilities, and the curve's mean is near the run's own figure.
    assert abs(namespace["mean"].mean() - namespace["summary"]["eval_nats_per_token"]) < 0.3


def test_the_tours_pictures_are_stored():
    """Read on a page that shows notebooks, it has its outputs; no path of the machine that made them."""
    text = (ROOT / "docs" / "tour.ipynb").read_text()
    book = json.loads(text)
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not any(output["output_type"] == "error" for output in outputs)
    assert "/tmp/" not in text and "/home/" not in text and "/root/" not in text


def test_the_lines_of_the_readme_run(trained, capsys):
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    block = block.replace("runs/quickstart/llada", str(trained["llada"].workdir))
    block = block.replace("gen_length=32", "gen_length=8")
    namespace: dict = {}
    exec(compile(block, "README.md", "exec"), namespace)
    run = namespace["run"]
    assert namespace["logits_BLV"].shape == (1, len(run.tokenizer.encode("import numpy")), run.config.model.vocab_size)
    assert "log_likelihood=-" in capsys.readouterr().out
