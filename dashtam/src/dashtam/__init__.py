"""A financial-data aggregator: the reference application of `whereupon`."""
