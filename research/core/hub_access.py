"""The Hugging Face hub, with a time limit: its own client retries for minutes."""

import dataclasses
import logging
import threading


@dataclasses.dataclass(frozen=True)
class HubReply:
    """The hub's reply about a name.

    Attributes:
      revision: the commit that the name stands for; "" if the hub did not know the
        name or did not reply.
      reason: why there is no revision, in one line.
    """

    revision: str
    reason: str


def ask_hub(name: str, kind: str, timeout: float) -> HubReply:
    """Asks for the revision of a repository.

    Args:
      name: `owner/name`.
      kind: `dataset` or `model`.
      timeout: seconds after which the hub counts as out of reach.
    """
    import huggingface_hub

    replies: list[HubReply] = []

    def ask() -> None:
        try:
            info = huggingface_hub.HfApi().repo_info(
                name, repo_type=kind, timeout=timeout
            )
            replies.append(HubReply(info.sha or "main", ""))
        except Exception as error:  # The hub's client raises a dozen unrelated kinds.
            first_line = str(error).partition("\n")[0]
            logging.info("hub: out of reach (%s)", first_line)
            replies.append(HubReply("", first_line or type(error).__name__))

    # In a thread, because looking up a host name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return replies[0] if replies else HubReply("", f"no reply in {timeout:g} seconds")
