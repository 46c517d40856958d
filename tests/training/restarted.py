"""Two processes that meet again and again: one of them is killed twice."""

import os
import signal

from cbml import distributed

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with distributed.joined():
    distributed.barrier()
    if attempt < 2 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()
