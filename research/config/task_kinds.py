"""The kinds of task by name: what `config.data.kind` may be."""

# Each names a module whose `KIND` is a `tasks.task_protocol.TaskKind`. Adding a task is
# a line here, or `TASK_MODULES["name"] = "module"` in a file that a run imports. The
# modules are imported when a run needs them: launchers read the names without JAX.
TASK_MODULES = {
    "instructions": "research.tasks.instruction_tuning",
    "text": "research.tasks.pretraining",
}
