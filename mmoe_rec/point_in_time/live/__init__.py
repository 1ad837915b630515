"""Events that come after a memory was made: levels beside it, which are asked together with it."""
