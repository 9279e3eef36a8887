"""emberd as a service of launchd or systemd: what is wanted, the files, the managers' programs."""
