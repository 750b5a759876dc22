"""What to do where the system has no more of something: whatever could not be opened or written for that, says it."""

from __future__ import annotations

import errno
from typing import Final

__all__ = ["REMEDIES"]

# By the number of an error (errno(3)).
REMEDIES: Final = {
    errno.ENOSPC: "make room there (df, and df -i)",
    errno.EDQUOT: "make room in that quota",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f, LimitFSIZE=)",
    errno.EMFILE: "raise the limit of open files (ulimit -n, LimitNOFILE=)",
    errno.ENFILE: "raise the limit of open files of this machine (fs.file-max)",
}
