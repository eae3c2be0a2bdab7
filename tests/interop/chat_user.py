"""What apply_chat_template of the transformers on the path makes of dialogues: run by test_dialogue_exports.py."""

import json
import sys
from pathlib import Path

sys.modules |= dict.fromkeys(("jax", "llada", "sentencepiece", "torch"))  # as if they were not installed

import transformers  # noqa: E402

folders, dialogues = json.loads(Path(sys.argv[1]).read_text())
found = {}
for folder in folders:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [
        tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=False)
        for messages in dialogues
        for prompt in (True, False)
    ]
    found[folder] = {
        "ids": ids,
        "template": tokenizer.chat_template,
        "special": [tokenizer.convert_tokens_to_ids(name) for name in ("<|eot_id|>", "<|pad_3|>")],
        "without control tokens": tokenizer.decode(ids[0], skip_special_tokens=True),
    }
print(json.dumps([transformers.__version__.split(".")[0], found]))
