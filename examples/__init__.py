"""Scripts; each has an importable `main(args)`."""
