"""docs/security-matrix.md, written by the suite: what was tried where, and what held."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.attacks.case import Case

PATH = Path(__file__).resolve().parents[2] / "docs" / "security-matrix.md"
COLUMNS = ("control", "docker", "runsc", "bubblewrap", "local")
HEAD = """\
# Security matrix

Written by `tests/test_catalogue.py`; do not edit it. Each case is code that runs in a cell and tries to get
something. *Control*: the same in a process that nothing holds, where it must succeed, or the case proves
nothing; "·" where there is nothing to show (a cell that never ends is one anywhere). After each case, another
session of the same sandbox still has its variables, and a new one opens.

- **held**: it did not get what it tried; the session went on.
- *inert*: it works, and gains nothing: Python is never the boundary.
- –: not tried there. `local` is no security boundary, and gVisor (`runsc`) is a kernel of its own, where some
  calls are allowed and virtual.

| id | what is tried | expected | {columns} |
|---|---|---|{dashes}|
"""
ELSEWHERE = """
## Held by tests of their own

| id | what is tried | test |
|---|---|---|
"""
ABSENT = """
## Nothing to attack

| id | why |
|---|---|
"""
TESTS: dict[str, tuple[str, str]] = {
    "B01": ("flood of calls", "test_calls.py::test_a_flood_of_calls_does_not_reach_the_host_all_at_once"),
    "B02": ("a prompt over its limit", "test_calls.py::test_an_over_long_prompt_says_how_long_it_may_be"),
    "B03": ("a batch over its limit", "test_calls.py::test_wrong_arguments_raise_in_the_cell"),
    "B04": (
        "spend more than the budget in the middle of a cell",
        "test_limits.py::test_a_budget_holds_in_the_middle_of_a_batch_and_the_server_bills_no_more",
    ),
    "B06": (
        "recursion without end, or at another depth",
        "test_recursion.py::test_depth_is_the_hosts_and_ends_in_plain_calls",
    ),
    "B07": (
        "replies and ids that are forged",
        "test_calls.py::test_forged_and_repeated_ids_and_malformed_frames_only_hurt_their_connection",
    ),
    "B08": (
        "results that are forged",
        "test_hostile.py::test_what_a_worker_forges_never_reaches_another_session",
    ),
    "B10": (
        "another sandbox's agent, without its token",
        "test_wire.py::test_without_the_token_nothing_answers",
    ),
    "B15": (
        "a reader that never reads",
        "test_calls.py::test_a_client_that_never_reads_its_replies_harms_nobody",
    ),
    "B16": (
        "answers of the greatest length, again and again, from a tree of runs",
        "test_tree_budget.py::test_a_tree_never_takes_more_than_its_budget_and_tells_what_it_took",
    ),
    "B19": (
        "learn from the cache what others have asked",
        "test_cache.py::test_nothing_crosses_a_scope_or_other_arguments",
    ),
    "B18": (
        "calls within calls: from signal handlers and finalizers",
        "test_calls.py::test_a_call_within_a_call_has_a_connection_of_its_own",
    ),
    "B17": ("calls after the cell", "test_calls.py::test_a_call_after_its_cell_is_refused"),
    "R14": ("a gigabyte of output", "test_output.py::test_a_gigabyte_printed_costs_the_host_under_32_mb"),
    "H01, H07": ("what is no message", "test_hostile_agent.py::test_what_is_no_message_ends_the_session"),
    "H02": ("JSON that is nested deeply", "test_hostile_agent.py::test_a_greeting_that_is_none_is_one_line"),
    "H03": (
        "an oversized message",
        "test_hostile_agent.py::test_h03_a_message_over_the_limit_ends_the_session",
    ),
    "H04": ("a compressed bomb", "test_hostile_agent.py::test_h04_a_compressed_bomb_is_not_unpacked"),
    "H05": (
        "a bomb of small messages",
        "test_hostile_agent.py::test_h05_two_million_empty_messages_are_too_many",
    ),
    "H10, H24": (
        "errors that steer the terminal, or have no end",
        "test_hostile_agent.py::test_the_text_of_an_error_is_short_and_can_not_steer",
    ),
    "H22": (
        "an agent that never reads",
        "test_hostile_agent.py::test_h22_an_agent_that_never_reads_holds_up_its_own_session_for_its_time",
    ),
    "H07b": (
        "bytes that are no text",
        "test_output.py::test_bytes_that_are_no_text_and_surrogates_are_shown",
    ),
    "H09": (
        "control characters in the console",
        "test_console.py::test_the_verbose_view_has_the_turns_and_can_not_be_steered_by_output",
    ),
    "H12": ("forged lines in the log", "test_logger.py::test_hostile_output_can_not_forge_a_line"),
    "H19": ("a pickle for the host", "test_structure.py::test_the_host_can_not_unpickle"),
    "H20": ("results at all their limits", "test_host.py::test_a_result_at_all_its_limits_arrives"),
    "N09": (
        "ways round the list of hosts that may be reached",
        "test_gate.py::test_in_a_container_the_listed_host_is_reached_and_nothing_else",
    ),
    "N09b": (
        "addresses and names that stand for another",
        "test_egress.py::test_what_is_not_in_the_list_is_denied_and_never_dialled",
    ),
    "N09c": (
        "tunnels for something else",
        "test_egress.py::test_a_tunnel_is_tls_and_for_the_name_that_was_asked_for",
    ),
    "P01, P03": (
        "leavings of an earlier run",
        "test_pool.py::test_runs_take_one_each_and_never_the_same",
    ),
    "P04": ("a base image that was swapped", "test_container_cli.py::test_what_comes_from_outside_is_pinned"),
    "P09": ("the log of another user", "test_logger.py::test_what_a_run_leaves_is_for_its_user_only"),
    "P05": (
        "containers and files of a killed host",
        "test_docker.py::test_a_killed_host_leaves_nothing_when_the_lease_is_over",
    ),
    "T01": ("an engine that does less than it says", "test_posture.py::test_what_is_not_as_asked_is_named"),
    "T02": ("options of the engine's own", "test_docker.py::test_options_of_the_engine_can_not_be_passed"),
    "T03": ("the host's environment", "test_docker.py::test_the_policy_as_the_engine_has_it"),
    "T04": ("the host's file descriptors", "test_local.py::test_inherited_fds_are_closed"),
    "T06": (
        "a socket in the place of the agent's",
        "test_local.py::test_the_folder_is_private_and_gone_afterwards",
    ),
    "T08": (
        "packages of anybody's at run time",
        "test_gate.py::test_in_a_container_the_listed_host_is_reached_and_nothing_else",
    ),
    "T07": (
        "an agent of another version",
        "test_wire.py::test_versions_are_exchanged_and_a_mismatch_names_both",
    ),
}

NOT_HERE = {
    "H13": "nothing is exported as a table",
    "H14, H15, H16, H18": "no file is taken out of a sandbox, and no archive of one is unpacked",
    "H25": "results are text; nothing is shown as HTML",
    "P02": "no state is pickled or stored: a session goes on in a fork of its own process",
}
"""What the catalogue of attacks has and this version has nothing of."""


def text(cases: Sequence[Case], held: Mapping[tuple[str, str, str], bool]) -> str:
    """`held` has a column, an id and a title for each case that was tried and went as expected."""
    lines = [HEAD.format(columns=" | ".join(COLUMNS), dashes="|".join("---" for _ in COLUMNS))]
    for case in cases:
        words = [_word(case, column, held) for column in COLUMNS]
        lines.append(f"| {case.id} | {case.title} | {case.expected} | {' | '.join(words)} |\n")
    lines.append(ELSEWHERE)
    lines += [f"| {name} | {what} | `{test}` |\n" for name, (what, test) in TESTS.items()]
    lines.append(ABSENT)
    lines += [f"| {name} | {why} |\n" for name, why in NOT_HERE.items()]
    return "".join(lines)


def _word(case: Case, column: str, held: Mapping[tuple[str, str, str], bool]) -> str:
    if column == "control":
        return "·" if case.control == "" else "succeeds"
    if column not in case.applies:
        return "–"
    if not held.get((column, case.id, case.title)):
        return "**NOT HELD**"
    return "*inert*" if case.inert else "**held**"
