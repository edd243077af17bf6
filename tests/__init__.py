"""Behaviours, as sentences. Real gRPC, real Redis, real Ray; fakes only at our own Protocols."""
