"""Models that move on: new tables for the one that is served, and a training when one is due."""
