"""Events that callers send: accepted into the journal, then learnt by every worker's model."""
