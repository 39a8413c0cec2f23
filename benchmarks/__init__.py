"""Side-by-side measurements with what a user would pick instead. Never imported by the library."""
