"""Training steps priced from their shape alone: no tracing, no measuring, for machines that are not here."""
