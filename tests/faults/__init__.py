"Malformed and odd inputs of every kind, made by seeded generators, and what the product must do with each."
