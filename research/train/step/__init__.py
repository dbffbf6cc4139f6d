"""One optimizer update as one jitted program: state, step, optimizers, schedules."""
