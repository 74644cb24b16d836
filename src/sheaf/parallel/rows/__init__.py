"""Embedding tables whose gradients travel as rows, to all replicas or to those who hold the rows."""

from sheaf.parallel.rows.tables import Tables, tables

__all__ = ["Tables", "tables"]
