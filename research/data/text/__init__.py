"""Raw text: read, tokenise once into a shared cache (or stream), cut into rows."""
