"""What `visbio data` does, and what its arguments and those of `visbio` share."""
