"""What is compiled: the real training step, evaluation, sampler or likelihood of a config, from abstract arguments.

The compiled program is the one that a TPU slice would run: same function, same mesh, same shardings. Nothing of the
model's size is allocated. What `llada evaluate` and `llada lm_eval` run beside: --estimator of likelihood and evaluate.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llada import accounting
from llada import mesh as mesh_lib
from llada.config import Config
from llada.errors import UserError
from llada.evaluation import validation
from llada.inference import ancestral, greedy, likelihood, orders, row_batches, sampler
from llada.inference import settings as settings_lib
from llada.model import transformer
from llada.objectives import families, vocabulary_head
from llada.objectives.contract import Examples, SpecialTokens
from llada.planning import topology
from llada.planning.hlo import Trips
from llada.training import step as step_lib

PROGRAMS = ("train", "evaluate", "sample", "likelihood")
IS_GREEDY = "is_greedy"  # beside the estimators of likelihood: what lm_eval asks of an answer (inference/greedy.py)
ESTIMATORS = (*likelihood.ESTIMATORS, IS_GREEDY)
_DIFFUSION_ONLY = ("steps", "block_length", "cache")  # fields of a Workload


class Workload(NamedTuple):
    """The work of inference to plan: `batch` rows of `prompt_length` + `gen_length` tokens, and how they are filled.

    Without `steps` and `block_length` it is one step per token and one block, as in `llada sample`; `dtype` is that of
    the parameters in memory, by default float32. `gen_length` of a likelihood is its answer's, by default all that the
    context leaves; `estimator`, one of ESTIMATORS, is how it is scored.
    """

    batch: int | None = None
    prompt_length: int | None = None
    gen_length: int | None = None
    steps: int | None = None
    block_length: int | None = None
    cache: str | None = None
    dtype: str | None = None
    estimator: str | None = None


class Program(NamedTuple):
    """A function to compile and what is known of it beforehand.

    arguments     abstract; the first are the parameters, or a state that begins with them, the second a batch
    trips         estimates the trip count of a loop that depends on data
    useful        matrix FLOPs of one run on all chips without recomputation; None where that is not defined
    dense         the same with the vocabulary head credited on every position
    tokens        tokens that one run trains on, scores or writes
    """

    name: str
    jitted: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    trips: Trips
    useful: float | None
    dense: float | None
    tokens: int

    @property
    def parameter_bytes(self) -> float:
        """Of one parameter in memory: 4, or 2 where inference holds them in bfloat16."""
        return float(jax.tree.leaves(self.arguments[0])[0].dtype.itemsize)

    @property
    def in_half(self) -> bool:
        """Whether the parameters are in memory at half the size that they are trained with."""
        return self.parameter_bytes == 2

    @property
    def rows(self) -> int:
        """Rows of the batch, over all devices."""
        return jax.tree.leaves(self.arguments[1])[0].shape[0]

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return jax.tree.leaves(self.arguments[1])[0].shape[1]


class Compiled(NamedTuple):
    """The compiler's output: the program's text and memory figures (bytes per device), or why it does not fit."""

    text: str
    memory: dict[str, int]
    refusal: str | None
    seconds: float


def make(config: Config, mesh: jax.sharding.Mesh, name: str, workload: Workload) -> Program:
    """The program called `name`. UserError for an unknown one, or options that it does not take."""
    if name not in PROGRAMS:
        raise UserError(f"--program={name} is not one of {', '.join(PROGRAMS)}")
    options = [key for key, value in workload._asdict().items() if value]
    scored = ("batch", "dtype", "prompt_length", "gen_length", "estimator", "steps", "block_length")
    written = tuple(key for key in workload._fields if key != "estimator")
    allowed = {"train": (), "evaluate": ("dtype", "estimator"), "likelihood": scored, "sample": written}[name]
    if workload.estimator and workload.estimator not in ESTIMATORS:
        raise UserError(f"--estimator={workload.estimator} is not one of {', '.join(ESTIMATORS)}")
    if wrong := [key for key in options if key not in allowed]:
        raise UserError(f"--{wrong[0]} is not for --program={name}; leave it out")
    if wrong := [key for key in options if name == "sample" and config.model.causal and key in _DIFFUSION_ONLY]:
        raise UserError(f"--{wrong[0]} needs a diffusion model; this one is an ARM, written left to right")
    makers = {"train": _train, "evaluate": _evaluate, "sample": _sample, "likelihood": _likelihood}
    return makers[name](config, mesh, workload)


def lower_and_compile(program: Program, mesh: jax.sharding.Mesh, options: dict | None = None) -> Compiled:
    """Compile for the mesh's devices. A program that is too large for them comes back with a refusal."""
    start = time.perf_counter()
    with jax.set_mesh(mesh), topology.quiet():
        lowered = program.jitted.trace(*program.arguments).lower(lowering_platforms=("tpu",))
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled("", {}, str(error), time.perf_counter() - start)
    memory = compiled.memory_analysis()
    figures = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    return Compiled(compiled.as_text(), figures, None, time.perf_counter() - start)


