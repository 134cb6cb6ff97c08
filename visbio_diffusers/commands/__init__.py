"""What `visbio data`, `visbio demo` and others do, and what their arguments and those of `visbio` share."""
