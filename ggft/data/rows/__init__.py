"""How others call and shape what a row holds, and what we make of each spelling."""
