"""python tests/guarantees.py: writes docs/guarantees.md, what the program promises by kind and the tests that hold it.

Counts are of collected cases. tests/test_guarantees.py keeps the page's tests existing.
"""

import collections
import datetime
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guarantees.md"

# Kind -> what is promised -> the tests that would fail, as FILE or FILE::TEST, under tests/.
GUARANTEES: dict[str, list[tuple[str, list[str]]]] = {
    "A run goes on as it began": [
        (
            "Killed or stopped at any step, it ends with the bits of an uninterrupted run",
            [
                "training/test_loop.py::test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one",
                "training/test_loop.py::test_a_killed_run_continues_from_its_last_checkpoint_bit_for_bit",
            ],
        ),
        (
            "A workdir alone reproduces the bits that it ends with, however often the run was stopped",
            ["training/test_reproduction.py::test_a_run_that_was_stopped_and_continued_is_reproduced"],
        ),
        (
            "Every mesh axis, alone and with others, gives the loss and parameters of one device",
            [
                "test_sharding.py::test_three_steps_give_the_same_loss_and_parameters_on_every_mesh",
                "test_sharding.py::test_the_arm_is_sharded_as_well",
            ],
        ),
        (
            "Any number of processes reads the rows, draws the masks and finds the loss of one",
            [
                "test_multihost.py::test_rows_and_masks_are_those_of_one_device_and_the_loss_agrees",
                "test_multihost.py::test_another_number_of_processes_continues_from_what_was_saved",
            ],
        ),
        (
            "Sharded over processes, texts are those of one device, and scores by every estimator and by lm_eval",
            [
                "test_sharded_inference.py::test_scores_and_texts_are_those_of_one_device",
                "test_sharded_inference.py::test_tasks_of_lm_eval_get_the_answers_of_one_device",
                "test_sharded_inference.py::test_each_device_holds_a_quarter_and_each_process_reads_a_half",
                "test_sharded_inference.py::test_mistakes_of_one_process_end_both_in_one_line",
            ],
        ),
        (
            "A batch with a loss or gradient that is not finite is one skipped update; resumed runs skip the same ones",
            [
                "training/test_guard.py::test_a_bad_batch_is_one_skipped_update_and_nothing_more",
                "training/test_guard.py::test_all_devices_decide_alike",
                "training/test_guard.py::test_a_run_goes_on_past_bad_batches_and_resumes_between_them",
            ],
        ),
        (
            "A workdir of any older format is read with the bits that were saved, evaluated, continued and exported",
            [
                "training/test_old_checkpoints.py",
                "commands/test_format_version.py",
            ],
        ),
        (
            "An evaluation of tasks that was killed goes on, and every request gets the bits it gets in any company",
            ["evaluation/test_lm_eval.py::test_a_killed_evaluation_goes_on_and_gets_the_same_bits"],
        ),
        (
            "JAX's environment (x64, another generator) changes no figure",
            [
                "commands/test_surroundings.py::test_variables_that_would_change_figures_are_ignored_in_one_line_each",
                "commands/test_surroundings.py::test_a_notebook_whose_jax_computes_otherwise_is_told",
                "training/test_ground.py::test_jaxs_default_generator_does_not_change_initial_parameters",
            ],
        ),
    ],
    "Nothing is wrong without a word": [
        (
            "A reproduction with other bits says so, and what may be the cause is said before it trains",
            [
                "training/test_reproduction.py::"
                "test_other_bits_and_metrics_are_noticed_and_differences_are_said_beforehand",
                "training/test_reproduction.py::test_what_cannot_be_reproduced_is_refused_in_one_line",
            ],
        ),
        (
            "A run continues, and is evaluated, on the rows it was trained on or not at all",
            [
                "training/test_damage.py::test_a_run_goes_on_and_is_judged_with_the_rows_that_it_was_trained_on",
                "data/test_rows.py::test_damage_is_noticed",
                "data/test_rows.py::test_a_preparation_goes_on_where_it_was_stopped",
            ],
        ),
        (
            "A damaged row, example or id beyond the vocabulary is named before the step that would use it",
            [
                "data/test_rows.py::test_a_wrong_bit_names_file_row_and_byte_and_only_its_batch",
                "data/test_rows.py::test_checksums_and_metadata_are_sealed_and_older_corpora_open_without",
                "data/test_rows.py::test_ids_beyond_the_vocabulary_name_their_row",
                "data/test_examples.py::test_damage_is_named_when_the_example_is_read_and_that_of_tables_at_once",
                "training/test_damage.py::test_a_damaged_row_ends_the_run_before_the_step_that_would_use_it",
                "data/test_records.py::test_every_bit_that_is_wrong_is_noticed_or_harmless",
                "data/test_records.py::test_damage_ends_a_run_before_the_step_that_would_read_it",
            ],
        ),
        (
            "Checkpoint, config.json, tokenizer and step belong together, or one line says which does not",
            [
                "training/test_damage.py::test_one_line_says_what_is_wrong_and_nothing_is_written",
                "interop/test_exports.py::test_a_config_that_is_not_the_checkpoints_is_refused_both_ways",
            ],
        ),
        (
            "A damaged checkpoint is noticed by training, readers and export, and the newest good one goes on",
            [
                "training/test_digests.py::test_damage_anywhere_is_noticed_or_harmless",
                "training/test_digests.py::test_a_damaged_step_is_set_aside_and_the_one_before_it_ends_with_the_same_bits",
                "training/test_digests.py::test_readers_name_the_leaf_and_leave_the_step_where_it_is",
                "training/test_digests.py::test_export_and_import_publish_nothing_of_a_damaged_step",
                "training/test_digests.py::test_verify_names_what_is_damaged",
            ],
        ),
        (
            "Losses are compared on equal rows only; rows, draws, estimator and kind stand beside them",
            [
                "scaling/test_comparison.py",
                "scaling/test_results.py",
                "interop/test_exports.py::test_a_card_says_what_its_figures_are_of",
            ],
        ),
        (
            "Held-out figures, their errors and bits per byte are those of each row counted once",
            [
                "evaluation/test_validation.py",
                "data/test_rows.py::test_bytes_are_the_documents_where_a_tokenizer_changes_text",
            ],
        ),
        (
            "Another rate, schedule, clipping or guard holds from the next step on, recorded; it repeats to the bit",
            [
                "training/test_changes.py::test_a_change_holds_from_the_next_step_on_and_is_recorded",
                "training/test_changes.py::test_values_that_a_run_left_behind_do_not_come_back_by_themselves",
                "training/test_changes.py::test_reports_say_what_was_changed",
            ],
        ),
        (
            "A run that goes back to an earlier checkpoint does so once, and leaves out the batches since",
            ["training/test_changes.py::test_a_run_goes_back_once_and_leaves_the_batches_since_out"],
        ),
        (
            "A longer run whose learning rate would jump is refused, with the rates, until it is allowed",
            [
                "training/test_ground.py::test_another_length_is_refused_where_the_rate_would_jump",
                "training/test_ground.py::test_the_rate_of_the_next_step_decides",
            ],
        ),
        (
            "A sweep takes no key that its rules overwrite, and names what it leaves out",
            [
                "scaling/test_grid.py::test_every_key_that_rules_overwrite_is_refused",
                "scaling/test_grid.py::test_what_a_grid_leaves_out_is_named",
            ],
        ),
        (
            "Speeds are of several timed steps, without pauses and pacing, or are not given",
            [
                "training/test_ground.py::test_a_speed_is_of_several_steps_that_took_their_time",
                "training/test_ground.py::test_a_few_steps_have_no_speed",
            ],
        ),
        ("Text is tokenised as one text, whatever masks or answers stand in it", ["inference/test_canvas.py"]),
    ],
    "One writer for one name": [
        (
            "Workdirs, rows, tokenizers, exports and imports are locked, and the lock names its holder",
            [
                "test_files.py::test_a_lock_names_its_holder_and_ends_with_the_block",
                "training/test_ground.py::test_nobody_else_trains_in_a_workdir",
                "data/test_rows.py::test_runs_that_start_together_share_one_corpus",
                "data/test_tokenizer.py::test_processes_that_train_at_once_share_one_model",
                "interop/test_exports.py::test_of_two_exports_at_once_one_is_refused_by_name",
            ],
        ),
        (
            "Files and directories appear whole; nothing of the user's is removed",
            [
                "test_files.py::test_writers_of_one_file_never_mix_and_leave_nothing",
                "test_files.py::test_what_a_killed_writer_left_is_cleared_and_nothing_of_the_users",
                "interop/test_exports.py::test_what_lies_beside_an_export_stays",
            ],
        ),
        (
            "What reads a workdir while training rotates its checkpoints takes the newest one there is",
            [
                "training/test_damage.py::test_every_reader_takes_the_newest_step_where_training_removes_the_one_it_reads",
                "training/test_damage.py::test_a_step_taken_away_while_it_is_read_is_looked_for_again",
            ],
        ),
        (
            "A full disk is one line and status 5; what was good stays good",
            [
                "data/test_rows.py::test_a_disk_that_is_full_for_a_moment_leaves_nothing",
                "training/test_ground.py::test_a_failed_save_ends_in_one_line_and_leaves_no_thread",
                "training/test_ground.py::test_a_full_disk_takes_no_checkpoint_and_tensorboard_is_not_needed",
            ],
        ),
        (
            "A disk that fails, or has become read-only, is told like a full one, also where tensorstore meets it",
            [
                "test_files.py::test_errors_of_the_disk_are_known_by_their_numbers",
                "test_files.py::test_errors_of_the_disk_are_known_in_the_words_of_tensorstore",
            ],
        ),
        (
            "Faults drawn by the hundred are counted as they come, and what is wrong is shown as it is",
            [
                "test_faults.py",
            ],
        ),
    ],
    "Bad input is one line and status 2": [
        (
            "Commands: mistakes of all kinds, every flag and every key with values it cannot have; nothing is written",
            [
                "commands/test_wrong_commands.py",
                "commands/test_inference_flags.py",
                "scaling/test_grid.py::test_no_key_of_a_sweep_takes_what_it_cannot_be",
            ],
        ),
        (
            "Paths: every flag that takes one; schemes refused before work, ~ and odd characters as they are",
            [
                "commands/test_paths.py",
                "test_files.py::test_what_is_no_path_is_refused_with_its_flag",
            ],
        ),
        (
            "Files: damaged JSON by name and position, pipes and devices unread, numbers bounded",
            [
                "test_files.py::test_damaged_json_is_one_line_that_names_file_and_position",
                "test_files.py::test_pipes_devices_and_huge_files_are_not_read",
                "data/test_huggingface_tokenizer.py::test_hostile_files_get_one_line_at_once",
                "data/test_tokenizer.py::test_damaged_models_are_refused_or_work",
                "data/test_tokenizer.py::test_an_unknown_token_that_is_no_piece_is_refused",
                "interop/test_bad_input.py",
            ],
        ),
        (
            "No file that is read runs code, and weights that are no numbers are taken only where that is asked for",
            [
                "test_security.py",
                "interop/test_bad_input.py::test_code_in_the_directory_is_not_run",
                "interop/test_bad_input.py::test_a_run_begins_from_numbers_that_are_none_only_where_that_is_asked_for",
            ],
        ),
        (
            "What is written is strict JSON: null for what does not exist",
            [
                "test_files.py::test_what_is_written_is_strict_json",
                "training/test_ground.py::test_what_does_not_exist_is_null_in_metrics",
                "evaluation/test_validation.py::test_numbers_that_do_not_exist_are_null",
            ],
        ),
        (
            "What the end would refuse is refused at the start, and a first mistake settles nothing",
            [
                "training/test_ground.py::test_a_first_mistake_settles_nothing",
                "scaling/test_sweep.py::test_a_first_mistake_locks_nothing",
                "interop/test_wild.py::test_what_export_would_refuse_of_a_tokenizer_is_refused_before_training",
                "planning/test_plan.py::test_no_advice_is_given_that_cannot_do",
            ],
        ),
    ],
    "Models and data of the wild": [
        (
            "Llama, Mistral and Qwen directories come in, score as in transformers and go out the same",
            [
                "interop/test_wild.py",
            ],
        ),
        ("Exports work in transformers' pipeline and generate, under both majors", ["interop/test_modeling.py"]),
        (
            "Directories, patterns, compressed files, JSON, Parquet, few documents, a hold-out of one's own",
            [
                "data/test_sources.py",
            ],
        ),
        (
            "A corpus in shards has the same bytes for any number of processes and jobs, after kills and signals",
            [
                "data/test_tokenizing.py::test_bytes_do_not_depend_on_workers_or_jobs",
                "data/test_tokenizing.py::test_a_killed_call_is_gone_on_with",
                "data/test_tokenizing.py::test_a_signal_ends_the_workers_and_loses_nothing",
            ],
        ),
        (
            "Training from shards has the bits of training from .npy rows; both families read the same rows",
            [
                "data/test_records.py::test_one_shard_trains_as_the_npy_files_do",
                "data/test_records.py::test_families_read_the_same_rows_and_a_run_goes_on_with_them",
            ],
        ),
        (
            "A tokenizer without a mask token serves an ARM, and gets one for a LLaDA",
            [
                "data/test_huggingface_tokenizer.py::test_a_mask_token_is_appended_where_there_is_room",
                "data/test_tokenizer.py::test_a_mask_token_is_appended_as_a_control_symbol",
            ],
        ),
    ],
    "It fits, and it ends well": [
        (
            "What trains also samples, scores and evaluates: on its mesh, in its microbatches",
            [
                "test_sharding.py::test_texts_likelihoods_and_held_out_figures_are_the_same_on_every_mesh",
                "evaluation/test_validation.py::test_rows_are_spread_over_the_whole_side_on_any_mesh_in_any_parts",
            ],
        ),
        (
            "libtpu's options can be left out, and a refused one says so",
            [
                "planning/test_plan.py::test_options_that_libtpu_does_not_take_are_named_and_can_be_left_out",
            ],
        ),
        (
            "Closed pipes, no terminal, no home, signals while importing: one line, the right status",
            [
                "commands/test_surroundings.py",
            ],
        ),
        (
            "Signals save and end the run at any moment, also while it imports, prepares and compiles",
            [
                "commands/test_endings.py::test_signals_at_any_moment_lose_nothing",
                "commands/test_surroundings.py::test_a_signal_is_heard_once_and_ends_in_one_line",
                "training/test_ground.py::test_a_signal_while_preparing_stops_at_the_next_document",
                "training/test_ground.py::test_a_hangup_is_a_signal_to_stop_unless_it_is_ignored",
                "test_multihost.py::test_a_signal_to_one_process_stops_all_after_saving_the_same_step",
            ],
        ),
        (
            "A process that dies or hangs ends the others soon, and a run that hangs says where",
            [
                "test_multihost.py::test_a_process_that_dies_or_hangs_ends_the_others_soon",
                "commands/test_endings.py::test_a_process_that_hangs_says_where_and_ends",
                "commands/test_endings.py::test_a_run_whose_steps_stop_ends_as_one_that_lost_a_peer",
            ],
        ),
        (
            "A checkpoint that finds no room is said at once and tried again",
            [
                "training/test_room.py",
            ],
        ),
        (
            "Launchers repeat what another try may mend, and nothing else",
            [
                "test_launch.py::test_launchers_know_the_statuses_of_the_program",
                "test_preemption.py::test_training_is_started_again_unless_that_is_no_use",
            ],
        ),
        (
            "Finished runs of a sweep stay finished; failed ones are not taken for them",
            [
                "scaling/test_sweep.py::test_seeds_added_to_a_finished_sweep_are_all_that_is_trained",
                "scaling/test_sweep.py::test_what_would_meet_the_next_run_too_ends_the_sweep",
            ],
        ),
    ],
}


