"""Opening the files that a dataset names, whatever it names.

A name without a file behind it is a problem of one image. An error of the file system is none of the
image: it is waited for, and what does not pass ends the run, which the same command continues.
"""

import errno
import os
import pathlib
import stat
import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

MISSING, UNREADABLE = "missing", "unreadable"
PAUSES = (0.1, 1.0, 5.0)  # seconds before each further try after an error of the file system
# Of `open`: there is no file of that name, or none that can be read like a file.
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.ENODEV}
T = TypeVar("T")


class ImageProblem(ValueError):
    """No pixels can be had of one image, and trying again would not help.

    Attributes:
        reason: one of a few, to count by; begins with MISSING or UNREADABLE.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def open_file(path: str | pathlib.Path) -> BinaryIO:
    """Opens a regular file, and never waits for the other end of a pipe.

    Raises:
        ImageProblem: nothing that is a regular file.
        OSError: the file system's.
    """
    try:
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115  # the caller closes it
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise ImageProblem(f"{MISSING}: no file's name", f"{str(path)!r} is no name of a file: {error}") from None
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        reason = MISSING if error.errno == errno.ENOENT else f"{MISSING}: {error.strerror.lower()}"
        raise ImageProblem(reason, f"there is no file {path}{_why(error)}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ImageProblem(f"{MISSING}: not a regular file", f"{path} is not a regular file")
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _why(error: OSError) -> str:
    return "" if error.errno == errno.ENOENT else f" ({error.strerror})"


def files_below(root: pathlib.Path) -> Callable[[str], BinaryIO]:
    """`Source.open` of image files named relative to `root`; a name must not lead out of it, a link may."""

    def open_below(name: str) -> BinaryIO:
        if name.startswith("/") or ".." in name.split("/"):
            raise ImageProblem(f"{MISSING}: outside of the source", f"{name} lies outside of {root}; it is not read")
        return open_file(root / name)

    return open_below


def patiently(action: Callable[[], T], what: object) -> T:
    """The action's result, tried again after a pause where the file system fails.

    Args:
        action: raises OSError for an error of the file system; what is damaged or missing must be another error.
        what: is read, for the message.

    Raises:
        OSError: it fails for good; names `what` and the system's reason.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except OSError as error:
            if pause is None or isinstance(error, PermissionError):
                raise OSError(f"cannot read {what}: {error}") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def is_of_the_file_system(error: Exception) -> bool:
    """Whether an error of a decoder that reads a file is the file's; decoders' own OSErrors carry no number.

    EINVAL is a decoder's too: it was sent to a place before the file's beginning.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
