"""How every command ends. The numbers are for ever: add, never reuse. docs/exit-codes.md says more of each."""

from enum import IntEnum

from peer import errors


class ExitCode(IntEnum):
    """What the shell sees."""

    DONE = 0
    BUG = 1
    USAGE = 2
    COULD_NOT_LISTEN = 3
    COULD_NOT_JOIN = 4
    CHECKPOINT_UNUSABLE = 5
    TRAINING_GAVE_UP = 6
    RUN_MISMATCH = 7
    NOT_AUTHORISED = 8


RESOLVE: dict[ExitCode, str] = {
    ExitCode.DONE: "Nothing to do.",
    ExitCode.BUG: "Report the traceback on stderr together with the output of `swarmoe doctor --json`.",
    ExitCode.USAGE: "Correct the flag, setting or file that the error line names; `--help` lists what a command takes.",
    ExitCode.COULD_NOT_LISTEN: "Stop whatever holds the address or the state folder, or give another.",
    ExitCode.COULD_NOT_JOIN: "Check that somebody answers at `--join`: `swarmoe doctor --join HOST:PORT`.",
    ExitCode.CHECKPOINT_UNUSABLE: "Give another checkpoint folder, or start afresh without `--resume`.",
    ExitCode.TRAINING_GAVE_UP: "See with `swarmoe status` which experts nobody serves; bring peers back and resume.",
    ExitCode.RUN_MISMATCH: "Join the run you mean, or install its coordinator's version; the error names the field.",
    ExitCode.NOT_AUTHORISED: "Check the key after the slash in `--join`, and this machine's clock.",
}
"""What to do about each, in one sentence."""

CODE_OF: dict[type[errors.SwarmError], ExitCode] = {
    errors.SwarmError: ExitCode.BUG,
    errors.RemoteError: ExitCode.COULD_NOT_JOIN,
    errors.PeerUnreachable: ExitCode.COULD_NOT_JOIN,
    errors.DeadlineExceeded: ExitCode.COULD_NOT_JOIN,
    errors.PeerOverloaded: ExitCode.COULD_NOT_JOIN,
    errors.MalformedReply: ExitCode.COULD_NOT_JOIN,
    errors.RequestRejected: ExitCode.BUG,
    errors.NotAuthorised: ExitCode.NOT_AUTHORISED,
    errors.TooFewExperts: ExitCode.TRAINING_GAVE_UP,
    errors.MalformedMessage: ExitCode.BUG,
    errors.ManifestMismatch: ExitCode.RUN_MISMATCH,
    errors.CouldNotListen: ExitCode.COULD_NOT_LISTEN,
    errors.CouldNotJoin: ExitCode.COULD_NOT_JOIN,
    errors.WrongKey: ExitCode.NOT_AUTHORISED,
    errors.RecordsUnavailable: ExitCode.COULD_NOT_JOIN,
    errors.FolderInUse: ExitCode.COULD_NOT_LISTEN,
    errors.BadConfiguration: ExitCode.USAGE,
    errors.CheckpointUnusable: ExitCode.CHECKPOINT_UNUSABLE,
    errors.TrainingGaveUp: ExitCode.TRAINING_GAVE_UP,
}
"""One line for each error that may reach the top; a test keeps it complete."""


def exit_code_of(error: errors.SwarmError) -> ExitCode:
    """The code of the nearest class in the table."""
    return next(CODE_OF[cls] for cls in type(error).__mro__ if cls in CODE_OF)
