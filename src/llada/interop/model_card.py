"""The README.md of an exported model: what it is, how it was trained, how to use it."""

import json
from pathlib import Path
from typing import Any

from llada import accounting, changes, json_files
from llada.config import Config
from llada.data import rows
from llada.data.tokenizer import Tokenizer
from llada.errors import UserError
from llada.objectives import families
from llada.paths import user_path
from llada.scaling import held_out
from llada.training import metrics

ORIGIN = "trained with llada in JAX and exported for PyTorch"  # by which an export is recognised

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
license: unknown  # fill in before you publish: that of the weights, such as apache-2.0
language: [{language}]  # fill in: such as [en]
datasets: []  # fill in: names on the hub of what it was trained on
---

# {name}

{kind}, {origin}. The fields `license`, `language` and `datasets` above are
for you to fill in before you publish it.

| | |
|---|---|
{facts}

## Use

{use}"""
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

{first_token}
"""


def text(config: Config, workdir: Path, step: int, dtype: str, architecture: str, tokenizer: Tokenizer) -> str:
    """The card in Markdown; facts come from the run's own files, and one that is not known is left out."""
    m, count = config.model, accounting.parameters(config.model)
    facts = {
        "architecture": f"`{architecture}`, {'causal' if m.causal else 'bidirectional'}",
        "layers, width, heads (key/value), FFN": f"{m.layers}, {m.width}, {m.heads} ({m.key_value_heads}), {m.ffn}",
        "vocabulary, context": f"{m.vocab_size:,}, {m.max_length:,} tokens",
        "parameters (without embeddings)": f"{count.total:,} ({count.non_embedding:,})",
        "weights": dtype,
        **_training_facts(config, workdir, step),
    }
    kind = "An autoregressive model"
    if not m.causal:
        kind = "A large language diffusion model ([LLaDA](https://arxiv.org/abs/2502.09992))"
    use = (_ARM_USE if m.causal else _LLADA_USE).format(
        prompt=json.dumps(_prompt(config, workdir, tokenizer), ensure_ascii=False),
        length=min(64, m.max_length // 2),
        mask_id=tokenizer.mask_id,
        first_token=_first_token(tokenizer),
    )
    return _CARD.format(
        tags=", ".join(["llada", "jax", *([] if m.causal else ["diffusion", "masked-diffusion"])]),
        language="code" if config.data.source == "stdlib" and step > 0 else "",
        name=workdir.resolve().name,
        kind=kind,
        origin=ORIGIN,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        use=use,
    )


def _first_token(tokenizer: Tokenizer) -> str:
    if tokenizer.bos_id is not None:
        return f"Texts begin with the token {tokenizer.bos_id}, which the tokenizer of the source puts there."
    how = (
        "the tokenizer puts it before every text."
        if tokenizer.file_name == "tokenizer.model"
        else ("put it before a prompt.")
    )
    return f"Training rows began after the token {tokenizer.special.start}; {how}"


def _training_facts(config: Config, workdir: Path, step: int) -> dict[str, str]:
    """How this checkpoint was trained, and the held-out figures that were measured at this very step."""
    if step == 0:
        return {"training": "imported; no step taken here"}
    tokens = step * config.tokens_per_step
    corpus = "the source files of Python's standard library" if config.data.source == "stdlib" else config.data.source
    o = changes.at(config, step - 1).optimizer
    facts = {
        "objective": " with ".join(filter(None, (config.objective.name, families.variant(config)))),
        "corpus": f"`{corpus}`, rows of {config.data.sequence_length} tokens",
        "steps, tokens": f"{step:,}, {tokens:,}",
        "optimizer": f"AdamW, peak learning rate {o.peak_learning_rate:g}, "
        f"weight decay {o.weight_decay:g}, batch {config.train.batch_size} rows, "
        f"schedule `{o.schedule}`",
    }
    if changed := "; ".join(changes.described(config, until=step)):
        facts["changed while training"] = changed
    path = workdir / "summary.json"
    summary = json_files.read(path) if path.exists() else {}
    if summary.get("step") != step:
        summary = {}
    if all(held_out.is_number(summary.get(name)) for name in ("flops_6nd", "flops_exact")):
        facts["training FLOPs (6ND, exact)"] = f"{summary['flops_6nd']:.3e}, {summary['flops_exact']:.3e}"
    # Evaluations on the way are in metrics.jsonl, the last one in summary.json as well.
    values: dict[str, Any] = {}
    for line in metrics.read(workdir / "metrics.jsonl"):
        if line["step"] == step:
            values |= {name.replace("eval/", "eval_"): value for name, value in line.items()}
    return facts | _held_out_facts(config, workdir, step, held_out.of_training(config, values | summary))


def _held_out_facts(config: Config, workdir: Path, step: int, training: held_out.Figures) -> dict[str, str]:
    """Training's own figures and those of `llada evaluate`, each with what it is of, and whether the two compare."""
    evaluation, _ = held_out.of_evaluation(workdir, step)
    figures = {"in training": training, "llada evaluate": evaluation}
    known = {where: each for where, each in figures.items() if each and held_out.is_number(each.nats_per_token)}
    facts = {f"held-out nats per token, {where}": _figure(config, each) for where, each in known.items()}
    if len(known) == 2 and not held_out.of_same_rows(list(known.values())):
        facts["of the two"] = "they were not measured on the same rows, or may not have been: not to be compared"
    return facts


def _figure(config: Config, figures: held_out.Figures) -> str:
    exact = families.of(config).exact
    words = f"{figures.nats_per_token:.4f}" + ("" if figures.stderr is None else f" ± {figures.stderr:.4f}")
    of = ["held-out rows" if figures.rows is None else f"{figures.rows:,} held-out rows"]
    of += [] if exact else [f"{figures.draws} draws each", f"estimator {figures.estimator}"]
    words += f" ({'exact NLL' if exact else 'upper bound on the NLL'}; {', '.join(of)})"
    return words + ("" if figures.bits_per_byte is None else f", {figures.bits_per_byte:.4f} bits per byte")


def _prompt(config: Config, workdir: Path, tokenizer: Tokenizer) -> str:
    """A few words to go on from: of the corpus, where it is still there."""
    if config.data.source == "stdlib" and (workdir / "metrics.jsonl").exists():
        return "def main():"
    directory = user_path(config.data.directory or workdir / "data", "--config.data.directory")
    try:
        row = rows.open_rows(directory / "train.npy")[0, :64].tolist()
    except (OSError, UserError, IndexError):
        return "The"
    row = row[row.index(tokenizer.eos_id) + 1 :] if tokenizer.eos_id in row[:-16] else row
    words = tokenizer.decode(token for token in row if token < tokenizer.vocab_size).split()
    return " ".join(words[:5])[:60] or "The"
