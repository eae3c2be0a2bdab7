"""Settings of the published evaluations, task by task, under the names of the tables that they made.

Tasks have the names of lm-evaluation-harness 0.4.13. A field that is None is the task's own, or our default. An ARM is
given the shots and lengths of its twin; the rest concerns mask predictors.

Sources: LLaDA (arXiv 2502.09992 v3) Tables 1, 2 and 6, its eval_llada_lm_eval.sh and EVAL.md, LLaDA
1.5 (arXiv 2505.19223), dllm's examples/llada/eval.sh.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A task and how it was evaluated.

    shots         examples before the question
    draws         Monte Carlo draws of LLaDA Eq. (6) per answer; one is exact for an answer of one token
    cfg_scale     w of LLaDA Eq. (16), in likelihoods and in sampling
    gen_length    tokens that are written, whatever the task's max_gen_toks; one step for each of them
    block_length  blocks of that many, from left to right; None is pure diffusion
    eos           rule for end tokens: `settings.SamplerConfig`
    """

    task: str
    shots: int | None = None
    draws: int | None = None
    cfg_scale: float | None = None
    gen_length: int | None = None
    block_length: int | None = None
    eos: str | None = None


class Preset(NamedTuple):
    """Rows, what they reproduce, and what of it lm-evaluation-harness has not or does otherwise."""

    title: str
    rows: tuple[Row, ...]
    chat: bool = False
    remark: str = ""


def _writing(gen_length: int, **others) -> tuple[Row, ...]:
    """The generation tasks of Table 1; the published script leaves their shots to lm-eval: 3, 5, 4, 0 and 3."""
    shots = {"bbh": 3, "gsm8k": 5, "minerva_math": 4, "humaneval": 0, "mbpp": 3}
    return tuple(Row(task, count, gen_length=gen_length, **others) for task, count in shots.items())


def _choosing(guidance: dict[str, float], draws: int, draws_of_letters: int) -> tuple[Row, ...]:
    """The likelihood tasks of Table 1; answers of the last three are single letters."""
    shots = {"arc_challenge": 0, "hellaswag": 0, "truthfulqa_mc2": 0, "winogrande": 5, "piqa": 0, "gpqa_main_n_shot": 5}
    letters = {"mmlu": 5, "cmmlu": 5, "ceval-valid": 5}
    return (
        *(Row(task, count, draws, guidance.get(task, 0.0)) for task, count in shots.items()),
        *(Row(task, count, 1 if task == "mmlu" else draws_of_letters, 0.0) for task, count in letters.items()),
    )


_TABLE_6 = {"arc_challenge": 0.5, "hellaswag": 0.5, "piqa": 0.5, "gpqa_main_n_shot": 0.5, "truthfulqa_mc2": 2.0}
_INSTRUCT = "the published figures are of OpenCompass and internal code; HellaSwag as generation is not in lm-eval"

PRESETS = {
    "paper-table1": Preset(
        "LLaDA 8B Base, Table 1 of v3: no guidance",
        (*_choosing({}, 128, 1), *_writing(1024)),
        remark="HumanEval-FIM is not in lm-eval",
    ),
    "paper-table6": Preset(
        "LLaDA 8B Base, Table 6 of v3: the column with guidance (v1 has these figures in its Table 1)",
        tuple(row for row in _choosing(_TABLE_6, 128, 1) if row.task in {*_TABLE_6, "winogrande"}),
    ),
    "llada-base-script": Preset(
        "LLaDA 8B Base as eval_llada_lm_eval.sh runs it: Table 6's guidance, canvases of 1024",
        (*_choosing(_TABLE_6, 128, 1), *_writing(1024)),
    ),
    "dllm-base": Preset(
        "LLaDA 8B Base as dllm's examples/llada/eval.sh runs it: 32 draws, canvases of 256 and 1024",
        (
            *_choosing({}, 32, 32),
            *(row._replace(gen_length=256) if row.task in ("bbh", "gsm8k") else row for row in _writing(1024)),
        ),
        remark="its scripts pass guidance, which its likelihood does not read: here there is none",
    ),
    "paper-table2": Preset(
        "LLaDA 8B Instruct, Table 2 of v3: pure diffusion, one token a step",
        (
            Row("mmlu_generative", 0, gen_length=3),
            Row("mmlu_pro", 0, gen_length=256),
            Row("arc_challenge_chat", 0, gen_length=512),
            Row("gpqa_diamond_generative_n_shot", 5, gen_length=64, eos="no_confidence"),
            Row("gsm8k_cot", 5, gen_length=512, eos="no_confidence"),
            Row("minerva_math", 4, gen_length=512, eos="no_confidence"),
            Row("humaneval_instruct", 0, gen_length=512, eos="no_logits"),
            Row("mbpp_instruct", 3, gen_length=256, eos="no_confidence"),
        ),
        chat=True,
        remark=f"{_INSTRUCT}; for HumanEval EVAL.md suppresses <|endoftext|> alone, no_logits the end of the turn too",
    ),
    "paper-table2-semi-ar": Preset(
        "LLaDA 8B Instruct, Table 2 of v1: blocks from left to right",
        (
            Row("gsm8k_cot", 5, gen_length=256, block_length=8),
            Row("minerva_math", 4, gen_length=512, block_length=64),
        ),
        chat=True,
        remark=_INSTRUCT,
    ),
    "llada-1.5": Preset(
        "LLaDA 1.5: blocks from left to right",
        (
            Row("gsm8k_cot", 5, gen_length=256, block_length=16),
            Row("minerva_math", 4, gen_length=1024, block_length=128),
            Row("gpqa_diamond_generative_n_shot", 5, gen_length=256, block_length=16),
            Row("humaneval_instruct", 0, gen_length=512, block_length=32),
            Row("mbpp_instruct", 3, gen_length=512, block_length=32),
            Row("ifeval", 0, gen_length=256, block_length=16),
        ),
        chat=True,
        remark="lengths and blocks are its own, shots those of dllm",
    ),
}