def _special_tokens(config: Config) -> SpecialTokens:
    """Any ids will do: they change no shape."""
    return SpecialTokens(mask=config.model.vocab_size - 1, eos=0)


def _train(config: Config, mesh: jax.sharding.Mesh, workload: Workload) -> Program:
    mesh_lib.check(config, mesh)
    B, L = config.train.batch_size, config.data.sequence_length
    abstract = jax.eval_shape(functools.partial(step_lib.init_state, config))
    state = jax.tree.map(lambda x, s: x.update(sharding=s), abstract, step_lib.state_shardings(config, mesh))
    batch = _batch(config, mesh, B)
    rows = B // config.train.microbatches * L // mesh.devices.size
    tokens = config.tokens_per_step
    return Program(
        "train",
        step_lib.compile_step(config, _special_tokens(config), mesh),
        (state, batch),
        _training_head_trips(config, rows),
        tokens * accounting.flops_exact_per_token(config),
        tokens * accounting.flops_exact_per_token(config, dense_head=True),
        tokens,
    )


def _batch(config: Config, mesh: jax.sharding.Mesh, B: int) -> Any:
    """B rows of tokens, or of examples where the config fine-tunes."""
    tokens_BL = _array(mesh, "BL", (B, config.data.sequence_length), jnp.int32)
    return Examples(tokens_BL, tokens_BL, tokens_BL) if config.fine_tunes else tokens_BL


def _evaluate(config: Config, mesh: jax.sharding.Mesh, workload: Workload) -> Program:
    """One batch of held-out rows with all of its draws; or by another estimator, rows of which each is an answer."""
    L, own = config.data.sequence_length, families.of(config).estimators
    B = validation.rows_at_once(config, mesh, config.evaluate.batches * config.train.batch_size)
    if workload.estimator and workload.estimator not in own and not config.model.causal:
        return _scoring(config, mesh, workload, "evaluate", (B, L), L)
    estimator = validation.estimator_for(config, workload.estimator)
    rows = _batch(config, mesh, B)
    index_B = _array(mesh, "replicated", (B,), jnp.int32)
    passes = B * L * (1 if estimator == "exact" else config.evaluate.draws)
    per_device = B * L // mesh.devices.size
    return Program(
        "evaluate",
        validation.jitted(config, _special_tokens(config), mesh, estimator),
        (_inference_parameters(config, mesh, workload), rows, index_B),
        _training_head_trips(config, per_device),
        passes * accounting.flops_exact_per_token(config) / 3,
        passes * accounting.flops_exact_per_token(config, dense_head=True) / 3,
        B * L,
    )


def _training_head_trips(config: Config, rows: int) -> Trips:
    block_rows = config.objective.head_rows or vocabulary_head.ROWS["tpu"]
    return _head_trips(rows, block_rows, accounting.head_fraction(config))


