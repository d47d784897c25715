"""Engines multiply with J and its transpose; parameter-sized tensors live only here."""
