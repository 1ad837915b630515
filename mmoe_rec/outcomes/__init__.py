"""From requests that the server logged, and from events, to rows of the interaction log."""
