"""Model families: mapping of config fields and tensor names, and the formats of their folders."""
