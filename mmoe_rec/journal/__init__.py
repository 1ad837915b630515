"""The journal: an append-only, durable record of the events that servers have accepted. See README.md."""
