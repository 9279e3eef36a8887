"""emberd keeps a local LLM warm behind one endpoint that is always there."""

__version__ = "0.1.0"
