"""Where text comes from: one module a family, each yielding `Rows` in batches."""
