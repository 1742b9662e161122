"""Metrics as functions of stored features. Knows no model that generates."""
