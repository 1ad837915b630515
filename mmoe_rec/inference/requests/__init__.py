"""From the body of a call to rows that the feature pipeline encodes."""
