"""What someone who tunes an export in PyTorch does, without JAX and without a network: run by test_tuning.py.

transformers' Trainer with its own collators, then PEFT's LoRA: asserts what must hold, prints figures as JSON.
"""

import json
import sys
from pathlib import Path

# As if they were not installed. `datasets` is there for lm-evaluation-harness, and too new for transformers 4, which
# would import it.
sys.modules |= dict.fromkeys(("jax", "flax", "llada", "sentencepiece", "datasets"))

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

TEXTS = [("the cat sees", " the dog .\n"), ("the bird", " likes the tree .\n")]
TEXTS += [("chapter", " 3\nthe fish hears the stone .\n"), ("the river follows the", " cloud .\n")]


def opened(directory, **options):
    """The export as a stranger opens it."""
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def examples(tokenizer, **more):
    """Prompts and answers as records for DataCollatorForSeq2Seq: the prompt has no labels."""
    records = []
    for prompt, answer in TEXTS:
        given, written = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        written = [*written, tokenizer.eos_token_id]
        records.append(dict(input_ids=given + written, labels=[-100] * len(given) + written, **more))
    return records


def trainer(model, out, records, collator, **settings):
    """A Trainer that takes the same batch again and again, and says nothing."""
    settings = dict(per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, seed=1) | settings
    settings["lr_scheduler_type"] = "constant"
    arguments = TrainingArguments(
        str(out), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, **settings
    )
    return Trainer(model=model, args=arguments, train_dataset=records, eval_dataset=records, data_collator=collator)


def loss_of(model, batch):
    """The loss in evaluation mode."""
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


def fixed_loss(model, batch):
    """The loss at fixed masks, so that it compares: half of the labelled tokens."""
    masked_BL = (batch["labels"] != -100) & (torch.arange(batch["labels"].shape[1]) % 2 == 1)
    return loss_of(model, dict(**batch, masked_positions=masked_BL, p_mask=torch.full((len(masked_BL),), 0.5)))


def repeated(tokenizer):
    """(records, batch): masked with p = 1/2, as three steps at drawn p, and weights up to 1000, may lead anywhere."""
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)(examples(tokenizer))
    return examples(tokenizer, p_mask=0.5), batch


def full(place, directory, tokenizer):
    """Three steps of all weights, with gradient checkpointing, evaluation and saving."""
    model, records, batch = opened(directory), *repeated(tokenizer)
    assert (batch["attention_mask"] == 0).any()
    before = fixed_loss(model, batch)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    run = trainer(model, place / "full", records, collator, gradient_checkpointing=True)
    assert run.label_names == ["labels"] and not run.model_accepts_loss_kwargs
    run.train()
    logged = [line["loss"] for line in run.state.log_history if "loss" in line]
    after = fixed_loss(model, batch)
    assert len(logged) == 3 and after < before, (logged, before, after)
    set_seed(0)
    evaluated = run.evaluate()["eval_loss"]
    set_seed(0)
    assert evaluated == run.evaluate()["eval_loss"] and evaluated > 0
    predicted = run.predict(records)
    assert predicted.predictions.shape == (*batch["labels"].shape, model.config.vocab_size)
    run.save_model(str(place / "full"))
    assert fixed_loss(opened(place / "full"), batch) == after
    return dict(before=before, after=after, logged=logged)


def pretraining(place, directory, tokenizer):
    """All tokens are labelled by the collator of language modelling, and masks are drawn with p of all sizes."""
    records = [tokenizer(prompt + answer) for prompt, answer in TEXTS]
    model, collator = opened(directory), DataCollatorForLanguageModeling(tokenizer, mlm=False)
    run = trainer(model, place / "all", records, collator)
    run.train()
    assert all(0 < line["loss"] < 1000 for line in run.state.log_history if "loss" in line)
    assert (model.get_input_embeddings().weight != opened(directory).get_input_embeddings().weight).any()


def masked_rows(tokenizer):
    """Padded examples, which say what is masked and how much it weighs: a loss without any chance in it."""
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)(examples(tokenizer))
    rows = [{name: value[i] for name, value in batch.items()} for i in range(len(TEXTS))]
    for number, row in enumerate(rows):
        row["masked_positions"] = (row["labels"] != -100) & (torch.arange(len(row["labels"])) % (2 + number) > 0)
        row["p_mask"] = torch.tensor(0.3 + 0.1 * number)
    return rows


def accumulation(place, directory, tokenizer):
    """Two batches of two sequences make the update that one of four makes, by either normalisation."""
    rows = masked_rows(tokenizer)
    assert len({int((row["labels"] != -100).sum()) for row in rows}) > 1
    for normalization in ("sequence", "token"):
        weights = []
        for size in (4, 2, 1):
            model = opened(directory, loss_normalization=normalization)
            settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=1)
            settings |= dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
            run = trainer(model, place / "sum", rows, transformers.default_data_collator, **settings)
            assert run.model_accepts_loss_kwargs is (normalization == "token")
            run.train()
            weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
            start = torch.cat([weight.detach().flatten() for weight in opened(directory).parameters()])
            assert (weights[-1] - start).abs().max() > 1e-3
        for other in weights[1:]:
            torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-6)


def lora(place, directory, tokenizer):
    """Three steps of LoRA by name and on all linear layers; adapters saved, loaded, merged."""
    rows, collator = masked_rows(tokenizer), transformers.default_data_collator
    batch = collator(rows)
    names = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
    blocks = r".*blocks\.\d+\.(" + "|".join(names) + ")"
    for kind, targets in (("all", "all-linear"), ("blocks", blocks)):
        model = get_peft_model(
            opened(directory), LoraConfig(r=4, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
        )
        layers = model.config.n_layers
        touched = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
        assert len(touched) == 7 * layers and not any("transformer.ff_out" in name for name in touched), touched
        before = loss_of(model, batch)
        run = trainer(model, place / kind, rows, collator, gradient_checkpointing=True)
        run.train()
        after = loss_of(model, batch)
        assert after < before, (before, after)
        fresh = opened(directory)
        for name, weight in model.get_base_model().named_parameters():
            if "lora_" not in name:
                assert torch.equal(weight, fresh.get_parameter(name.replace(".base_layer", ""))), name
        model.save_pretrained(place / f"adapter_{kind}")
        again = PeftModel.from_pretrained(fresh, place / f"adapter_{kind}")
        assert loss_of(again, batch) == after
        merged = again.merge_and_unload()
        assert abs(loss_of(merged, batch) - after) < 1e-5
    prompt = tokenizer("the cat", return_tensors="pt", add_special_tokens=False)
    assert torch.equal(merged.generate(**prompt, gen_length=8), model.eval().generate(**prompt, gen_length=8))
    merged.save_pretrained(place / "merged")
    tokenizer.save_pretrained(place / "merged")
    logits_BLV = opened(place / "merged")(batch["input_ids"]).logits
    torch.save(dict(tokens=batch["input_ids"], logits=logits_BLV.detach()), place / "merged.pt")
    return dict(before=before, after=after)


def main(place: Path, directory: str) -> None:
    """Everything a tuner does, one after the other."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    facts = dict(version=transformers.__version__, full=full(place, directory, tokenizer))
    pretraining(place, directory, tokenizer)
    accumulation(place, directory, tokenizer)
    facts["lora"] = lora(place, directory, tokenizer)
    exec(Path(directory).with_name("of_docs.py").read_text(), {})  # its files go into the working directory
    assert (place / "runs/tuned/merged/modeling_llada.py").exists()
    print(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
