"""The tasks of `make test-local-model`: their truths are in their texts, and answers are told right from wrong."""

import pytest

from benchmarks.local_model.task import Task
from benchmarks.local_model.tasks import SETS

TASKS = [task for tasks in SETS.values() for task in tasks()]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_knows_its_truth(task: Task) -> None:
    assert task.is_solved_by(f"It is {task.truth}.") and task.is_solved_by(task.truth)
    assert not task.is_solved_by("") and not task.is_solved_by("I don't know: 1, 2 or Lima, Ada?")
    assert not task.is_solved_by(f"{task.truth} or 77777, Oslo or Bruno")


def test_the_sets_have_no_task_in_common_and_are_the_same_every_time() -> None:
    assert len({task.context for task in TASKS}) == len(TASKS) == 30
    assert [task for tasks in SETS.values() for task in tasks()] == TASKS
