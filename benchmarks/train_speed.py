"""A complete optimizer step against the published formulation in PyTorch: python benchmarks/train_speed.py --shape=20m

  --shape   20m          12 layers, d 384, vocabulary 126,464, 4 sequences of 512 tokens
            tiny         6 layers, d 256, vocabulary 126,464, 4 sequences of 512 tokens
            small_vocab  6 layers, d 256, vocabulary 4,096, 16 sequences of 256 tokens
            toy          2 layers, d 64, vocabulary 512, 4 sequences of 64 tokens
  --rival   eager    `torch_training.py`: logits of all positions, then the masked ones'
            compile  the same through torch.compile
            dense    our own step with logits of all positions, the oracle of the vocabulary head
            chunked  the same, 2,048 positions at a time, recomputed in the backward pass
            static   our own step, its vocabulary head over 55 % of all rows however many are masked

Forward, backward, clipping and AdamW in float32, from the same weights, on the same tokens and masks. Both programs run
alternately in one process, after one step each to compile; loss, gradient and updated parameters of that first step are
compared, of later steps the loss. A turn is one untimed step, which absorbs what the other program did to memory and
caches, and three timed ones. Both programs retain freed memory as `llada train` does, and PyTorch's
threads sleep while ours run; GLIBC_TUNABLES=glibc.malloc.hugetlb=1 gives both large pages, as launch/ does.
Prints medians and ranges of seconds and of the ratio per pair, and tokens, useful FLOPs (head on masked rows) and
dense-credit FLOPs (head on all rows) per second. Needs torch.
"""

import argparse
import dataclasses
import functools
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch's threads sleep while ours run

import dense_losses
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import timing
import torch
import torch_reference
import torch_training

from llada import accounting, config
from llada import mesh as mesh_lib
from llada.commands import environment
from llada.objectives import noise as noise_lib
from llada.objectives.contract import SpecialTokens
from llada.objectives.corruption import forward_process
from llada.training import step as step_lib

RUNS = 3  # timed steps of a turn: a step's time follows the number of masked positions
RIVALS = ("eager", "compile", dense_losses.DENSE, dense_losses.CHUNKED, dense_losses.STATIC)

SHAPES = {  # layers, width, heads, ffn, vocabulary, tokens, sequences
    "20m": (12, 384, 6, 1024, 126_464, 512, 4),
    "tiny": (6, 256, 4, 704, 126_464, 512, 4),
    "small_vocab": (6, 256, 4, 704, 4_096, 256, 16),
    "toy": (2, 64, 2, 128, 512, 64, 4),
}


def build(shape: str) -> tuple[config.Config, SpecialTokens, np.ndarray]:
    """`(config, special tokens, random tokens_BL)` in float32."""
    layers, width, heads, ffn, vocab, length, batch = SHAPES[shape]
    sizes = dict(layers=layers, width=width, heads=heads, ffn=ffn, vocab_size=vocab)
    return for_model(config.ModelConfig(**sizes, max_length=length, dtype="float32"), length, batch)


