"""The README.md of an exported model: what it is, how it was trained, how to use it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from llada import accounting, json_files
from llada.config import Config
from llada.data.tokenizer import Tokenizer
from llada.paths import user_path
from llada.training import metrics

_LLADA_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
ids = model.generate(**tokenizer({prompt}, return_tensors="pt"), gen_length={length}, steps={length})
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

`trust_remote_code=True` runs the two Python files in this directory, which need torch and transformers only.
`generate` runs the reverse process: `steps`, `block_length`, `temperature`, `cfg_scale`, `remasking`, `cache`.
A forward pass gives logits for every position; masked positions hold the token {mask_id}.
"""
_ARM_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
ids = model.generate(**tokenizer({prompt}, return_tensors="pt"), max_new_tokens={length})
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

{begun}
"""

ORIGIN = "trained with llada in JAX and exported for PyTorch"  # by which exports are known again


def text(config: Config, workdir: Path, step: int, dtype: str, architecture: str, tokenizer: Tokenizer) -> str:
    """The card in Markdown; facts come from the run's own files, and a fact that is not there is not told."""
    causal = config.model.causal
    count = accounting.parameters(config.model)
    tags = ["llada", "jax", *([] if causal else ["diffusion", "masked-diffusion"])]
    code = config.data.source == "stdlib" and step > 0
    front = [
        *("library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"),
        "license: unknown  # fill in before you publish: that of the weights, such as apache-2.0",
        f"language: [{'code' if code else ''}]  # fill in: such as [en]",
        "datasets: []  # fill in: names on the hub of what it was trained on",
    ]
    facts = {
        "architecture": f"`{architecture}`, {'causal' if causal else 'bidirectional'}",
        "layers, width, heads (key/value), FFN": f"{config.model.layers}, {config.model.width}, {config.model.heads} "
        f"({config.model.key_value_heads}), {config.model.ffn}",
        "vocabulary, context": f"{config.model.vocab_size:,}, {config.model.max_length:,} tokens",
        "parameters (without embeddings)": f"{count.total:,} ({count.non_embedding:,})",
        "weights": dtype,
        **_training_facts(config, workdir, step),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    begun = f"Training rows began after the token {tokenizer.special.start}; "
    if tokenizer.bos_id is not None:
        begun = f"Texts begin with the token {tokenizer.bos_id}, which the tokenizer of the source puts there."
    elif tokenizer.file_name == "tokenizer.model":
        begun += "the tokenizer puts it before every text."
    else:
        begun += "put it before a prompt."
    kind = (
        "An autoregressive model"
        if causal
        else "A large language diffusion model ([LLaDA](https://arxiv.org/abs/2502.09992))"
    )
    use = (_ARM_USE if causal else _LLADA_USE).format(
        prompt=json.dumps(_prompt(config, workdir, tokenizer), ensure_ascii=False),
        length=min(64, config.model.max_length // 2),
        mask_id=tokenizer.mask_id,
        begun=begun,
    )
    lines = "\n".join(front)
    return f"""---
{lines}
---

# {workdir.resolve().name}

{kind}, {ORIGIN}. The fields `license`, `language` and `datasets` above are
for you to fill in before you publish it.

| | |
|---|---|
{rows}

## Use

{use}"""


def _training_facts(config: Config, workdir: Path, step: int) -> dict[str, str]:
    """How this checkpoint came to be, and the held-out figures that were measured at this very step."""
    if step == 0:
        return {"training": "imported; no step taken here"}
    tokens = step * config.tokens_per_step
    corpus = "the source files of Python's standard library" if config.data.source == "stdlib" else config.data.source
    facts = {
        "objective": config.objective.name,
        "corpus": f"`{corpus}`, rows of {config.data.sequence_length} tokens",
        "steps, tokens": f"{step:,}, {tokens:,}",
        "optimizer": f"AdamW, peak learning rate {config.optimizer.peak_learning_rate:g}, "
        f"weight decay {config.optimizer.weight_decay:g}, batch {config.train.batch_size} rows, "
        f"schedule `{config.optimizer.schedule}`",
    }
    summary = _read(workdir / "summary.json")
    if summary.get("step") == step and _are_numbers(summary, "flops_6nd", "flops_exact"):
        facts["training FLOPs (6ND, exact)"] = f"{summary['flops_6nd']:.3e}, {summary['flops_exact']:.3e}"
    return facts | _figures(config, workdir, step, summary)


def _figures(config: Config, workdir: Path, step: int, summary: dict[str, Any]) -> dict[str, str]:
    """Held-out figures of this step: training's own, and that of `llada evaluate` beside it, each saying of what."""
    exact = config.model.causal
    measured = {"estimator": "exact" if exact else "l_of_L", "draws": 1 if exact else config.evaluate.draws}
    lines = [line for line in metrics.read(workdir / "metrics.jsonl") if line["step"] == step]
    training: dict[str, Any] = {}
    for line in lines:
        training |= {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
    if summary.get("step") == step:
        training |= {name.removeprefix("eval_"): value for name, value in summary.items() if name.startswith("eval_")}
    found = {"in training": measured | training}
    evaluation = _read(workdir / "evaluation.json")
    if evaluation.get("step") == step:
        found["llada evaluate"] = {"rows_digest": evaluation.get("eval_rows_digest")} | evaluation
    facts = {}
    for where, values in found.items():
        if not _are_numbers(values, "nats_per_token"):
            continue
        figure = f"{values['nats_per_token']:.4f}"
        figure += f" ± {values['stderr']:.4f}" if _are_numbers(values, "stderr") else ""
        kind = "exact NLL" if exact else "upper bound on the NLL"
        of = [f"{values['rows']:,} held-out rows"] if _are_numbers(values, "rows") else ["held-out rows"]
        of += [] if exact else [f"{values['draws']} draws each", f"estimator {values['estimator']}"]
        figure += f" ({kind}; {', '.join(of)})"
        figure += f", {values['bits_per_byte']:.4f} bits per byte" if _are_numbers(values, "bits_per_byte") else ""
        facts[f"held-out nats per token, {where}"] = figure
    digests = {values.get("rows_digest") for values in found.values()}
    if len(facts) == 2 and (len(digests) > 1 or None in digests):
        facts["of the two"] = "they were not measured on the same rows, or may not have been: not to be compared"
    return facts


def _prompt(config: Config, workdir: Path, tokenizer: Tokenizer) -> str:
    """A few words to go on from: of the corpus, where it is still there."""
    if config.data.source == "stdlib" and (workdir / "metrics.jsonl").exists():
        return "def main():"
    directory = user_path(config.data.directory or workdir / "data", "--config.data.directory")
    try:
        row = np.load(directory / "train.npy", mmap_mode="r")[0, :64].tolist()
    except (OSError, ValueError, IndexError):
        return "The"
    row = row[row.index(tokenizer.eos_id) + 1 :] if tokenizer.eos_id in row[:-16] else row
    text = tokenizer.decode(token for token in row if token < tokenizer.vocab_size)
    return " ".join(text.split()[:5])[:60] or "The"


def _are_numbers(values: dict[str, Any], *names: str) -> bool:
    return all(type(values.get(name)) in (int, float) for name in names)


def _read(path: Path) -> dict[str, Any]:
    return json_files.read(path) if path.exists() else {}
