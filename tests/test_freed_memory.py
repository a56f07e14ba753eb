import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from peer.freed_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
def step():
    return [np.ones(1 << 20, np.float32) for _ in range(4)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.process
def test_a_steps_memory_serves_the_next_step() -> None:
    kept = subprocess.run([sys.executable, "-c", FAULTS, "keep"], capture_output=True, text=True, check=False)
    if kept.returncode == 77:
        pytest.skip("this allocator is not glibc's")
    returned = subprocess.run([sys.executable, "-c", FAULTS, "return"], capture_output=True, text=True, check=True)

    assert int(returned.stdout) > 4000, "the allocator keeps memory by itself: this module is not needed any more"
    assert int(kept.stdout) < 1000
