"""One accelerator: engine, scheduler, block pool, model, attention, and moves between tiers."""

import os

# How often an idle thread of the CPU kernels looks for work before it sleeps; read when torch is loaded, so it stands
# here. By default it looks for milliseconds: where anybody else wants a core, each of a step's hundreds of barriers
# waits for the scheduler. If it sleeps at once, it is woken up on the core of whoever wakes it, and both share that.
# Decoding one sequence (0.6B shape, two cores) took 46 ms alone and 86 ms beside one busy process with this; 46 and
# 114 with 10,000; 84 and 84 when threads slept at once.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
