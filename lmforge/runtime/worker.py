"""`python -m torch.distributed.run ... -m lmforge.runtime.worker FOLDER`: one rank of a job."""

import sys
from pathlib import Path

from lmforge.runtime.launch import worker

if __name__ == "__main__":
    sys.exit(worker(Path(sys.argv[1])))
