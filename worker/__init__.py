"""One accelerator: engine, scheduler, block pool, model, attention, and moves between tiers."""

import os

# How long an idle thread of torch's CPU kernels spins before it sleeps; read when torch is loaded, so it stands here.
# By default it spins for milliseconds, which suits a machine that does nothing else: where anybody else wants a core,
# each of a step's hundreds of parallel regions waits for the scheduler. Beside one busy process on two cores, decoding
# gave 25 tokens/s with this and 4 to 6 without; on an idle machine both gave 64.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
