"""One accelerator: engine, scheduler, block pool, model, attention, and moves between tiers."""
