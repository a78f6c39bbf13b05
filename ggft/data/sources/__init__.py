"""Where rows come from: containers that are more than lines, standard input, the hub."""
