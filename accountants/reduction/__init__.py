"""From events to what neighbours see of them: the multiset of components that privacy depends on."""
