"""`swarmoe doctor`"""

import json
from dataclasses import asdict

from peer.settings import DoctorSettings
from swarmoe.command_line import Invocation
from swarmoe.exit_codes import ExitCode

_MARK = {"ok": "ok   ", "warn": "warn ", "error": "ERROR"}


def start(invocation: Invocation) -> int:
    """Check whether this machine can host experts. Says what to do where it cannot."""
    settings = invocation.settings(DoctorSettings)
    from peer.doctor import diagnose  # torch takes seconds to import
    from peer.machine import look

    checks = diagnose(look(settings))
    if invocation.json:
        print(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            print(f"{_MARK[check.status]}  {check.name:8}  {check.detail}")
            if check.fix:
                print(f"{'':17}{check.fix}")
    return ExitCode.USAGE if any(check.status == "error" for check in checks) else ExitCode.DONE
