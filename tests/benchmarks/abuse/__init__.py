"""What a server does with callers who mean harm or err; `python -m tests.benchmarks.abuse --help` lists the parts."""
