"""The errors that a user can mend, and the one sentence that each of them prints."""

import errno

from data_cards import CardError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


class StageError(Exception):
    """A stage cannot go on. The message is one sentence: what is wrong, where, and how to mend it."""


class ShardError(ValueError):
    """A shard cannot be read or does not fit its schema. The message names the file and the remedy."""


class Stopped(Exception):
    """The stage was asked to stop, and has finished its current shard."""


# The errors that `sentence` explains; any other error is a bug.
USER_ERRORS = (StageError, CardError, ShardError, OSError, MemoryError)


def sentence(error: BaseException) -> str | None:
    """The message for an error that the user can mend; None for a bug."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; run it where there is more, or lower its batch"
    if not isinstance(error, OSError):
        return str(error)
    message = f"{error.filename}: {error.strerror}" if error.filename else first_line(error)
    if error.errno in FULL:
        return f"{message}; make room and run again, finished shards are kept"
    return f"{message}; make it accessible and run again" if error.errno in FORBIDDEN else None


def first_line(error: BaseException, secret: str = "") -> str:
    """The first line of an error's message, at most 300 characters; its type where it is empty.

    A `secret`, such as an API key that a server repeats, is left out of it.
    """
    text = str(error).replace(secret, "***") if secret else str(error)
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
