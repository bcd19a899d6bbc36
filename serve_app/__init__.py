"""HTTP and composition: routes, settings, and the one place that binds deployments."""
