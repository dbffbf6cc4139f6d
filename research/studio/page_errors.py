"""Errors that a page or a client of the studio is told, with the status of HTTP."""

from research.core.errors import UserError


class PageError(Exception):
    """An answer other than success.

    Attributes:
      status: of HTTP.
      message: what was requested, what was found, what to do.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def not_found(message: str) -> PageError:
    """404: it is not there, or no longer."""
    return PageError(404, message)


def as_page_error(error: Exception) -> PageError:
    """The error that a client is told for any that was raised."""
    if isinstance(error, PageError):
        return error
    if isinstance(error, UserError):
        return PageError(400, str(error))
    if isinstance(error, FileNotFoundError):
        return not_found(f"it was moved or removed while it was shown: {error}")
    if isinstance(error, OSError):
        return PageError(500, f"a file cannot be used: {error}")
    return PageError(500, "a bug of the studio; its output has more")
