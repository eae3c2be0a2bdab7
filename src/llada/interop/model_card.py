"""The README.md of an exported model: what it is, how it was trained, how to use it."""

import json
from pathlib import Path

from llada import accounting
from llada.config import Config
from llada.data.tokenizer import Tokenizer

_LLADA_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), gen_length={length}, steps={length})
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
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens={length})
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

Training rows began after the end-of-text token (id {eos_id}); {beginning}.
"""


def text(config: Config, workdir: Path, step: int, dtype: str, architecture: str, tokenizer: Tokenizer) -> str:
    """The card in Markdown; facts come from the run's own files, and a fact that is not there is not told."""
    causal = config.model.causal
    count = accounting.parameters(config.model)
    tags = ["llada", "jax", *([] if causal else ["diffusion", "masked-diffusion"])]
    front = ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"]
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
    kind = (
        "An autoregressive model"
        if causal
        else "A large language diffusion model ([LLaDA](https://arxiv.org/abs/2502.09992))"
    )
    use = (_ARM_USE if causal else _LLADA_USE).format(
        length=min(64, config.model.max_length // 2),
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        beginning="the tokenizer puts it before every text"
        if tokenizer.file_name == "tokenizer.model"
        else "put it before a prompt",
    )
    lines = "\n".join(front)
    return f"""---
{lines}
---

# {workdir.absolute().name}

{kind}, trained with llada in JAX and exported for PyTorch.

| | |
|---|---|
{rows}

## Use

{use}"""


def _training_facts(config: Config, workdir: Path, step: int) -> dict[str, str]:
    """How this checkpoint came to be, and its held-out figure where one was measured at this very step."""
    if step == 0:
        return {"training": "imported; no step taken here"}
    tokens = step * config.tokens_per_step
    facts = {
        "objective": config.objective.name,
        "corpus": f"`{config.data.source}`, rows of {config.data.sequence_length} tokens",
        "steps, tokens": f"{step:,}, {tokens:,}",
        "optimizer": f"AdamW, peak learning rate {config.optimizer.peak_learning_rate:g}, "
        f"weight decay {config.optimizer.weight_decay:g}, batch {config.train.batch_size} rows, "
        f"schedule `{config.optimizer.schedule}`",
    }
    summary = _read(workdir / "summary.json")
    if summary.get("step") == step:
        facts["training FLOPs (6ND, exact)"] = f"{summary['flops_6nd']:.3e}, {summary['flops_exact']:.3e}"
        values = summary["eval_nats_per_token"], summary["eval_stderr"], summary["eval_bits_per_byte"]
        evaluation = _read(workdir / "evaluation.json")
        if evaluation.get("step") == step:
            values = evaluation["nats_per_token"], evaluation["stderr"], evaluation["bits_per_byte"]
        kind = "exact NLL" if config.model.causal else "upper bound on the NLL"
        facts["held-out nats per token"] = f"{values[0]:.4f} ± {values[1]:.4f} ({kind}), {values[2]:.4f} bits per byte"
    return facts


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
