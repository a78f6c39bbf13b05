"""Models by name: registry, downloads, headers of models not downloaded yet."""
