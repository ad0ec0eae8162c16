"""Model hubs: bundles that others published, fetched and checked."""
