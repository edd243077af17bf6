"""Everything about cold KV and session records: names, frames, tiers, Redis. It knows no tensor and no gRPC."""
