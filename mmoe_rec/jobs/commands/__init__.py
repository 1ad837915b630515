"""The commands: each reads its arguments, calls a job and prints what came of it."""
