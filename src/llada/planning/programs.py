"""What is compiled: the real training step, evaluation, sampler or likelihood of a config, from abstract arguments.

The compiled program is the one that a TPU slice would run: same function, same mesh, same shardings. Nothing of the
model's size is allocated.
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
from llada.inference import ancestral, choice, likelihood, sampler
from llada.inference import settings as settings_lib
from llada.model import transformer
from llada.objectives import vocabulary_head
from llada.objectives.contract import SpecialTokens
from llada.planning import topology
from llada.planning.hlo import Trips
from llada.training import step as step_lib

PROGRAMS = ("train", "evaluate", "sample", "likelihood")
_DIFFUSION_ONLY = ("steps", "block_length", "cache")  # fields of a Workload


class Workload(NamedTuple):
    """The work of inference to plan: `batch` rows of `prompt_length` + `gen_length` tokens, and how they are filled.

    Without `steps` and `block_length` it is one step per token and one block, as in `llada sample`; `dtype` is that of
    the parameters in memory, by default float32.
    """

    batch: int | None = None
    prompt_length: int | None = None
    gen_length: int | None = None
    steps: int | None = None
    block_length: int | None = None
    cache: str | None = None
    dtype: str | None = None


class Program(NamedTuple):
    """A function to compile and what is known of it beforehand.

    arguments     abstract; the first are the parameters, or a state that begins with them, the second a batch
    trips         estimates the trip count of a loop that depends on data
    useful        matrix FLOPs of one run on all chips without recomputation; None where the term means nothing
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
        return self.arguments[1].shape[0]


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
    allowed = {"train": (), "evaluate": ("dtype",), "likelihood": ("batch", "dtype"), "sample": workload._fields}[name]
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
    """Ids in place of a tokenizer's: which they are changes no shape."""
    return SpecialTokens(mask=config.model.vocab_size - 1, eos=0)


def _train(config: Config, mesh: jax.sharding.Mesh, workload: Workload) -> Program:
    mesh_lib.check(config, mesh)
    B, L = config.train.batch_size, config.data.sequence_length
    abstract = jax.eval_shape(functools.partial(step_lib.init_state, config))
    state = _placed(abstract, step_lib.state_shardings(config, mesh))
    batch_BL = jax.ShapeDtypeStruct((B, L), jnp.int32, sharding=mesh_lib.sharding(mesh, "BL"))
    rows = B // config.train.microbatches * L // mesh.devices.size
    tokens = config.tokens_per_step
    return Program(
        "train",
        step_lib.compile_step(config, _special_tokens(config), mesh),
        (state, batch_BL),
        _training_head_trips(config, rows),
        tokens * accounting.flops_exact_per_token(config),
        tokens * accounting.flops_exact_per_token(config, dense_head=True),
        tokens,
    )


