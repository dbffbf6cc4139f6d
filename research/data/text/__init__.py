"""Raw text: tokenised once into a shared cache, or streamed, and cut into rows."""
