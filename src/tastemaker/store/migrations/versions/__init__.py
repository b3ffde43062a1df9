"""Changes of the label store's tables, in order; each runs in a transaction when a store is opened."""
