"""One way for tests to wait for what other threads and processes do."""

import time

# Seconds. CI stalls single threads, processes and disks for ten seconds and more, and
# patience costs nothing: a condition that comes true ends the wait.
PATIENCE = 600


def wait_until(condition, said=None, seconds=PATIENCE):
    """Waits until `condition()` is true, and returns what it is then.

    Args:
      condition: asked at growing intervals, of 5 ms at first and 0.2 s at last.
      said: a function; what it returns is shown when time is over.
      seconds: how long at most.
    """
    over, pause = time.monotonic() + seconds, 0.005
    while not (found := condition()):
        if time.monotonic() > over:
            why = said() if said else condition
            raise AssertionError(f"not true after {seconds} s: {why}")
        time.sleep(pause)
        pause = min(1.3 * pause, 0.2)
    return found
