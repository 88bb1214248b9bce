"""What a process tells torchrun about how it ended, and that the processes of a node say it once.

torchrun ends a failed run with a report of its own: for each failed process, what that process wrote into the file
named by TORCHELASTIC_ERROR_FILE (torch.distributed.elastic.multiprocessing.errors).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def launched() -> bool:
    """Whether torchrun started this process."""
    return ERROR_FILE in os.environ


def leave_message(message: str) -> bool:
    """Makes `message` what torchrun's report says of this process.

    Returns whether this process should print it: False where another process of this node has left the same message.
    The report's root cause, its last entry, is then that other process.
    """
    if not launched():
        return True
    # torchrun names the file LOGS/ATTEMPT/LOCAL_RANK/error.json.
    file = Path(os.environ[ERROR_FILE])
    first, text, now = True, message, int(time.time())
    with suppress(OSError):
        try:
            (file.parents[1] / f"said_{hashlib.sha256(message.encode()).hexdigest()[:16]}").open("x").close()
        except FileExistsError:
            # torchrun takes the earliest message for the cause.
            first, text, now = False, "the same as the root cause below", now + 3600
        file.write_text(json.dumps({"message": {"message": text, "extraInfo": {"timestamp": str(now)}}}))
    return first
