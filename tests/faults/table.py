"""Lists the faults of docs/explanation/reliability.md, what is promised under each, and the tests that inject it."""

from __future__ import annotations

import ast
import dataclasses
import functools
from pathlib import Path

TESTS = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
      what: what happens.
      promise: what the program does then.
      tests: names of test functions, or of files of tests.
    """

    what: str
    promise: str
    tests: tuple[str, ...]


FAULTS = {
    1: Fault(
        "kill -9 at a random step",
        "the same command ends with the same hash",
        ("test_kill_minus_9_and_sigterm_and_the_same_command_end_with_the_same_bits",),
    ),
    2: Fault(
        "kill -9 during a save",
        "the step before is used",
        ("test_killed_at_random_moments", "test_orbax_replay.py", "test_store_faults.py"),
    ),
    3: Fault(
        "kill -9 between commit and manifest",
        "the step is verified or passed over",
        ("test_killed_between_commit_and_manifest", "test_deleted_manifest_is_written_again_when_the_content_matches"),
    ),
    4: Fault("kill -9 while compiling", "the next run starts from 0", ("test_killed_while_compiling",)),
    5: Fault("SIGTERM in a step", "75, saved", ("test_first_signal_finishes_the_step_and_exits_75",)),
    6: Fault("SIGTERM in an evaluation", "75, saved", ("test_a_signal_in_an_evaluation_and_in_the_last_save",)),
    7: Fault("SIGINT twice", "130", ("test_second_signal_exits_130_while_the_main_thread_is_inside_c",)),
    8: Fault(
        "SIGTERM before the first step, in the report",
        "75",
        ("test_a_signal_before_training_ends_it_with_75", "test_a_signal_where_nothing_can_be_lost"),
    ),
    9: Fault(
        "SIGSTOP, SIGCONT",
        "it goes on, and the speed is not absurd",
        ("test_an_interval_in_which_the_process_was_stopped_changes_nothing",),
    ),
    10: Fault(
        "an array of a checkpoint is truncated",
        "set aside, an older step is used",
        ("test_damaged_checkpoint_is_set_aside_and_the_older_one_used",),
    ),
    11: Fault("one bit of a checkpoint is flipped", "the same", ("test_every_flipped_bit_is_found",)),
    12: Fault(
        "metadata or manifest are deleted or malformed",
        "the same, unless the digest proves the content",
        (
            "test_without_proof_a_step_is_not_used",
            "test_malformed_manifest_or_digest_sets_the_step_aside",
            "test_malformed_metadata_of_orbax",
        ),
    ),
    13: Fault("every checkpoint is damaged", "65, each with its reason", ("test_every_checkpoint_damaged",)),
    14: Fault(
        "the disk is full while saving",
        "74, the step before is intact",
        ("test_failed_save_is_reported_by_whatever_comes_next", "test_no_room_ends_the_process_with_74"),
    ),
    15: Fault(
        "the disk is full for metrics",
        "one warning, nothing is lost",
        ("test_a_full_disk_is_one_warning_and_loses_nothing",),
    ),
    16: Fault(
        "the work directory is read-only, or a file",
        "73",
        (
            "test_directory_that_cannot_be_created_or_written",
            "test_a_work_directory_that_cannot_be_used_is_refused_before_jax_is_imported",
        ),
    ),
    17: Fault("a second run", "73 naming the first", ("test_second_run_is_refused_and_told_who_holds_it",)),
    18: Fault("a stale lock", "it starts", ("test_lock_of_a_killed_run_is_stale",)),
    19: Fault("an unknown field", "78 with the nearest name", ("test_bad_input_costs_three_lines",)),
    20: Fault("a wrong type or range", "78", ("test_any_value_of_any_field_is_accepted_or_refused",)),
    21: Fault(
        "a config that is missing or does not run",
        "66 or 78 with its line",
        ("test_a_config_that_does_not_run_is_blamed_with_its_line",),
    ),
    22: Fault(
        "resumed with another model",
        "65 or 78 with a table",
        ("test_another_model_is_refused_with_a_table_and_left_in_place", "test_another_experiment_is_refused"),
    ),
    23: Fault(
        "weights of another network",
        "65 or 78 with what differs",
        ("test_files_of_other_networks_are_refused", "test_step_of_another_run_is_set_aside"),
    ),
    24: Fault("a mesh or batch that does not fit", "78 with the nearest", ("test_bad_input_costs_three_lines",)),
    25: Fault(
        "saved on 8 devices, resumed on fewer or more, in more or fewer processes",
        "the same state, batches and losses",
        ("test_save_on_eight_devices_restore_on_fewer", "test_a_run_that_moves_is_the_run_that_stays"),
    ),
    26: Fault(
        "damaged and unusual images",
        "replaced or read, and counted",
        ("test_a_damaged_image_is_replaced_by_the_next_whole_one", "test_cmyk_is_converted_as_pillow_does"),
    ),
    27: Fault("too many of them", "65 with the list", ("test_too_many_damaged_images_stop_a_run_and_are_named",)),
    28: Fault("a decompression bomb", "refused from its header", ("test_image_limits.py",)),
    29: Fault(
        "a label out of range",
        "65 before training",
        ("test_a_label_out_of_range_is_named_before_training", "test_a_label_out_of_range_stops_a_run"),
    ),
    30: Fault(
        "a dataset or split is missing",
        "66 with the command",
        (
            "test_a_missing_dataset_names_the_command_that_makes_it",
            "test_a_missing_or_empty_split_names_those_that_are_there",
        ),
    ),
    31: Fault("another dataset", "refused unless allowed", ("test_another_dataset_is_refused_unless_allowed",)),
    32: Fault(
        "a batch with NaN", "the state keeps every bit", ("test_a_bad_batch_leaves_every_bit_and_the_next_one_counts",)
    ),
    33: Fault(
        "divergence",
        "passed over, or 70",
        ("test_a_run_that_diverges_keeps_its_last_good_checkpoint", "test_recovery.py"),
    ),
    34: Fault(
        "a data worker is killed",
        "74 within half a minute",
        (
            "test_only_kill_9_ends_a_worker_and_it_is_a_storage_error_never_a_hang",
            "test_killed_workers_end_a_run_with_74_within_half_a_minute",
            "test_a_signal_while_all_workers_are_stuck",
        ),
    ),
    35: Fault("a process of several is killed", "the others end with 75", ("test_a_host_that_is_lost_while_training",)),
    36: Fault("the coordinator is killed or frozen", "the same", ("test_the_others_end_resumable_and_name_it",)),
    37: Fault(
        "a process never starts",
        "75 within the timeout, naming it",
        ("test_a_process_that_never_starts_is_named", "test_all_that_wait_name_those_that_never_start"),
    ),
    38: Fault(
        "SIGTERM to one of two processes",
        "both stop after the same step",
        ("test_one_of_two_processes_is_told_and_both_stop_after_the_same_step",),
    ),
    39: Fault("two configs", "78 on both, told once", ("test_different_configs",)),
    40: Fault(
        "a tracker that cannot write",
        "one warning",
        (
            "test_trackers_and_profiles_that_cannot_be_written_cost_one_line",
            "test_wandb_that_cannot_start_is_one_warning",
        ),
    ),
    41: Fault("a checkpoint of an earlier version", "restored to the bit", ("test_earlier_checkpoints.py",)),
    42: Fault(
        "a truncated or changed weight file or export",
        "65",
        ("test_flipped_bytes_never_give_a_traceback", "test_a_damaged_export_is_found", "test_hostile_files.py"),
    ),
    43: Fault(
        "too little memory",
        "71",
        ("test_too_little_address_space_ends_with_71_instead_of_waiting_for_ever",),
    ),
    44: Fault(
        "thirty random kills of one run",
        "the same hash",
        ("test_thirty_kills_end_with_the_same_hash", "test_thirty_kills_in_a_bucket_end_with_the_same_hash"),
    ),
    45: Fault(
        "hosts that differ in config, weights, data or directory",
        "one code, before training",
        (
            "test_different_configs",
            "test_work_directories_that_are_not_shared",
            "test_data_that_are_others",
            "test_initial_weights_of_hosts.py",
        ),
    ),
    46: Fault(
        "an error on one host",
        "the same code on all, told once",
        ("test_agreement.py", "test_data_that_are_damaged_on_one_host", "test_a_work_directory_with_a_damaged_config"),
    ),
    47: Fault("any host is killed or frozen", "75, naming it", ("test_the_others_end_resumable_and_name_it",)),
    48: Fault(
        "one host never starts",
        "75 within the timeout, naming it",
        ("test_a_process_that_never_starts_is_named", "test_all_that_wait_name_those_that_never_start"),
    ),
    49: Fault(
        "SIGTERM to one host in a step, an evaluation, a wait for input, the report",
        "75 on all, after the same step",
        ("test_stopping_pair.py",),
    ),
    50: Fault("processes that are not connected", "refused with the remedy", ("test_start.py",)),
    51: Fault(
        "a run in a bucket is killed after any of its writes",
        "no torn step is used, no saved step is lost, its metrics are there, the same hash",
        (
            "test_orbax_replay.py",
            "test_checkpoints_in_a_bucket.py",
            "test_runs_in_a_bucket.py",
            "test_a_run_that_is_killed_is_resumed_at_once_on_the_same_machine",
            "test_thirty_kills_in_a_bucket_end_with_the_same_hash",
        ),
    ),
    52: Fault(
        "a bucket answers 503, 429, late, in part, or refuses",
        "bounded repetitions, then 74; the next run has the same hash",
        (
            "test_store_faults.py",
            "test_a_store_that_fails_now_and_then_costs_only_time",
            "test_a_store_that_goes_away_ends_the_run_and_the_next_resumes",
            "test_a_save_that_hangs_fails_in_time",
        ),
    ),
    53: Fault(
        "two runs want one directory in a bucket; an owner is frozen and taken over",
        "one wins, the other ends with 73; the frozen one commits nothing",
        (
            "test_lease.py",
            "test_two_runs_race_for_one_directory",
            "test_a_frozen_run_that_was_taken_over_completes_no_further_step",
        ),
    ),
    54: Fault(
        "listings of a bucket that are out of date",
        "never a state that is not there",
        ("test_a_reader_that_polls_sees_no_listing_of_the_past",),
    ),
    55: Fault(
        "no step ends",
        "75, with the stacks of all threads",
        ("test_watchdog.py", "test_a_collective_that_waits_for_ever"),
    ),
    56: Fault(
        "steps are exchanged, renamed or copied",
        "found, an older step is used",
        ("test_verification.py",),
    ),
    57: Fault("a foreign or damaged library in the cache", "rebuilt or refused", ("test_native.py",)),
    58: Fault(
        "files that take for ever or all memory",
        "65 within the limit",
        ("test_isolation.py", "test_user_files.py", "test_hostile_archives.py", "test_hostile_datasets.py"),
    ),
    59: Fault("zero steps, images or classes", "78 or 66", ("test_bad_input_costs_three_lines",)),
    60: Fault("hostile names", "shown escaped", ("test_names.py",)),
    61: Fault(
        "prepare is killed or interrupted",
        "the same command goes on from the finished files, to the same bytes",
        ("test_prepare_resumes.py",),
    ),
}


@functools.cache
def places() -> dict[str, list[str]]:
    """Returns the pytest node identifiers of each test function and each file of tests, by name."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        file = str(path.relative_to(TESTS.parent))
        found.setdefault(path.name, []).append(file)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.setdefault(node.name, []).append(f"{file}::{node.name}")
    return found
