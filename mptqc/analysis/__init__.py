"""Functions from (model, samples, plan) to values; nothing here edits a model."""
