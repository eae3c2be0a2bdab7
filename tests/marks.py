"""Which files of tests/ have which marker; the markers themselves are declared in setup.cfg."""

# Files that take longest, under tests/: they begin first, so that no process is left with one at the end.
LONGEST = (
    "scaling/test_sweep.py inference/test_sampler.py commands/test_program.py training/test_loop.py test_multihost.py "
    "test_sharding.py test_sharded_inference.py inference/test_published.py interop/test_modeling.py "
    "commands/test_surroundings.py "
    "commands/test_wrong_commands.py interop/test_round_trip.py interop/test_pytorch.py interop/test_tuning.py "
    "model/test_transformer.py "
    "planning/test_plan.py training/test_damage.py training/test_ground.py test_tour.py test_benchmarks.py "
    "scaling/test_study.py training/test_step.py inference/test_distribution.py inference/test_likelihood.py "
    "scaling/test_pictures.py interop/test_sentencepiece_files.py test_preemption.py test_equations.py"
).split()

# Markers of whole files; single tests have theirs where they stand. `fast` has seconds of every room.
FILES = {
    "fast": (
        "test_architecture.py test_security.py test_documents.py test_guarantees.py test_experiments.py "
        "test_equations.py test_files.py "
        "commands/test_wrong_commands.py data/test_rows.py data/test_sources.py evaluation/test_validation.py "
        "interop/test_bad_input.py objectives/test_vocabulary_head.py planning/test_hlo.py scaling/test_grid.py "
        "scaling/test_laws.py training/test_optimizer.py training/test_transfers.py"
    ).split(),
    "multihost": ["test_multihost.py", "test_sharded_inference.py"],
    "torch": (
        "test_benchmarks.py inference/test_published.py interop/test_modeling.py interop/test_pytorch.py "
        "interop/test_tuning.py interop/test_wild.py"
    ).split(),
}
