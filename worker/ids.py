"""Where a block lies on this worker. (What it holds is `cache_store.ids.BlockHash`.)"""

from typing import NewType

BlockId = NewType("BlockId", int)
"""A place for one block in this worker's device pool. Means nothing anywhere else."""
