"""How runs share the devices: a lone run as it is, or a pack as one program."""
