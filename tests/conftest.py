"""One thread per process, so that numbers do not depend on the machine's load or size."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
