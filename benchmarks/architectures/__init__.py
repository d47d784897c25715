"""Public architectures, one file a family, and what is measured of them."""
