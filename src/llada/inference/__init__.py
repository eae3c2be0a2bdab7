"""Text from models: the reverse process, and ancestral sampling."""
