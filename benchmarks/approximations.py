"""What the faster samplers gain and lose: python benchmarks/approximations.py --workdir=runs/quickstart/llada

Held-out rows of the run are continued greedily by the exact sampler and by each faster one, one row at a time,
as a person waiting for text would. Printed are forward passes and tokens per second (medians over rows; the settings
alternate), and agreement: the share of the written tokens that are the exact sampler's.
"""

import argparse
import statistics
from pathlib import Path

import jax
import numpy as np

import llada
from llada.inference import sampler
from llada.inference.canvas import forbidden_ids
from llada.inference.settings import SamplerConfig
from llada.training import workdir as workdir_lib


def settings_of(length: int, block: int) -> dict[str, SamplerConfig]:
    """The exact sampler first; speculation, which is exact as well; then approximations."""
    base = dict(steps=length, block_length=block)
    table = {"exact": {}, "half the steps": dict(steps=length // 2)}
    table |= {f"speculation over {d} canvases": dict(speculate=d) for d in (2, 4)}
    table |= {f"threshold {t}": dict(confidence_threshold=t) for t in (0.9, 0.7, 0.5)}
    table |= {"prefix cache": dict(cache="prefix"), "dual cache": dict(cache="dual")}
    table |= {f"dual cache, threshold {t}": dict(cache="dual", confidence_threshold=t) for t in (0.9, 0.7)}
    return {name: SamplerConfig(**{**base, **changes}) for name, changes in table.items()}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--block", type=int, default=16)
    options = parser.parse_args()
    run = llada.load(options.workdir)
    special = run.tokenizer.special
    forbidden_V = forbidden_ids(run.tokenizer, run.config.model.vocab_size)
    holdout_NL = workdir_lib.corpus_for(Path(options.workdir), run.config, run.tokenizer).holdout_NL
    picked = np.linspace(0, len(holdout_NL) - 1, options.rows).astype(int)
    length = holdout_NL.shape[1] * 3 // 4 // options.block * options.block
    settings = settings_of(length, options.block)
    found = {name: [] for name in settings}
    for turn, index in enumerate([picked[0], *picked]):  # the first turn compiles
        canvas_BL = np.array(holdout_NL[index : index + 1], np.int32)
        canvas_BL[:, -length:] = special.mask
        for name, how in settings.items():
            sample = sampler.reverse_process(run.config.model, run.params, canvas_BL, how, special, forbidden_V)
            if turn:
                found[name].append(sample)
    print(f"{options.rows} rows, {length} tokens written in blocks of {options.block}, {jax.default_backend()}\n")
    print("| sampler | forward passes | tokens per second | times exact | agreement |\n|---|---|---|---|---|")
    for name, samples in found.items():
        speed = statistics.median(length / sample.seconds for sample in samples)
        times = statistics.median(e.seconds / s.seconds for e, s in zip(found["exact"], samples, strict=True))
        passes = statistics.median(sample.forward_passes for sample in samples)
        same = np.mean(
            [s.tokens_BL[:, -length:] == e.tokens_BL[:, -length:] for e, s in zip(found["exact"], samples, strict=True)]
        )
        print(f"| {name} | {passes:g} | {speed:.0f} | {times:.2f} | {same:.1%} |")


if __name__ == "__main__":
    main()
