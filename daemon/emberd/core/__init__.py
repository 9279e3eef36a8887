"""Pure decisions: no clock, no files, no sockets; time comes in as an argument."""
