"""The one clock of the files in a run directory."""

import datetime


def utc_now() -> str:
    """The time as ISO 8601 in UTC, such as `2026-11-27T11:55:22.123456+00:00`.

    Microseconds keep the order of quick requests.
    """
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
