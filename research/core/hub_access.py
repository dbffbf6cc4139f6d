"""Asking the hub with a time limit: its own client would retry for minutes."""

import dataclasses
import logging
import threading


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the hub said about a name.

    Attributes:
      revision: the commit it stands at, or "" where the hub did not know or answer.
      reason: one line, why there is no revision.
    """

    revision: str
    reason: str


def knock(name: str, kind: str, timeout: float) -> Answer:
    """Asks for a `dataset` or a `model`, decided within `timeout` seconds.

    Asked in a thread, since looking up a name has no time limit of its own.
    """
    import huggingface_hub

    found: list[Answer] = []

    def ask() -> None:
        try:
            info = huggingface_hub.HfApi().repo_info(
                name, repo_type=kind, timeout=timeout
            )
            found.append(Answer(info.sha or "main", ""))
        except Exception as error:  # The hub's client raises a dozen unrelated kinds.
            first_line = str(error).partition("\n")[0]
            logging.info("data: the hub is out of reach (%s)", first_line)
            found.append(Answer("", first_line or type(error).__name__))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return found[0] if found else Answer("", f"no answer in {timeout:g} seconds")
