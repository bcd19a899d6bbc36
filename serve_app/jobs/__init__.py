"""Work that runs beside the service and through it, as `ray job submit` starts it."""
