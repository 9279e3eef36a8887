"""Services that hold time and state."""
