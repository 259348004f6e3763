"""Who holds a lock, told to who finds it held."""

import datetime
import getpass
import json
import os
import socket


class Locked(OSError):
    """Another run is writing the same directory."""


def holder() -> dict[str, str | int]:
    """This process."""
    try:
        owner = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        owner = f"user {os.getuid()}"
    since = datetime.datetime.now().isoformat(timespec="seconds")
    return {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "since": since}


def held(target: os.PathLike, said: str | bytes) -> Locked:
    """The error that names who holds `target`, as its lock says in JSON."""
    try:
        holder = json.loads(said)
        who = f"{holder['owner']} on {holder['host']}, process {holder['pid']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return Locked(f"{target} is being written by {who}; wait for its end, or choose another place")
