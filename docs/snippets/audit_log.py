"""A log file of the application's own, which is opened anew for logrotate."""

import ecdysis_async

audit = open("audit.log", "a", buffering=1)


@ecdysis_async.on_reopen_logs
def reopen() -> None:
    global audit
    audit.close()
    audit = open("audit.log", "a", buffering=1)
