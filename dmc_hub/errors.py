"""What every error of this library is: a sentence that names the file, field, episode or step, and what to do.

Each is also one of Python's own kinds (a `ValueError` for what was passed, an `OSError` for disks and networks, a
`RuntimeError` for what failed on the way), so that programs may catch either.
"""

from __future__ import annotations

import signal

EXIT_CODES = {
    0: "done",
    1: "it failed while it ran: a collapse, a reward function, an environment, a full disk, a mistake of ours",
    2: "wrong input: an argument, a file, a repo or data that cannot be used; nothing was changed",
    130: "interrupted by Ctrl-C; a command that was training has written a checkpoint",
    143: "stopped by SIGTERM; likewise",
}
"""What the exit codes of `dmc-hub` mean."""


class DmcHubError(Exception):
    """An error whose message is written for the user. `exit_code` is what `dmc-hub` ends with."""

    exit_code = 2


class RunError(DmcHubError, RuntimeError):
    """Something failed while a program ran that was right when it started."""

    exit_code = 1


class CollapseError(DmcHubError, FloatingPointError):
    """A network's weights, losses or samples are no finite numbers any more."""

    exit_code = 1


class RewardError(RunError):
    """A reward function raised, or did not answer in time."""


class EnvironmentFailedError(RunError):
    """Environments failed so often that there is nothing to report."""


class MissingFileError(DmcHubError, FileNotFoundError):
    """A folder is not what it is taken for: a file is not in it."""


class FolderInUseError(DmcHubError, ValueError):
    """Another process writes to the folder."""


class SaveError(DmcHubError, OSError):
    """Something could not be written: no room, no permission. What was saved before is as it was."""

    exit_code = 1


class StoppedBySignal(KeyboardInterrupt):
    """Training ended after the step during which Ctrl-C or SIGTERM came."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
