"""Adapters for engines: flags, readiness, liveness, process."""
