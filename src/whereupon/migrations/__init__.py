"""Alembic migrations of whereupon's tables; `whereupon.schema` runs them."""
