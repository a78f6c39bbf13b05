"""Every option, declared once: flags, defaults, bounds, help and records."""