def _head_trips(rows: int, block_rows: int, fraction: float) -> Trips:
    """Of the vocabulary head's two loops: as many blocks as the rows with work on one device fill, on average."""
    sizes = vocabulary_head.block_sizes(rows, block_rows, "tpu")
    largest, smallest = sizes[0], sizes[-1]
    blocks = largest // smallest
    if fraction == 1:
        large, small = map(float, divmod(-(-rows // smallest), blocks))
    else:
        # A share of the rows needs work. How many small blocks are left over is uniform on 0 ... blocks - 1, and the
        # last one is half empty on average.
        small = (blocks - 1) / 2
        large = max(0.0, (rows * fraction / smallest + 0.5 - small) / blocks)
    expected = {
        vocabulary_head.WHOLE_BLOCKS: (large, largest),
        vocabulary_head.SMALLER_BLOCKS: (small, smallest),
    }

    def trips(path: str) -> tuple[float, str] | None:
        for name, (count, size) in expected.items():
            if name in path:
                return count, f"vocabulary head: {fraction:.1%} of {rows} rows, in blocks of {size}"
        return None

    return trips


def _likelihood(config: Config, mesh: jax.sharding.Mesh, workload: Workload) -> Program:
    prompt = workload.prompt_length or 0
    A = workload.gen_length or config.model.max_length - prompt
    _check_context(config, prompt, A)
    shape = mesh_lib.local_batch(workload.batch or 1, mesh), prompt + A
    return _scoring(config, mesh, workload, "likelihood", shape, A)


def _scoring(
    config: Config, mesh: jax.sharding.Mesh, workload: Workload, name: str, shape: tuple[int, int], A: int
) -> Program:
    """Rows (B, L) with answers of A tokens: scored in a pass, in the loop of a sampler, or compared with the greedy."""
    (B, L), special, params = shape, _special_tokens(config), _inference_parameters(config, mesh, workload)
    per_device, model = B // mesh_lib.batch_shards(mesh), config.model
    tokens_BL, flags_BL = (_array(mesh, "replicated", shape, dtype) for dtype in (jnp.int32, bool))
    lengths_B, forbidden_F = (_array(mesh, "replicated", (size,), jnp.int32) for size in (B, 1))
    rows: Any = row_batches.Rows(flags_BL, flags_BL, flags_BL, lengths_B)
    loop = functools.partial(Program, name, useful=None, dense=None, tokens=B * A)
    if workload.estimator == IS_GREEDY:
        same = greedy.matches_left_to_right if model.causal else greedy.matches_by_confidence

        def are_greedy(params, tokens_BL, forbidden_F, rows):
            return same(model, special, 0.0, params, forbidden_F, tokens_BL, rows)

        trips = _sampler_trips(1 if model.causal else A, per_device * L)
        return loop(jax.jit(are_greedy), (params, tokens_BL, forbidden_F, rows), trips)
    settings = likelihood.LikelihoodConfig(
        estimator=workload.estimator or likelihood.LikelihoodConfig.estimator,
        steps=workload.steps,
        block_length=workload.block_length,
    )
    likelihood.check_settings(model, settings)
    if settings.estimator in likelihood.ORDERED:
        order, passes = likelihood.order_of(settings, A)
        jitted = jax.jit(functools.partial(sampler.score_blocks, orders.setup_of(model, special, order)))
        seed_B = _array(mesh, "replicated", (B,), jnp.uint32)
        rows = sampler.Rows(flags_BL, seed_B, forbidden_F, lengths_B, tokens_BL)
        trips = _sampler_trips(passes / order.blocks, per_device * order.sampler.block_length)
        return loop(jitted, (params, tokens_BL, rows), trips)
    rows_of_device = B * L // mesh.devices.size
    return Program(
        name,
        jax.jit(functools.partial(likelihood.row_nats, model, special, 0.0)),
        (params, tokens_BL, rows),
        _head_trips(rows_of_device, vocabulary_head.scoring_rows("tpu"), accounting.head_fraction(config)),
        B * L * accounting.flops_exact_per_token(config) / 3,
        B * L * accounting.flops_exact_per_token(config, dense_head=True) / 3,
        B * L,
    )


def _check_context(config: Config, prompt: int, written: int) -> None:
    if written < 1 or config.model.max_length < prompt + written:
        raise UserError(
            f"--prompt_length={prompt} and --gen_length={written} are {prompt + written} tokens; the context is "
            f"{config.model.max_length}"
        )


def _sample(config: Config, mesh: jax.sharding.Mesh, workload: Workload) -> Program:
    B = mesh_lib.local_batch(workload.batch or 1, mesh)
    prompt = workload.prompt_length or 0
    written = workload.gen_length or min(64, config.model.max_length - prompt)
    L = prompt + written
    _check_context(config, prompt, written)
    params, tokens_BL = _inference_parameters(config, mesh, workload), _array(mesh, "replicated", (B, L), jnp.int32)
    if config.model.causal:
        function, rows, trips = _left_to_right(config, mesh, B, prompt, written)
    else:
        function, rows, trips = _denoising(config, mesh, B, L, written, workload)
    return Program("sample", jax.jit(function), (params, tokens_BL, rows), trips, None, None, B * written)


def _left_to_right(config: Config, mesh: jax.sharding.Mesh, B: int, prompt: int, written: int):
    """(function, its rows, trips) of an ARM's sampler."""
    setup = ancestral.Setup(config.model, _special_tokens(config), temperature=0.0, longest_prompt=prompt)
    rows = ancestral.Rows(
        _array(mesh, "replicated", (B,), jnp.int32),
        _array(mesh, "replicated", (B,), jnp.uint32),
        _array(mesh, "replicated", (1,), jnp.int32),
    )
    passes = float(written - 1), "a token a pass, to the end of the canvas"
    return functools.partial(ancestral.left_to_right, setup), rows, lambda path: passes


def _denoising(config: Config, mesh: jax.sharding.Mesh, B: int, L: int, written: int, workload: Workload):
    """(function, its rows, trips) of the reverse process."""
    settings = settings_lib.SamplerConfig(
        steps=workload.steps or written, block_length=workload.block_length or written, cache=workload.cache or "none"
    )
    settings_lib.check(settings, written)
    blocks = -(-written // settings.block_length)
    setup = sampler.Setup(config.model, settings, _special_tokens(config), blocks, suffix=written)
    rows = sampler.Rows(
        _array(mesh, "replicated", (B, L), bool),
        _array(mesh, "replicated", (B,), jnp.uint32),
        _array(mesh, "replicated", (1,), jnp.int32),
        lengths_B=None,
    )
    steps = settings.steps // blocks - (settings.cache != "none")
    of_device = B // mesh_lib.batch_shards(mesh) * settings.block_length
    return functools.partial(sampler.fill_blocks, setup), rows, _sampler_trips(steps, of_device)


def _sampler_trips(steps: float, rows: int) -> Trips:
    """Of a block's loop: its steps; of the head's, the blocks that a device's rows fill where they are many."""

    def trips(path: str) -> tuple[float, str]:
        if "shard_map" in path:
            head_blocks = rows / 2 / vocabulary_head.choosing_rows("tpu")[0] + 0.5
            return max(1.0, head_blocks), "vocabulary head: half of a block's positions, on average"
        return float(steps), "steps of a block"

    return trips


def _inference_parameters(config: Config, mesh: jax.sharding.Mesh, workload: Workload) -> transformer.Parameters:
    mesh_lib.check_parameters(config, mesh)
    abstract, dtype = transformer.abstract_parameters(config.model), jnp.dtype(workload.dtype or "float32")
    shardings = mesh_lib.parameter_shardings(mesh, abstract)
    return jax.tree.map(lambda x, s: x.update(dtype=dtype, sharding=s), abstract, shardings)


def _array(mesh: jax.sharding.Mesh, name: str, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An abstract array with the sharding called `name`."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.sharding(mesh, name))
