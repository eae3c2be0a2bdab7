"""What the faster samplers gain and lose: python benchmarks/approximations.py --workdir=runs/quickstart/llada

Held-out rows of the run are continued greedily by the exact sampler and by each faster one, one row at a time, as a
person waiting for text would. The samplers alternate; printed are medians over the rows of forward passes, of tokens
per second and of the speed over the exact sampler's, and the agreement: the share of tokens equal to the exact ones.
"""

import argparse
import statistics
from pathlib import Path

import jax
import numpy as np
import record

import llada
from llada.inference import sampler
from llada.inference.canvas import forbidden_ids
from llada.inference.settings import SamplerConfig
from llada.training import corpus as corpus_lib


def settings_of(length: int, block: int) -> dict[str, SamplerConfig]:
    """The exact sampler first; speculation, which is exact as well; then approximations."""
    table = {"exact": {}, "half the steps": dict(steps=length // 2)}
    table |= {f"speculation over {d} canvases": dict(speculate=d) for d in (2, 4)}
    table |= {f"threshold {t}": dict(confidence_threshold=t) for t in (0.9, 0.7, 0.5)}
    table |= {"prefix cache": dict(cache="prefix"), "dual cache": dict(cache="dual")}
    table |= {f"dual cache, threshold {t}": dict(cache="dual", confidence_threshold=t) for t in (0.9, 0.7)}
    exact = dict(steps=length, block_length=block)
    return {name: SamplerConfig(**(exact | changes)) for name, changes in table.items()}


def samples_of(workdir: Path, rows: int, block: int) -> tuple[int, dict[str, list]]:
    """`(tokens written of each row, samples by sampler)`."""
    run = llada.load(workdir)
    special, forbidden_V = run.tokenizer.special, forbidden_ids(run.tokenizer, run.config.model.vocab_size)
    holdout_NL = corpus_lib.corpus_for(workdir, run.config, run.tokenizer).holdout_NL
    length = holdout_NL.shape[1] * 3 // 4 // block * block
    settings = settings_of(length, block)
    samples = {name: [] for name in settings}
    picked = np.linspace(0, len(holdout_NL) - 1, rows).astype(int)
    for i, index in enumerate([picked[0], *picked]):  # the first compiles
        canvas_BL = np.array(holdout_NL[index : index + 1], np.int32)
        canvas_BL[:, -length:] = special.mask
        for name, config in settings.items():
            sample = sampler.reverse_process(run.config.model, run.params, canvas_BL, config, special, forbidden_V)
            if i:
                samples[name].append(sample)
    return length, samples


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--block", type=int, default=16)
    record.add_flags(parser)
    options = parser.parse_args()
    length, samples = samples_of(options.workdir, options.rows, options.block)
    rows = []
    for name, those in samples.items():
        pairs = list(zip(samples["exact"], those, strict=True))
        equal = [ours.tokens_BL[:, -length:] == exact.tokens_BL[:, -length:] for exact, ours in pairs]
        row = {
            "sampler": name,
            "forward passes": f"{statistics.median(s.forward_passes for s in those):g}",
            "tokens per second": f"{statistics.median(length / s.seconds for s in those):.0f}",
            "speed over exact": f"{statistics.median(e.seconds / s.seconds for e, s in pairs):.2f}",
            "agreement": f"{np.mean(equal):.1%}",
        }
        rows.append(row)
    print(f"{options.rows} rows, {length} tokens written in blocks of {options.block}, {jax.default_backend()}\n")
    print(record.table(rows))
    record.record(options, "approximations", rows)


if __name__ == "__main__":
    main()
