"""`swap`: other norms in place of a model's batch norms."""
