"""What `visbio data` and `visbio explain` do, and what their arguments and those of `visbio` share."""
