"""Meshes of 1, 2, 4 and 8 devices against each other: the same noise bit for bit, the same numbers to rounding.

The checks run in a process of their own that pretends to have eight CPU devices; the tests read its verdicts.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

MESHES = {  # name -> (data, fsdp, tensor, microbatches): each axis alone, a pair, and all three
    "1 device": (1, 1, 1, 1),
    "8 data": (8, 1, 1, 1),
    "4 fsdp": (1, 4, 1, 2),
    "2 tensor": (1, 1, 2, 4),
    "2 data x 2 fsdp": (2, 2, 1, 1),
    "2 x 2 x 2": (2, 2, 2, 2),
}
LLADA = ("1 device", "8 data", "4 fsdp", "2 tensor", "2 x 2 x 2")
ARM = ("1 device", "2 tensor", "2 data x 2 fsdp")
TUNED = {"LLaDA": ("1 device", "2 x 2 x 2"), "ARM": ("1 device", "2 x 2 x 2")}
BEGUN = ("1 device", "8 data", "2 x 2 x 2")  # whose first state is made there, instead of brought there
USED = ("1 device", "2 x 2 x 2")  # where texts are written and scored


@pytest.fixture(scope="module")
def verdicts():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BEGUN)
def test_noise_and_first_parameters_have_the_same_bits_on_every_mesh(verdicts, name):
    reference, here = verdicts["1 device"], verdicts[name]
    assert here["noise"] == reference["noise"]
    # Initial weights are Gaussian: JAX 0.12 rounds erfinv differently in the tail of a vector, by one unit at most.
    assert here["init_apart"] < 1e-6


@pytest.mark.parametrize("name", LLADA)
def test_three_steps_give_the_same_loss_and_parameters_on_every_mesh(verdicts, name):
    reference, here = verdicts["1 device"], verdicts[name]
    assert here["head_fractions"] == reference["head_fractions"]  # which tokens were masked, step by step
    assert here["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert here["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-4)
    assert here["parameters_apart"] < 2e-4  # Adam divides by small second moments: rounding is amplified


@pytest.mark.parametrize("name", ARM)
def test_the_arm_is_sharded_as_well(verdicts, name):
    assert verdicts[f"ARM {name}"]["losses"] == pytest.approx(verdicts["ARM 1 device"]["losses"], rel=1e-5)


@pytest.mark.parametrize("family", TUNED)
def test_fine_tuning_with_dropout_gives_the_same_losses_on_every_mesh(verdicts, family):
    """Examples that share rows, each with a time of its own, and the loss by time; microbatches too.

    With half of all numbers dropped, and the ARM's inputs masked, one that is dropped on one mesh only would be seen.
    """
    reference, *others = (verdicts[f"{family} tuned on {name}"] for name in TUNED[family])
    for here in others:
        assert here["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        for name in ("grad_norms", "head_fractions"):
            assert here[name] == pytest.approx(reference[name], rel=1e-4)
        assert here["by_time"] == pytest.approx(reference["by_time"], rel=1e-4)
    assert sum(reference["by_time"]) > 0 or family == "ARM"


def test_texts_likelihoods_and_held_out_figures_are_the_same_on_every_mesh(verdicts):
    """Five requests over four parts of a mesh: rows are padded to it, and none depends on it."""
    reference, here = (verdicts[f"inference {name}"] for name in USED)
    for name in ("nats_per_token", "monte_carlo_stderr"):
        assert here["evaluation"][name] == pytest.approx(reference["evaluation"][name], rel=1e-6)
    assert here["evaluation"]["eval_rows_digest"] == reference["evaluation"]["eval_rows_digest"]
    assert here["texts"] == reference["texts"]
    assert here["log_likelihoods"] == pytest.approx(reference["log_likelihoods"], rel=1e-5)


def test_parameters_lie_where_the_table_says(verdicts):
    """On 2 x 2 x 2 every matrix is split over fsdp and tensor: a device holds a quarter."""
    shares = {"embedding": 0.25, "head": 0.25, "query": 0.25, "down": 0.25, "final_norm": 1.0}
    assert verdicts["shares"] == shares
    assert verdicts["opened in bfloat16"] == shares | {"dtypes": ["bfloat16"]}


def test_a_checkpoint_moves_between_meshes_unchanged(verdicts):
    assert verdicts["moved"] and verdicts["digests"]


def test_parameters_written_piece_by_piece_open_on_any_mesh(verdicts):
    """What `llada import` leaves, a layer at a time and without a device, on 2 x 2 x 2."""
    assert verdicts["pieces"]


def main():
    """Print one JSON line with what every mesh gave."""
    import functools
    import hashlib

    import jax
    import jax.numpy as jnp
    import numpy as np

    from llada import config as config_lib
    from llada import mesh as mesh_lib
    from llada.objectives import noise as noise_lib
    from llada.objectives.contract import Examples, SpecialTokens
    from llada.training import resuming
    from llada.training import step as step_lib
    from llada.training.checkpoint import Checkpoints
    from llada.training.digests import of_items

    jax.config.update("jax_default_matmul_precision", "highest")
    B, L, V = 8, 16, 64
    rng = np.random.default_rng(0)
    rows = rng.integers(4, V, (3, B, L)).astype(np.int32)
    documents = np.where(rng.random(rows.shape) < 0.1, 1, rows)  # with ends of text among them
    role = np.tile([0, 0, 1, 1, 2, 0, 1, 1, 0, 0, 0, 1, 2, 2, 0, 0], (B, 1)).astype(np.int32)
    example = np.tile([1] * 5 + [2] * 3 + [3] * 6 + [0] * 2, (B, 1)).astype(np.int32)
    examples = [Examples(x_BL, example, role) for x_BL in rows]

    def build(causal, dropout, data, fsdp, tensor, microbatches):
        c = config_lib.default_config()
        c.model.update(dict(layers=2, width=16, heads=4, kv_heads=2, ffn=32, vocab_size=V, max_length=L))
        c.model.update(dict(dtype="float32", causal=causal, init_std=0.2, dropout=dropout))
        c.objective.update(dict(name="autoregressive" if causal else "diffusion", random_length_fraction=0.5))
        c.model.scan_unroll = 1  # as on TPU; a body that is compiled once takes half the time
        c.objective.head_rows = 24  # not a divisor of anything
        c.objective.block_cross_document_attention = causal
        c.objective.input_masking = dropout / 2 if causal else 0.0
        c.data.sequence_length = L
        c.train.update(dict(batch_size=B, microbatches=microbatches, steps=10))
        c.mesh.update(dict(data=data, fsdp=fsdp, tensor=tensor))
        return config_lib.from_config_dict(c)

    def bits(tree):
        return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()

    def noise():
        n = noise_lib.Noise(5, jnp.int32(7), jnp.arange(B), B)
        draws = [noise_lib.times(n, kind) for kind in ("iid", "stratified")]
        masks = noise_lib.uniform(n, noise_lib.MASK, (L,))
        return [mesh_lib.constrain(x, "B") for x in (*draws, noise_lib.lengths(n, L, 0.5))], mesh_lib.constrain(
            masks, "BL"
        )

    begun = {}

    def run(causal, name, batches=None, dropout=0.0):
        sizes = MESHES[name]
        config = build(causal, dropout, *sizes)
        batches = (documents if causal else rows) if batches is None else batches
        mesh = mesh_lib.make(config.mesh, jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
        mesh_lib.check(config, mesh)
        with jax.set_mesh(mesh):
            places, out = step_lib.state_shardings(config, mesh), {}
            if name in BEGUN and batches is rows and not dropout:
                state = jax.jit(functools.partial(step_lib.init_state, config), out_shardings=places)()
                begun[name] = jax.tree.map(np.asarray, state)
                out["noise"] = bits(jax.jit(noise)())
                out["init_apart"] = apart(begun[name].params, begun["1 device"].params)
            else:
                state = jax.device_put(begun["1 device"], places)
            train_step = step_lib.compile_step(config, SpecialTokens(mask=3, eos=1), mesh)
            seen = []
            for batch in batches:
                state, metrics = train_step(state, jax.device_put(batch, mesh_lib.sharding(mesh, "BL")))
                seen.append(jax.tree.map(float, metrics))
        out["losses"] = [m["loss_nats_per_token"] for m in seen]
        out["grad_norms"] = [m["grad_norm"] for m in seen]
        out["head_fractions"] = [m["head_fraction"] for m in seen]
        out["by_time"] = [value for name, value in seen[-1].items() if ":" in name]
        return out, state, config, mesh

    def apart(a, b):
        return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.max(np.abs(x - y))), a, b)))

    results, states = {}, {}
    for name in LLADA:
        results[name], *states[name] = run(False, name)
        mine, reference = (jax.tree.map(np.asarray, states[n][0].params) for n in (name, "1 device"))
        results[name]["parameters_apart"] = apart(mine, reference)
    for name in ARM:
        results[f"ARM {name}"] = run(True, name)[0]

    for family, names in TUNED.items():
        for name in names:
            results[f"{family} tuned on {name}"] = run(family == "ARM", name, examples, dropout=0.5)[0]

    from llada.evaluation.validation import Validator
    from llada.inference import likelihood, sampler
    from llada.inference.settings import SamplerConfig

    special, weights = SpecialTokens(mask=3, eos=1), jax.tree.map(np.asarray, states["1 device"][0].params)
    ids = rows[0, :5]
    canvas_BL = np.where(np.arange(L) < 6, ids, 3)
    canvas_BL = np.concatenate([canvas_BL, canvas_BL[:3]])  # eight rows
    settings = SamplerConfig(steps=10, block_length=5, temperature=1.0, cache="dual", cfg_scale=0.5)
    pairs = [likelihood.Pair(row[: i + 2].tolist(), row[i + 2 :].tolist()) for i, row in enumerate(ids)]
    for name in USED:
        _, config, mesh = states[name]
        with jax.set_mesh(mesh):
            params = jax.device_put(weights, mesh_lib.parameter_shardings(mesh, weights))
            text = sampler.reverse_process(config.model, params, canvas_BL, settings, special, np.zeros(V, bool))
            scores = likelihood.log_likelihoods(
                config.model, params, pairs, special, likelihood.LikelihoodConfig(draws=8)
            )
            order = likelihood.LikelihoodConfig(estimator="confidence_ordered")
            scores += likelihood.log_likelihoods(config.model, params, pairs, special, order)
            evaluated = Validator(config, special, np.ones(V), rows[1, :6], mesh)(params)
        results[f"inference {name}"] = {
            "texts": text.tokens_BL.tolist(),
            "log_likelihoods": [score.log_likelihood for score in scores],
            "evaluation": evaluated._asdict(),
        }

    state, config, mesh = states["2 x 2 x 2"]

    def shares(params):
        flat = params | params["layers"]
        names = ("embedding", "head", "query", "down", "final_norm")
        return {n: flat[n].addressable_shards[0].data.size / flat[n].size for n in names}

    results["shares"] = shares(state.params)

    folder = Path(tempfile.mkdtemp())
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(state, config, {"step": 3}, b"")
    checkpoints.wait()
    _, one_config, one_mesh = states["1 device"]
    moved = resuming.restore_state(checkpoints, one_config, one_mesh, 3)[0]
    half = checkpoints.restore_parameters(config, mesh, 3, "bfloat16")
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(half)})
    results["opened in bfloat16"] = shares(half) | {"dtypes": dtypes}
    digests = [of_items({"params": s.params, "optimizer_state": s.optimizer_state}) for s in (state, moved)]
    results["digests"] = digests[0] == digests[1]
    results["moved"] = bits(moved) == bits(state) and len(moved.params["head"].sharding.device_set) == 1
    checkpoints.close()

    from llada.training.leaves import create, finish

    writing = []
    leaves = create(folder / "pieces", config, b"")
    for name, leaf in leaves.items():
        *group, last = name.split(".")
        values = np.asarray((state.params[group[0]] if group else state.params)[last])
        writing += [leaf.write(values[i], i) for i in range(len(leaf))] if group else [leaf.write(values)]
    for write in writing:
        write.result()
    finish(folder / "pieces", leaves)
    pieces = resuming.restore_state(Checkpoints(folder / "pieces"), config, mesh, 0)[0]
    split = pieces.params["layers"]["query"].addressable_shards[0].data.size * 4 == state.params["layers"]["query"].size
    results["pieces"] = bits(pieces.params) == bits(state.params) and split and int(pieces.step) == 0
    print(json.dumps(results))


if __name__ == "__main__":
    main()
