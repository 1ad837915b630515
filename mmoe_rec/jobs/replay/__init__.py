"""A period of the log fed through a running server, and what it serves compared with what training would have seen."""
