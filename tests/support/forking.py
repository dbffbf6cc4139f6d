"""Runs commands of `research` in forks of one process that has imported it.

A refused command costs little but the import of JAX and the rest; here one import
serves many of them. JAX starts its threads when it is first used, which is in a fork.

Standard input has a command a line, as JSON: `module`, `flags`, `folder`, `devices`
and `said`, the path of what it writes but for `.out` and `.err`. Standard output has
a line for each: its exit `code` and its `seconds`.
"""

import json
import os
import runpy
import sys
import time
import traceback

# All that the commands import, except the modules that define their flags.
import research.engine.text_generation
import research.train.start_to_report  # noqa: F401


def main():
    for line in sys.stdin:
        command, begun = json.loads(line), time.monotonic()
        child = os.fork()
        if not child:
            os._exit(run(**command))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(
            json.dumps({"code": code, "seconds": time.monotonic() - begun}), flush=True
        )


def run(module, flags, folder, devices, said):
    """In the fork: `python -m research.MODULE` in `folder`; returns its exit code."""
    for number, ending in ((0, ""), (1, ".out"), (2, ".err")):
        mode = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
        os.dup2(os.open(said + ending if number else os.devnull, mode), number)
    os.chdir(folder)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    name = f"research.{module}"
    sys.argv[:] = [name, *flags]
    code = 0
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
