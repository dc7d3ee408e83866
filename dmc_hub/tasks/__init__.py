"""The tasks: where data and environment come from and what is known about them."""

from dmc_hub.tasks.record import Task, action_bounds, describe_task, make_vector_env, num_side_by_side
from dmc_hub.tasks.table import TASKS, get_task

__all__ = ["TASKS", "Task", "action_bounds", "describe_task", "get_task", "make_vector_env", "num_side_by_side"]
