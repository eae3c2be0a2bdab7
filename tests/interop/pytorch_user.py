"""What a PyTorch user does with the exports, in a process that has never heard of JAX: run by test_pytorch.py."""

import json
import sys
from pathlib import Path

sys.modules |= dict.fromkeys(("jax", "flax", "llada", "sentencepiece"))  # as if they were not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

TEXT = "the cat é sees the\n    dog"


def main(place: Path, out: Path, names: list[str]) -> None:
    """Open every export, run it on the prompts, generate from the text; print what was seen as JSON."""
    torch.set_num_threads(1)
    prompts = np.load(place / "prompts.npz")
    tokens_BL = torch.from_numpy(prompts["prompts"])
    allowed_BL = torch.arange(tokens_BL.shape[1]) < torch.from_numpy(prompts["lengths"])[:, None]
    arrays, facts = (
        {},
        {"version": transformers.__version__, "classes": {}, "texts": {}, "decoded": {}, "tokenizers": {}},
    )
    for number, name in enumerate(names):
        directory = str(place / str(number))
        code = {} if "ARM" in name else {"trust_remote_code": True}
        tokenizer = AutoTokenizer.from_pretrained(directory, **code)
        model = AutoModelForCausalLM.from_pretrained(directory, **code)
        facts["classes"][name] = type(model).__name__
        assert model.dtype == torch.float32 and not model.training
        assert AutoConfig.from_pretrained(directory, **code).vocab_size == 320
        with torch.no_grad():
            logits_BLV = model(input_ids=tokens_BL, attention_mask=allowed_BL.long()).logits
            if "ARM" not in name:
                base = AutoModel.from_pretrained(directory, **code)
                assert torch.equal(base(input_ids=tokens_BL, attention_mask=allowed_BL).logits, logits_BLV)
        arrays[f"logits {name}"] = logits_BLV.numpy()
        given = tokenizer(TEXT, return_tensors="pt")
        length = {"max_new_tokens": 12, "do_sample": False} if "ARM" in name else {"gen_length": 12}
        ids = model.generate(**given, **length)[0]
        facts["texts"][name] = ids.tolist()
        if name in ("MHA", "tied"):
            spoken = pipeline("text-generation", model=directory, trust_remote_code=True)
            wanted = tokenizer.decode(ids[given["input_ids"].shape[1] :], skip_special_tokens=True)
            # transformers 4's pipeline would delete spaces before quotes and full stops.
            as_written = {"return_full_text": False, "clean_up_tokenization_spaces": False}
            said = spoken(TEXT, max_new_tokens=12, **as_written)[0]["generated_text"]
            assert said == wanted, (said, wanted)
            assert len(spoken(TEXT)[0]["generated_text"]) > len(TEXT)
            assert model.generate(**given, steps=1).shape == model.generate(**given, steps=1, max_length=64).shape
        facts["decoded"][name] = tokenizer.decode(ids, skip_special_tokens=True)
        facts["tokenizers"][name] = {
            "ids": tokenizer(TEXT, add_special_tokens=False)["input_ids"],
            "mask": tokenizer.mask_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
        }
    np.savez(out, **arrays)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