def for_model(model: config.ModelConfig, length: int, batch: int) -> tuple[config.Config, SpecialTokens, np.ndarray]:
    """`(config, special tokens, random tokens_BL)`; constant learning rate, no sequence cut short."""
    if jax.default_backend() == "cpu":
        model = dataclasses.replace(model, scan_unroll=model.layers)
    c = config.Config(
        model=model,
        objective=config.ObjectiveConfig(random_length_fraction=0.0),
        data=config.DataConfig(sequence_length=length),
        optimizer=config.OptimizerConfig(schedule="0:1", peak_learning_rate=1e-4),
        mesh=config.MeshConfig(data=1),
        train=config.TrainConfig(batch_size=batch, steps=1000),
    )
    special = SpecialTokens(mask=model.vocab_size - 128, eos=model.vocab_size - 383)
    return c, special, np.random.default_rng(0).integers(0, special.mask, (batch, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def corrupt(c: config.Config, special: SpecialTokens, x0_BL: jax.Array, step: jax.Array):
    """What the training step of that number sees, from the same functions: `(x_t, masked, p_B)`."""
    B, L = x0_BL.shape
    noise = noise_lib.Noise(c.seed, step, jnp.arange(B), B)
    t_B = noise_lib.times(noise, c.objective.time_sampling)
    uniform_BL = noise_lib.uniform(noise, noise_lib.MASK, (L,))
    maskable_BL = jnp.ones((B, L), bool)
    corrupted = forward_process(x0_BL, t_B, uniform_BL, maskable_BL, special.mask, c.objective.eps)
    return corrupted.xt_BL, corrupted.masked_BL, 1 / corrupted.weight_B


class Ours:
    """The compiled step of `llada train` on one device, with its state."""

    def __init__(self, c: config.Config, special: SpecialTokens, x0_BL: np.ndarray):
        self.config, self.mesh = c, mesh_lib.make(c.mesh, jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.train_step = step_lib.compile_step(c, special, self.mesh)
            shardings = step_lib.state_shardings(c, self.mesh)
            self.state = jax.jit(functools.partial(step_lib.init_state, c), out_shardings=shardings)()
            self.batch_BL = jax.device_put(x0_BL, mesh_lib.sharding(self.mesh, "BL"))

    def step(self) -> tuple[float, float]:
        """One optimizer step: `(loss in nats per token, gradient norm before clipping)`."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = jax.block_until_ready(self.train_step(self.state, self.batch_BL))
        return float(metrics["loss_nats_per_token"]), float(metrics["grad_norm"])

    def first_moments(self):
        """AdamW's first moments: after one step, 1 - beta1 times the clipped gradient."""
        return optax.tree_utils.tree_get(self.state.optimizer_state, "mu")

    def named(self, tree) -> dict[str, torch.Tensor]:
        """A tree like the parameters under the names of the PyTorch model."""
        return dict(torch_reference.from_jax(self.config.model, jax.device_get(tree)).named_parameters())


class Torch:
    """The published formulation, on the masks that our step of the same number draws."""

    def __init__(
        self, c: config.Config, special: SpecialTokens, x0_BL: np.ndarray, params: dict, compiled: bool, **device
    ):
        self.trainer, self.count = torch_training.Trainer(c, params, compiled, **device), 0
        self.corrupt = lambda step: [np.asarray(a) for a in corrupt(c, special, x0_BL, step)]
        self.x0_BL, self.next = x0_BL, self.corrupt(0)

    def step(self) -> tuple[float, float]:
        """As `Ours.step`."""
        xt_BL, masked_BL, p_B = self.next
        return self.trainer.step(xt_BL, self.x0_BL, masked_BL, p_B)

    def prepare(self) -> None:
        """Draw the masks of the next step, outside the clock."""
        self.count += 1
        self.next = self.corrupt(self.count)

    def first_moments(self) -> dict[str, torch.Tensor]:
        """As `Ours.first_moments`, by name."""
        return self.trainer.first_moments()

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by name."""
        return dict(self.trainer.model.named_parameters())


class Dense(Ours):
    """Our own step with another loss of `dense_losses`, with the interface of `Torch`."""

    def __init__(self, c: config.Config, special: SpecialTokens, x0_BL: np.ndarray, objective: str):
        dense_losses.register()
        objective = dataclasses.replace(c.objective, name=objective)
        super().__init__(dataclasses.replace(c, objective=objective), special, x0_BL)

    def prepare(self) -> None:
        """Nothing: it draws its own masks, the same ones."""

    def first_moments(self) -> dict[str, torch.Tensor]:
        """By name."""
        return self.named(super().first_moments())

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by name."""
        return self.named(self.state.params)


def compare_first_step(ours: Ours, rival, before: dict[str, torch.Tensor], mine, theirs) -> dict[str, float]:
    """Loss, gradient and parameters after one step from the same weights; AssertionError where they differ.

    Gradients are compared leaf by leaf, the largest error against the largest entry. AdamW divides each entry by its
    own size, so entries near zero move by rounding alone: the update is compared by its norm over the leaf.
    """
    errors = {
        "loss_error": abs(mine[0] / theirs[0] - 1),
        "gradient_norm_error": abs(mine[1] / theirs[1] - 1),
        "gradient_error": 0.0,
        "update_error": 0.0,
    }
    with torch.no_grad():
        moments, expected_moments = ours.named(ours.first_moments()), rival.first_moments()
        after, expected = ours.named(ours.state.params), rival.named_parameters()
        for name, moment in expected_moments.items():
            error = (moments[name] - moment).abs().max() / moment.abs().max()
            errors["gradient_error"] = max(errors["gradient_error"], error.item())
            update = (expected[name] - before[name]).norm()
            error = (after[name] - expected[name]).norm() / update
            errors["update_error"] = max(errors["update_error"], error.item())
    limits = {"loss_error": 1e-5, "gradient_norm_error": 1e-4, "gradient_error": 1e-3, "update_error": 1e-2}
    wrong = {name: value for name, value in errors.items() if not value <= limits[name]}
    assert not wrong, f"{wrong} above {limits}"
    return errors


def measure(shape: str, rival: str, pairs: int) -> dict:
    """The facts about one shape and rival."""
    torch.set_num_threads(os.cpu_count())
    c, special, x0_BL = build(shape)
    ours = Ours(c, special, x0_BL)
    params = jax.device_get(ours.state.params)
    before = ours.named(params)
    if rival in ("eager", "compile"):
        other = Torch(c, special, x0_BL, params, rival == "compile")
    else:
        other = Dense(c, special, x0_BL, rival)
    del params
    errors = {}

    def same(mine, theirs):
        if not errors:
            errors.update(compare_first_step(ours, other, before, mine, theirs))
            before.clear()
        assert abs(mine[0] / theirs[0] - 1) < 1e-3, f"losses {mine[0]} and {theirs[0]}"
        return errors

    facts = timing.alternate(ours.step, other.step, same, pairs, rival, RUNS, other.prepare)
    tokens, median = x0_BL.size, facts["ours"]["median"]
    useful = accounting.flops_exact_per_token(c) * tokens
    dense = useful + 6 * c.model.vocab_size * c.model.width * (1 - accounting.head_fraction(c)) * tokens
    facts["tokens_per_second"] = {name: tokens / facts[name]["median"] for name in ("ours", rival)}
    facts["useful_gflops_per_second"] = useful / median / 1e9
    facts["dense_credit_gflops_per_second"] = {name: dense / facts[name]["median"] / 1e9 for name in ("ours", rival)}
    return dict(benchmark="train_step", shape=shape, rival=rival, pairs=pairs) | facts


def row(facts: dict) -> dict[str, str]:
    """What docs/benchmarks.md shows of them."""
    rival, cell = facts["rival"], timing.text
    dense, useful = facts["dense_credit_gflops_per_second"]["ours"], facts["useful_gflops_per_second"]
    return {
        "shape": facts["shape"],
        "rival": rival,
        "ours, s": cell(facts["ours"]),
        "rival, s": cell(facts[rival]),
        "rival / ours": cell(facts["ratio"]),
        "ours, tokens/s": cell(facts["tokens_per_second"]["ours"]),
        "ours, useful GFLOP/s": cell(useful),
        "FLOPs with all logits / ours": cell(dense / useful),
        "errors of loss, gradient": f"{cell(facts['loss_error'])}, {cell(facts['gradient_error'])}",
    }


def main() -> None:
    """Print a line of JSON for each rival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="20m")
    parser.add_argument("--rival", nargs="+", choices=RIVALS, default=["eager"])
    parser.add_argument("--pairs", type=int, default=5)
    record.add_flags(parser)
    options = parser.parse_args()
    environment.retain_freed_memory()
    rows = []
    for rival in options.rival:
        facts = measure(options.shape, rival, options.pairs)
        timing.report(**facts)
        rows.append(row(facts))
    record.record(options, "train_speed", rows)


if __name__ == "__main__":
    main()
