"""The labelling application: pages and an API over the label store, for people and simulated raters."""
