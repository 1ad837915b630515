"""One model in memory for all workers of a server: a process loads it into a file that each of them maps."""
