"""Runs commands of `research` in forks of one process that has imported it.

The imports are most of what a short command costs; here one import serves all commands.
JAX starts its threads when it is first used, which is in a fork.

A message on the socket whose number is the first argument has four open files and JSON:
`folder`, `env`, `program`, Python that runs first, then `module`, which may be empty,
and its `flags`. The files are the standard streams of the command, and one that gets
its process id and, when it has ended, its exit code.
"""

import gc
import json
import os
import runpy
import selectors
import socket
import sys
import traceback

import jax

# Commands import these at once, or when they need them.
import matplotlib.pyplot  # noqa: F401
import tensorboardX  # noqa: F401

import research.engine.text_generation
import research.train.start_to_report  # noqa: F401


def main():
    # It takes its settings from the environment of its first import: of a command's.
    assert "huggingface_hub" not in sys.modules
    # A collection in a fork would copy the memory that it shares.
    gc.freeze()
    if request := serve(socket.socket(fileno=int(sys.argv[1]))):
        code = run(*request)
        sys.stdout.flush()
        sys.stderr.flush()
        # The orderly end of an interpreter would copy it, too.
        os._exit(code)


def serve(requests):
    """Returns in every fork: its request. When nobody asks any more: None."""
    with selectors.DefaultSelector() as events:
        events.register(requests, selectors.EVENT_READ)
        while events.get_map():
            for event, _ in events.select():
                if event.data:
                    events.unregister(event.fd)
                    report_end(event.fd, *event.data)
                    continue
                message, files, *_ = socket.recv_fds(requests, 1 << 20, 4)
                if not message:
                    events.unregister(requests)
                    continue
                *streams, status = files
                if not (child := os.fork()):
                    return json.loads(message), streams
                os.write(status, f"{child}\n".encode())
                for file in streams:
                    os.close(file)
                ended = os.pidfd_open(child)
                events.register(ended, selectors.EVENT_READ, (child, status))
    return None


def report_end(file, child, status):
    os.close(file)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(status, f"{code}\n".encode())
    os.close(status)


def run(request, streams):
    """The program, then `python -m research.MODULE FLAGS`; returns the exit code."""
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    # JAX has read its settings already.
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    jax.config.update("jax_disable_most_optimizations", quick)
    sys.path[0] = request["folder"]
    try:
        exec(request["program"], {"__name__": "__main__"})
        if request["module"]:
            name = f"research.{request['module']}"
            sys.argv[:] = [name, *request["flags"]]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
