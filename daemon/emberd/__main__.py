"""`python -m emberd`: what the service managers start."""

from __future__ import annotations

from emberd.cli.main import main

main()
