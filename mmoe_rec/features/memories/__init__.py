"""What counters and histories remember: as files, asked together, and what has been learnt since."""