def _evaluate(config: Config, mesh: jax.sharding.Mesh, workload: Workload) -> Program:
    """One batch of held-out rows, all of its draws: what the validation figure is made of."""
    mesh_lib.check_parameters(config, mesh)
    estimator, L = validation.estimator_for(config), config.data.sequence_length
    B = validation.rows_at_once(config, mesh, config.evaluate.batches * config.train.batch_size)
    rows = jax.ShapeDtypeStruct((B, L), jnp.int32, sharding=mesh_lib.sharding(mesh, "BL"))
    indices = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=mesh_lib.sharding(mesh, "replicated"))
    passes = B * L * (1 if estimator == "exact" else config.evaluate.draws)
    per_device = B * L // mesh.devices.size
    return Program(
        "evaluate",
        validation.jitted(config, _special_tokens(config), mesh, estimator),
        (_inference_parameters(config, mesh, workload), rows, indices),
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
    L = config.model.max_length
    B = mesh_lib.local_batch(workload.batch or 1, mesh)
    params = _inference_parameters(config, mesh, workload)
    rows = [
        jax.ShapeDtypeStruct((B, L), dtype, sharding=mesh_lib.sharding(mesh, "BL"))
        for dtype in (jnp.int32, bool, bool, bool)
    ]
    special = _special_tokens(config)
    fraction = accounting.head_fraction(config)
    per_device = B * L // mesh.devices.size
    return Program(
        "likelihood",
        jax.jit(functools.partial(likelihood.row_nats, config.model, special, 0.0)),
        (params, *rows, None),
        _head_trips(per_device, likelihood.head_rows("tpu"), fraction),
        B * L * accounting.flops_exact_per_token(config) / 3,
        B * L * accounting.flops_exact_per_token(config, dense_head=True) / 3,
        B * L,
    )


def _sample(config: Config, mesh: jax.sharding.Mesh, workload: Workload) -> Program:
    m, special = config.model, _special_tokens(config)
    B = mesh_lib.local_batch(workload.batch or 1, mesh)
    prompt = workload.prompt_length or 0
    written = workload.gen_length or min(64, m.max_length - prompt)
    L = prompt + written
    if written < 1 or m.max_length < L:
        raise UserError(
            f"--prompt_length={prompt} and --gen_length={written} are {L} tokens; the context is {m.max_length}"
        )
    params = _inference_parameters(config, mesh, workload)
    rows, each = mesh_lib.sharding(mesh, "BL"), mesh_lib.sharding(mesh, "B")
    tokens_BL = jax.ShapeDtypeStruct((B, L), jnp.int32, sharding=rows)
    forbidden_F = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=mesh_lib.sharding(mesh, "replicated"))
    seed_B = jax.ShapeDtypeStruct((B,), jnp.uint32, sharding=each)
    if m.causal:
        prompt_B = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=each)
        setup = ancestral.Setup(config.model, special, temperature=0.0, longest_prompt=prompt)
        jitted = functools.partial(ancestral.left_to_right, setup)
        arguments = (params, tokens_BL, ancestral.Rows(prompt_B, seed_B, forbidden_F))
        passes = float(written - 1), "a token a pass, to the end of the canvas"
        return Program("sample", jax.jit(jitted), arguments, lambda path: passes, None, None, B * written)
    settings = settings_lib.SamplerConfig(
        steps=workload.steps or written, block_length=workload.block_length or written, cache=workload.cache or "none"
    )
    settings_lib.check(settings, written)
    blocks = -(-written // settings.block_length)
    open_BL = jax.ShapeDtypeStruct((B, L), bool, sharding=rows)
    jitted = functools.partial(
        sampler.fill_blocks, sampler.Setup(config.model, settings, special, blocks, suffix=written)
    )
    arguments = (params, tokens_BL, sampler.Rows(open_BL, seed_B, forbidden_F, lengths_B=None))
    return Program(
        "sample", jax.jit(jitted), arguments, _sampler_trips(settings, blocks, B, mesh), None, None, B * written
    )


def _sampler_trips(settings: settings_lib.SamplerConfig, blocks: int, B: int, mesh: jax.sharding.Mesh) -> Trips:
    """Of a block's loop: its steps; of the head's, the blocks that a device's rows fill where they are many."""
    steps = settings.steps // blocks - (settings.cache != "none")
    rows = B // mesh_lib.batch_shards(mesh) * settings.block_length

    def trips(path: str) -> tuple[float, str]:
        if "shard_map" in path:
            head_blocks = rows / 2 / choice.block_rows("tpu")[0] + 0.5
            return max(1.0, head_blocks), "vocabulary head: half of a block's positions, on average"
        return float(steps), "steps of a block"

    return trips


def _inference_parameters(config: Config, mesh: jax.sharding.Mesh, workload: Workload):
    dtype = jnp.dtype(workload.dtype or "float32")
    abstract = transformer.abstract_parameters(config.model)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)
    return _placed(abstract, mesh_lib.parameter_shardings(mesh, abstract))


def _placed(abstract, placements):
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, placements)