def tests() -> set[str]:
    """Every test that the page names."""
    return {test for promises in GUARANTEES.values() for _, held_by in promises for test in held_by}


def exists(test: str) -> bool:
    """Whether the file, and the function in it, are there."""
    file, _, function = test.partition("::")
    path = ROOT / "tests" / file
    return path.exists() and (not function or re.search(rf"^def {function}\(", path.read_text(), re.M) is not None)


def cases() -> dict[str, int]:
    """Collected cases of every test and of every file."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    counts: dict[str, int] = collections.Counter()
    for line in done.stdout.splitlines():
        if match := re.match(r"tests/([\w/]+\.py)::(\w+)", line):
            counts[match[1]] += 1
            counts[f"{match[1]}::{match[2]}"] += 1
    return counts


def page(counts: dict[str, int], commit: str) -> str:
    """The page as Markdown."""
    lines = [
        "# Guarantees",
        "",
        "What the program promises to those who lean on it, by the kind of mishap, and the tests that would fail if it",
        "did not hold. Written by `python tests/guarantees.py`, which counts the cases that pytest collects",
        f"(commit {commit}, {datetime.date.today()}, Python {platform.python_version()}).",
        "`bash launch/test.sh` runs them all; `python tests/mutants.py` breaks the source on purpose and counts what",
        "the tests notice.",
    ]
    for kind, promises in GUARANTEES.items():
        total = sum(counts[test] for test in {test for _, held_by in promises for test in held_by})
        lines += ["", f"## {kind}", "", f"| promise | tests ({total} cases) |", "| --- | --- |"]
        for promise, held_by in promises:
            names = "<br>".join(f"`{test}` ({counts[test]})" for test in held_by)
            lines.append(f"| {promise} | {names} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page; 1 where a test is missing."""
    if missing := sorted(test for test in tests() if not exists(test)):
        print(f"no such test: {', '.join(missing)}", file=sys.stderr)
        return 1
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    PAGE.write_text(page(cases(), commit.strip()), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
