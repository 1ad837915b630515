"""What a process computes with, chosen by measurement on the model's own shapes when it starts.

What is fast on one processor is slow on another, and no flag tells: bf16 products take a quarter of fp32's time on some
that have them and twice as long on others. So options are timed in turns for some tens of milliseconds, as they will be
used, and what was found goes with the choice.
"""
