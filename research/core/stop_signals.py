"""The signals that ask a training to stop, and to be resumed later."""

import signal


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP unless this process was told to ignore it, as by `nohup`."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, signal.SIGHUP]
