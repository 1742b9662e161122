"""What each command of `darkroom` does: one function of its arguments, which returns the exit code."""
